"""What does one prefix per state save? A random SmolVLM with the head of vla_head.py, prefix shared or not.

    python -m benchmarks.vla                      # 11 M weights on one CPU thread, a minute; benchmarks/vla-11m.json
    python -m benchmarks.vla --size 450m --device cuda        # SmolVLM-500M's sizes in bf16; benchmarks/vla-450m.json

Three ways to draw N chunks for a state: one prefix shared by N x K head steps (vla_head.py), one prefix per candidate,
and one per candidate and step. The ways take turns, because a shared machine's speed drifts. Medians are kept:
of processor time on the CPU, of time on the clock on a GPU.
Not here: learning curves (python vla_head.py), the update as a whole (benchmarks/speed.py).
"""
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from arms.adapters.backbone import Backbone
from logbook import check_numbers, cli, usable_device
from vla_head import VLAFlowHead

SIZES = {"11m": (dict(hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3,
                      image_size=224, patch_size=16),
                 dict(hidden_size=256, intermediate_size=768, num_hidden_layers=10, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=64, vocab_size=512), 2),
         "450m": (dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       image_size=512, patch_size=16),
                  dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
                       num_key_value_heads=5, head_dim=64, vocab_size=49280), 4)}


@dataclass
class Args:
    size: Literal["11m", "450m"] = "11m"  # of the backbone
    device: str = "cpu"                   # cpu or cuda
    threads: int = 1                      # CPU threads
    states: int = 1                       # B
    num_candidates: int = 16              # N
    flow_steps: int = 10                  # K
    repeats: int = 7                      # timed rounds, after one to warm up
    out: str | None = None                # default benchmarks/vla-<size>.json


def build(args):
    """A random backbone of the size and a head of 64 channels on it, bf16 on a GPU."""
    from transformers import SmolVLMConfig, SmolVLMModel
    vision, text, scale = SIZES[args.size]
    text = text | {"model_type": "llama", "pad_token_id": 0}
    config = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=text["vocab_size"] - 1,
                           scale_factor=scale, pad_token_id=0)
    model = SmolVLMModel(config).to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    backbone = Backbone(model, "pick up the pen", views=1)
    return VLAFlowHead(backbone, backbone.length, backbone.width, 9, 7, 10, flow_steps=args.flow_steps).to(args.device)


def ways(policy, args):
    """Seconds of each way once; the last is one of its K steps, times K."""
    n, size, b = args.num_candidates, policy.backbone.size, args.states
    images = torch.randint(0, 256, (b, 1, size, size, 3), dtype=torch.uint8, device=args.device)
    state, noise = torch.randn(b, 9, device=args.device), torch.randn(b, n, 10, 7, device=args.device)
    many = {"images": images.repeat_interleave(n, 0), "state": state.repeat_interleave(n, 0)}

    now = time.perf_counter if args.device == "cuda" else time.process_time

    def clock(call):
        start = now()
        out = call()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return now() - start, out

    prefix, context = clock(lambda: policy.encode({"images": images, "state": state}))
    sample, shared = clock(lambda: policy.sample(context, n, noise))
    copies, context = clock(lambda: policy.encode(many))
    alone, separate = clock(lambda: policy.sample(context, 1, noise.flatten(0, 1)[:, None]))
    assert args.device == "cuda" or (shared.flatten(0, 1) - separate[:, 0]).abs().max() < 1e-4
    return {"prefix": prefix, "shared": prefix + sample, "per_candidate": copies + alone,
            "no_caching": args.flow_steps * copies + alone}


def main():
    args = tyro.cli(Args, description=__doc__)
    check_numbers(args, {})
    args.device = usable_device(args.device).type
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    policy = build(args)
    ways(policy, args)
    rounds = [ways(policy, args) for _ in range(args.repeats)]
    seconds = {name: sorted(one[name] for one in rounds)[args.repeats // 2] for name in rounds[0]}
    weights = sum(one.numel() for one in policy.backbone.model.parameters())
    gains = {name: sorted(one[name] / one["shared"] for one in rounds)[args.repeats // 2]
             for name in ("per_candidate", "no_caching")}
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    report = {"backbone_weights": weights, "head_weights": sum(one.numel() for one in policy.parameters()),
              "prefix_tokens": policy.length, "device": device, "threads": args.threads, "torch": torch.__version__,
              "states": args.states, "num_candidates": args.num_candidates, "flow_steps": args.flow_steps,
              "seconds": seconds, "gain_over_per_candidate": gains["per_candidate"],
              "gain_over_no_caching": gains["no_caching"]}
    out = Path(args.out or f"benchmarks/vla-{args.size}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{weights / 1e6:.1f} M weights, N x K = {args.num_candidates} x {args.flow_steps}: "
          + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
          + f"; sharing is {gains['per_candidate']:.1f} times faster than a prefix per candidate, "
          f"{gains['no_caching']:.0f} times faster than no caching; {out}")


if __name__ == "__main__":
    cli(main)
