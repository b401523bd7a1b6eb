"""How fast is one POCO update, and what share of the processor's own matrix-product rate is that?

    python -m benchmarks.speed                    # paper size, a minute; writes benchmarks/speed-paper.json
    python -m benchmarks.speed --preset cpu

The product rate is measured in the same run, between the updates, because the speed of a shared machine drifts.
Not here: learning curves (python -m logbook RUN_DIR), simulator speed.
"""
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from logbook import Clock
from replay import Batch
from train_offline import make_policy, preset_defaults, setup
from train_online import POCO, Args


@dataclass
class Speed:
    preset: Literal["paper", "cpu"] = "paper"  # whose sizes to measure
    updates: int = 20                          # timed updates, after 3 to warm up
    threads: int = 0                           # CPU threads; 0 leaves torch's own choice
    out: str | None = None                     # JSON file; default benchmarks/speed-<preset>.json


def network_flops(args, inputs, outputs):
    """Multiply-adds of one forward row through an MLP, times two."""
    return 2 * (inputs * args.hidden + (args.layers - 1) * args.hidden ** 2 + args.hidden * outputs)


def update_flops(args, obs_dim, action_dim):
    """Matrix-product work of one update; a backward pass costs twice the forward."""
    cells, rows = args.horizon * action_dim, args.batch_size * args.num_candidates
    policy = network_flops(args, obs_dim + cells + 1, cells)
    critic = args.heads * network_flops(args, obs_dim + cells, 1)
    return {"e_step": rows * args.flow_steps * policy + rows * critic,
            "m_step": 3 * (rows + args.batch_size) * policy,
            "critic": args.batch_size * (args.flow_steps * policy + 4 * critic)}


def matmul_rate(args, device, dtype, repeats=30):
    """FLOP/s of a plain product of the E-step's shape, rows limited to 8192."""
    rows = min(args.batch_size * args.num_candidates, 8192)
    a = torch.randn(rows, args.hidden, device=device, dtype=dtype)
    b = torch.randn(args.hidden, args.hidden, device=device, dtype=dtype)
    for _ in range(3):
        a @ b
    start = finish(device)
    for _ in range(repeats):
        a @ b
    return 2 * rows * args.hidden ** 2 * repeats / (finish(device) - start)


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main():
    speed = tyro.cli(Speed, description=__doc__)
    args = preset_defaults(Args, "lift", speed.preset)
    args.preset, args.threads = speed.preset, speed.threads
    device = setup(args)
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    policy, clock = make_policy(args, device), Clock()
    agent = POCO(args, policy, clock)
    size, obs_dim, action_dim = args.batch_size, len(policy.obs_mean), policy.action_dim
    batch = Batch(torch.randn(size, obs_dim), torch.rand(size, args.horizon, action_dim) * 2 - 1,
                  torch.ones(size, args.horizon), torch.rand(size), torch.full((size,), 0.95),
                  torch.randn(size, obs_dim))
    batch = Batch(*(value.to(device) for value in batch))
    for _ in range(3):
        agent.update(batch, warmup=False)
    clock.split()
    seconds, rates = [], []
    for _ in range(speed.updates):
        rates.append(matmul_rate(args, device, dtype))
        start = finish(device)
        agent.update(batch, warmup=False)
        seconds.append(finish(device) - start)
    phases = {name: value / speed.updates for name, value in clock.split().items()}
    flops = update_flops(args, obs_dim, action_dim)
    median = sorted(seconds)[len(seconds) // 2]
    rate = sorted(rates)[len(rates) // 2]
    share = sorted(sum(flops.values()) / s / r for s, r in zip(seconds, rates))[len(seconds) // 2]
    report = {"preset": speed.preset, "device": device.type, "machine": platform.processor() or platform.machine(),
              "threads": torch.get_num_threads(), "torch": torch.__version__, "precision": args.precision,
              "update_seconds": median, "updates_per_second": 1 / median, "phase_seconds": phases,
              "gflop_per_update": sum(flops.values()) / 1e9, "matmul_gflops": rate / 1e9, "share_of_matmul_rate": share}
    print(f"{report['gflop_per_update']:.0f} GFLOP per update, {1e3 * median:.1f} ms: {1 / median:.2f} updates/s")
    for name, value in phases.items():
        print(f"  {name:8s} {1e3 * value:8.1f} ms   {flops[name] / value / 1e9:7.0f} GFLOP/s")
    print(f"{args.precision} matrix product {rate / 1e9:.0f} GFLOP/s; the whole update: {100 * share:.0f} % of it")
    out = Path(speed.out or f"benchmarks/speed-{speed.preset}.json")
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
