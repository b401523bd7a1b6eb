"""
Tasks with an instruction (paper Sec. V-F, Table V): a frozen vision-language model looks, a flow action head moves.

    tokens = Tokens(args, ["front", "wrist"])             # args: settings.Args with a backbone; needs transformers
    tokens.features({"front": picture, "wrist": picture}) # (1, L * W) float32, one call of the model
    policy = head(args, task)                             # vla_head.VLAFlowHead for the observations of arms.episodes

The model runs in the arm's process, once per state; its hidden states are kept in the episodes' files and the replay as
any other feature, so stage I, the learner's process and a resumed run never need it. Their column's name says what made
them, tokens_LxW_DIGITS: recordings of another model, instruction or number of cameras do not fit and are refused.
Not here: the head and the model (vla_head.py, arms/adapters/backbone.py), the ResNet of the other tasks (vision.py).
Shapes: L tokens, W their width, H and W pixels of a picture.
"""
from __future__ import annotations

import math
import sys
import tempfile
import time

import numpy as np
import torch

from arms.adapters.backbone import INSTRUCTIONS, Backbone, fingerprint, tiny_backbone
from logbook import UserError

from .senses import PERIOD


class Tokens:
    """What args.backbone, a folder or "tiny", makes of the pictures of `cameras`, told args.instruction."""

    def __init__(self, args, cameras):
        text = args.instruction or INSTRUCTIONS.get(args.task)
        if text is None:
            raise UserError(f"a backbone needs --instruction TEXT: {args.task} has no words of its own")
        try:
            self.backbone = open_backbone(args, text, len(cameras))
        except ImportError as error:
            raise UserError(f"vision-language tasks need transformers ({error}): pip install transformers") from error
        seconds = self._seconds()
        print(f"'{text}' to a {self.backbone.family}: {1000 * seconds:.0f} ms and {self.width * 4 / 1000:.0f} kB per "
              f"state, a replay of {8 * self.width * args.capacity / 1e9:.1f} GB beside the demonstrations")
        if args.realtime and seconds > PERIOD / 2:
            print(f"warning: too slow for a period of {1000 * PERIOD:.0f} ms, the arm will move in jerks: a smaller "
                  "backbone, or a GPU", file=sys.stderr)

    @property
    def width(self):
        return self.backbone.length * self.backbone.width

    def sizes(self, cameras):
        """The column that the features fill: {name: width}."""
        shape = f"{self.backbone.length}x{self.backbone.width}"
        return {f"tokens_{shape}_{fingerprint(self.backbone)}": self.width}

    def features(self, pictures):
        """{name: (H, W, 3) uint8}, all of one size -> (1, L * W) float32 on the CPU."""
        images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures.values()])[None])
        return self.backbone(images).flatten(1).float().cpu()

    def _seconds(self):
        """What one state takes, after a first one that warms up."""
        for _ in range(2):
            since = time.perf_counter()
            self.features({i: np.full((64, 64, 3), 100, np.uint8) for i in range(self.backbone.views)})
        return time.perf_counter() - since


def open_backbone(args, text, views):
    """The frozen model: real weights from a folder, or tiny random ones, the same every time."""
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    where = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    if args.backbone != "tiny":
        return Backbone.load(args.backbone, text, views, *where)
    print("warning: no --backbone DIR, so a tiny random one: its features tell where things are, hardly what they are",
          file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        return Backbone.load(tiny_backbone(folder), text, views, *where)


def head(args, task):
    """An untrained flow head without its model, for observations of this layout."""
    from vla_head import VLAFlowHead
    length, width = map(int, task.obs_keys[-1].split("_")[1].split("x"))
    heads = max(args.channels // 32, 1)
    if args.channels % math.lcm(heads, 2):
        raise UserError(f"--channels must be even, from 64 on a multiple of 32, got {args.channels}")
    return VLAFlowHead(length, width, task.obs_dim - length * width, task.action_dim, args.horizon, args.channels,
                       args.blocks, heads, args.flow_steps)
