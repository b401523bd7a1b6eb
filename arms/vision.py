"""
Pictures to features: a frozen ResNet-10, one pass over all cameras (paper Sec. V-A2; its weights are not published).

    encoder = Encoder("resnet10.pt")                      # a plain state_dict; without a file: fixed random weights
    features = encoder.features({"front": picture, "wrist": picture})         # (1, 2 * 512) float32

Two 128 x 128 pictures take 11 ms on one core. Nothing here learns: features can be kept in the replay instead of
pictures. `save` writes the format that `Encoder` reads; torchvision's names of a ResNet of one block per stage fit.
Not here: training an encoder, augmentation, cameras (camera.py, sim.py).
Shapes: B batch, V views, H and W pixels.
"""
from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logbook import UserError, replacing

FEATURES = 512  # per view
WIDTHS = (64, 128, 256, 512)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.downsample is None else self.downsample(x)
        return F.relu(around + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet10(nn.Module):
    """Stem and four stages of one block each, mean over the picture: (B, 3, H, W) -> (B, 512); 4.9 M weights."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        for i, (inputs, outputs) in enumerate(zip((64, *WIDTHS), WIDTHS)):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(inputs, outputs, 1 if i == 0 else 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(-2, -1))


class Encoder(nn.Module):
    """
    weights: file of a state_dict, read without executing anything in it; None: random weights of a fixed seed and a
    warning, since random features tell where things are but not what they are. Frozen and in evaluation mode for good.
    """

    def __init__(self, weights: str | Path | None = None, device: str = "cpu"):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = ResNet10()
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):  # keep the signal's size through the random layers
                nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(layer.weight.numel()))
        self.mark = ""
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None])
        if weights is None:
            print("warning: no weights for the vision encoder, its features are random projections (fixed seed); train "
                  "or download a ResNet-10 and name its file", file=sys.stderr, flush=True)
        else:
            self._load(Path(weights))
            self.mark = "_" + hashlib.sha256(b"".join(one.numpy().tobytes() for one in self.net.state_dict().values())
                                             ).hexdigest()[:8]
        self.net.to(memory_format=torch.channels_last)  # half the time on a CPU
        self.requires_grad_(False).eval().to(device)

    def train(self, mode: bool = True):
        """Stays in evaluation mode: batch statistics would make the features depend on the batch."""
        return super().train(False)

    @torch.no_grad()
    def features(self, pictures) -> Tensor:
        """
        {name: (H, W, 3) uint8} in the dict's order, or a tensor or array (B, V, H, W, 3) uint8 -> (B, V * 512) float32
        on the encoder's device; a dict is a batch of one. ValueError for other shapes and types.
        """
        if isinstance(pictures, dict):
            pictures = np.stack([np.asarray(picture) for picture in pictures.values()])[None]
        pictures = torch.as_tensor(pictures)
        if pictures.dtype != torch.uint8 or pictures.ndim != 5 or pictures.shape[-1] != 3:
            raise ValueError(f"pictures are (B, V, H, W, 3) uint8, got {tuple(pictures.shape)} {pictures.dtype}")
        batch, views = pictures.shape[:2]
        x = pictures.to(self.mean.device).flatten(0, 1).permute(0, 3, 1, 2).float() / 255  # (B * V, 3, H, W)
        return self.net((x - self.mean) / self.deviation).unflatten(0, (batch, views)).flatten(1)

    def sizes(self, cameras) -> dict:
        """
        The columns that the features of these cameras fill: {name: width}. Eight digits of the weights, where they
        come from a file, tell features of one encoder from those of another.
        """
        return {camera + self.mark: FEATURES for camera in cameras}

    def save(self, path: str | Path) -> None:
        """Writes the network's weights as a plain state_dict."""
        with replacing(path) as file:
            torch.save(self.net.state_dict(), file)

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"there is no file of encoder weights {path}") from None
        except Exception as error:  # foreign bytes make the reader fail in any way at all
            raise UserError(f"{path} is no file of PyTorch weights; nothing in it was executed") from error
        if not isinstance(state, dict) or not all(isinstance(one, str) and isinstance(value, Tensor)
                                                  for one, value in state.items()):
            raise UserError(f"{path} holds no plain state_dict of tensors")
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}  # torchvision's classifier
        try:
            self.net.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit a ResNet-10: {' '.join(str(error).split())[:300]}") from error
        if not all(torch.isfinite(value).all() for value in state.values()):
            raise UserError(f"{path} holds weights that are not finite")
