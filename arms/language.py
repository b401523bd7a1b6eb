"""Tasks with an instruction (Sec. V-F, Table V): a frozen vision-language model sees each state.

    tokens = Tokens(args, ["front", "wrist"])       # args: settings.Args with a backbone
    tokens.features({"front": image, "wrist": image})     # (1, L * W) float32, one call
    policy = head(args, task)                       # vla_head.VLAFlowHead for these states

The model runs in the arm's process, once per state. Its hidden states are kept in the files of
episodes and in the replay like any other feature, so neither stage I, nor the learner's process,
nor a resumed run needs the model. The name of their column tells which model, instruction and
cameras made them: recordings of others do not fit and are refused. Needs transformers.
Not here: the head (vla_head.py), the model (arms/adapters/backbone.py), the ResNet of the other
tasks (vision.py).

Shapes: L tokens, W their width, V cameras, X and Y pixels of a picture.
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arms.adapters.backbone import INSTRUCTIONS, fingerprint, open_backbone
from logbook import UserError

from .episodes import Layout
from .senses import PERIOD


class Tokens:
    """Makes features of the cameras' pictures by a vision-language model, as args.backbone says."""

    def __init__(self, args: Any, cameras: Sequence[str]):
        text = args.instruction or INSTRUCTIONS.get(args.task)
        if text is None:
            raise UserError(
                f"a backbone needs --instruction TEXT: {args.task} has no words of its own"
            )
        if args.backbone == "tiny":
            print(
                "warning: without --backbone DIR a tiny random model looks: its features tell "
                "where things are, hardly what they are",
                file=sys.stderr,
            )
        try:
            self.backbone = open_backbone(args.backbone, text, len(cameras), device_of(args))
        except ImportError as error:
            raise UserError(
                f"vision-language tasks need transformers ({error}): pip install transformers"
            ) from error
        self.shape = (self.backbone.length, self.backbone.width)
        width = math.prod(self.shape)
        seconds = self._seconds_per_state()
        kilobytes = 4 * width / 1000
        gigabytes = 8 * width * args.capacity / 1e9
        print(
            f"'{text}' to a {self.backbone.family}: {1000 * seconds:.0f} ms and {kilobytes:.0f} kB "
            f"per state, a replay of {gigabytes:.1f} GB beside the demonstrations"
        )
        if args.realtime and seconds > PERIOD / 2:
            print(
                f"warning: too slow for a period of {1000 * PERIOD:.0f} ms, the arm will move in "
                "jerks: take a smaller backbone, or a GPU",
                file=sys.stderr,
            )

    def sizes(self, cameras: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return the column that the features fill, and its shape: {name: (L, W)}."""
        length, width = self.shape
        return {f"tokens_{length}x{width}_{fingerprint(self.backbone)}": self.shape}

    def features(self, pictures: dict[str, np.ndarray]) -> Tensor:
        """Encode {name: (Y, X, 3) uint8}, all of one size -> (1, L * W) float32 on the CPU."""
        images = np.stack([np.asarray(picture) for picture in pictures.values()])
        return self.backbone(torch.from_numpy(images[None])).flatten(1).float().cpu()

    def _seconds_per_state(self) -> float:
        """Measure one call, after a first one that warms up."""
        gray = np.full((64, 64, 3), 100, np.uint8)
        pictures = {f"view {i}": gray for i in range(self.backbone.views)}
        self.features(pictures)
        start = time.perf_counter()
        self.features(pictures)
        return time.perf_counter() - start


def device_of(args: Any) -> torch.device:
    """Choose where the model runs: the learner's GPU if there is one here, otherwise the CPU."""
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    return torch.device("cuda" if cuda else "cpu")


def head(args: Any, task: Layout) -> torch.nn.Module:
    """Build an untrained flow head, without its model, for observations of this layout."""
    from vla_head import VLAFlowHead

    if args.channels % math.lcm(args.attention_heads, 2):
        raise UserError(
            f"--attention-heads, and 2, must divide --channels, got {args.attention_heads} and "
            f"{args.channels}"
        )
    length, width = task.token_shape
    return VLAFlowHead(
        length,
        width,
        task.obs_dim - length * width,
        task.action_dim,
        args.horizon,
        args.channels,
        args.blocks,
        args.attention_heads,
        args.flow_steps,
    )
