"""Measure what one prefix per state saves: a random SmolVLM under the head of vla_head.py.

    python -m benchmarks.vla                            # 11 M weights, one CPU thread: a minute
    python -m benchmarks.vla --size 450m --device cuda  # SmolVLM-500M's sizes in bf16

N chunks for a state are drawn in three ways: one prefix for all N x K head steps (vla_head.py), one
prefix per candidate, one per candidate and step. The ways take turns, because a shared machine's
speed drifts. Writes runs/vla-<size>.json with medians: processor time on a CPU, time on the clock
on a GPU.
Not here: learning curves (vla_head.py), the update as a whole (benchmarks/speed.py).
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from arms.adapters.backbone import Backbone
from logbook import cli, usable_device
from logbook.options import Count, check_limits
from vla_head import VLAFlowHead

SIZES = {
    "11m": {
        "vision": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": 224,
            "patch_size": 16,
        },
        "text": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 10,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 512,
        },
        "scale_factor": 2,
    },
    "450m": {
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        "text": {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "vocab_size": 49280,
        },
        "scale_factor": 4,
    },
}
STATE, ACTION, HORIZON = 9, 7, 10


@dataclass
class Args:
    size: Literal["11m", "450m"] = "11m"  # of the backbone
    device: str = "cpu"  # cpu or cuda
    threads: Count = 1  # CPU threads
    states: Count = 1  # B
    num_candidates: Count = 16  # N
    flow_steps: Count = 10  # K
    repeats: Count = 7  # timed rounds, after one to warm up
    out: str | None = None  # default runs/vla-<size>.json


def build(args: Args) -> tuple[Backbone, VLAFlowHead]:
    """Build a random backbone of this size, in bf16 on a GPU, and a head on it."""
    from transformers import SmolVLMConfig, SmolVLMModel

    size = SIZES[args.size]
    text = size["text"] | {"model_type": "llama", "pad_token_id": 0}
    config = SmolVLMConfig(
        vision_config=size["vision"],
        text_config=text,
        image_token_id=text["vocab_size"] - 1,
        scale_factor=size["scale_factor"],
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    # bytes stand in for a tokenizer
    backbone = Backbone(SmolVLMModel(config).to(args.device, dtype), "pick up the pen", views=1)
    head = VLAFlowHead(
        backbone.length, backbone.width, STATE, ACTION, HORIZON, flow_steps=args.flow_steps
    )
    return backbone, head.to(args.device)


def timed(args: Args, call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return what a call takes in seconds, and its result."""
    on_gpu = args.device == "cuda"
    now = time.perf_counter if on_gpu else time.process_time
    start = now()
    result = call()
    if on_gpu:
        torch.cuda.synchronize()
    return now() - start, result


def measure(args: Args, backbone: Backbone, head: VLAFlowHead) -> dict[str, float]:
    """Time each way once. No caching is one of its K steps, times K."""
    n = args.num_candidates
    side = backbone.size
    images = torch.randint(
        0, 256, (args.states, 1, side, side, 3), dtype=torch.uint8, device=args.device
    )
    state = torch.randn(args.states, STATE, device=args.device)
    noise = torch.randn(args.states, n, HORIZON, ACTION, device=args.device)
    single = noise.flatten(0, 1)[:, None]
    many_images = images.repeat_interleave(n, 0)
    many_states = state.repeat_interleave(n, 0)

    prefix, obs = timed(args, lambda: backbone.observe(images, state))
    sample, shared = timed(args, lambda: head.sample(head.encode(obs), n, noise))
    copies, many = timed(args, lambda: backbone.observe(many_images, many_states))
    alone, separate = timed(args, lambda: head.sample(head.encode(many), 1, single))
    if args.device == "cpu" and (shared.flatten(0, 1) - separate[:, 0]).abs().max() > 1e-4:
        raise RuntimeError("sharing a prefix changed the chunks")
    return {
        "prefix": prefix,
        "shared": prefix + sample,
        "per_candidate": copies + alone,
        "no_caching": args.flow_steps * copies + alone,
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check_limits(args)
    args.device = usable_device(args.device).type
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backbone, head = build(args)
    measure(args, backbone, head)
    rounds = [measure(args, backbone, head) for _ in range(args.repeats)]
    seconds = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    gains = {
        name: statistics.median(one[name] / one["shared"] for one in rounds)
        for name in ("per_candidate", "no_caching")
    }
    weights = sum(one.numel() for one in backbone.model.parameters())
    processor = platform.processor() or platform.machine()
    report = {
        "backbone_weights": weights,
        "head_weights": sum(one.numel() for one in head.parameters()),
        "prefix_tokens": backbone.length,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor,
        "threads": args.threads,
        "torch": torch.__version__,
        "states": args.states,
        "num_candidates": args.num_candidates,
        "flow_steps": args.flow_steps,
        "seconds": seconds,
        "gain_over_per_candidate": gains["per_candidate"],
        "gain_over_no_caching": gains["no_caching"],
    }
    out = Path(args.out or f"runs/vla-{args.size}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
    print(f"{weights / 1e6:.1f} M weights, {args.num_candidates} x {args.flow_steps}: {times}")
    print(
        f"sharing is {gains['per_candidate']:.1f} times faster than a prefix per candidate, "
        f"{gains['no_caching']:.0f} times faster than no caching; {out}"
    )


if __name__ == "__main__":
    cli(main)
