"""Pictures to features: a frozen ResNet-10, one pass over all cameras (Sec. V-A2).

    encoder = Encoder("resnet10.pt")                      # a plain state_dict
    encoder = Encoder()                                   # fixed random weights, and a warning
    features = encoder.features({"front": picture, "wrist": picture})         # (1, 2 * 512) float32

The paper's weights are not published. Two pictures of 128 x 128 take 11 ms on one core. Nothing
here learns, so the replay keeps features instead of pictures. `save` writes the format that
`Encoder` reads; torchvision's names of a ResNet with one block per stage fit. Needs torch only.
Not here: training an encoder, augmentation, cameras (camera.py, sim.py).

Shapes: B batch, V views, X and Y pixels.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logbook import UserError, load_tensors, replacing

FEATURES = 512  # per view
WIDTHS = (64, 128, 256, 512)
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB
DEVIATION = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(h)))


class ResNet10(nn.Module):
    """A stem, four stages of one block, the mean over the picture: (B, 3, Y, X) -> (B, 512).

    4.9 M weights.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, WIDTHS[0], 1))
        self.layer2 = nn.Sequential(Block(WIDTHS[0], WIDTHS[1], 2))
        self.layer3 = nn.Sequential(Block(WIDTHS[1], WIDTHS[2], 2))
        self.layer4 = nn.Sequential(Block(WIDTHS[2], WIDTHS[3], 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(-2, -1))


class Encoder(nn.Module):
    """The ResNet-10, frozen and in evaluation mode for good.

    weights: the file of a state_dict; nothing in it is executed. Without one the weights are random
    from a fixed seed, and a warning says so: random features tell where things are, not what.
    """

    def __init__(self, weights: str | Path | None = None, device: str = "cpu"):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = ResNet10()
        self._scale_random_weights()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])
        self.mark = ""
        if weights is None:
            print(
                "warning: no weights for the vision encoder, its features are random projections "
                "(fixed seed); train or download a ResNet-10 and name its file",
                file=sys.stderr,
                flush=True,
            )
        else:
            load_weights(self.net, Path(weights))
            numbers = b"".join(value.numpy().tobytes() for value in self.net.state_dict().values())
            self.mark = "_" + hashlib.sha256(numbers).hexdigest()[:8]
        self.net.to(memory_format=torch.channels_last)  # half the time on a CPU
        self.requires_grad_(False).eval().to(device)

    def _scale_random_weights(self) -> None:
        """Keep the size of the signal through the random layers."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                generator = torch.Generator().manual_seed(layer.weight.numel())
                nn.init.kaiming_normal_(layer.weight, generator=generator)

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode: batch statistics would make features depend on the batch."""
        return super().train(False)

    @torch.no_grad()
    def features(self, pictures: dict[str, np.ndarray] | np.ndarray | Tensor) -> Tensor:
        """Encode pictures, on the encoder's device.

        {name: (Y, X, 3) uint8}, in the dict's order and a batch of one, or (B, V, Y, X, 3) uint8
        -> (B, V * 512) float32. ValueError for other shapes and types.
        """
        if isinstance(pictures, dict):
            pictures = np.stack([np.asarray(picture) for picture in pictures.values()])[None]
        pictures = torch.as_tensor(pictures)
        if pictures.dtype != torch.uint8 or pictures.ndim != 5 or pictures.shape[-1] != 3:
            raise ValueError(
                f"pictures are (B, V, Y, X, 3) uint8, got {tuple(pictures.shape)} {pictures.dtype}"
            )
        batch, views = pictures.shape[:2]
        x = pictures.to(self.mean.device).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        x = (x - self.mean) / self.deviation  # (B * V, 3, Y, X)
        return self.net(x).unflatten(0, (batch, views)).flatten(1)

    def sizes(self, cameras: Sequence[str]) -> dict[str, int]:
        """Return the columns that the features of these cameras fill: {name: width}.

        Eight digits of the weights, where they come from a file, tell features of one encoder from
        those of another.
        """
        return {camera + self.mark: FEATURES for camera in cameras}

    def save(self, path: str | Path) -> None:
        """Write the network's weights as a plain state_dict."""
        with replacing(path) as file:
            torch.save(self.net.state_dict(), file)


def load_weights(net: ResNet10, path: Path) -> None:
    """Load a state_dict into the network. UserError, and nothing executed, for any other file."""
    # torchvision's classifier is of no use here.
    state = {
        name: value for name, value in load_tensors(path).items() if not name.startswith("fc.")
    }
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit a ResNet-10: {reason}") from error
