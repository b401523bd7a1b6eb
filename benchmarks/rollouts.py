"""How many environment steps a second, with their updates: in turn, one process acting, four Ray actors.

    python -m benchmarks.rollouts           # Lift at the cpu preset, 2 minutes; writes benchmarks/rollouts-cpu.json
    python -m benchmarks.rollouts --modes 0 1 --preset paper

A mode is a number of rollout workers, with -ray for actors of a Ray started here. The learner does one update for every
step in all of them, so what can be won is the time that acting and the environment take. Starting is not counted.
Not here: what an update costs (benchmarks/speed.py), learning curves.
"""
import contextlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import envs
from logbook import Clock, UserError, check_numbers, cli
from train_offline import demonstrations, make_policy, preset_defaults, setup
from train_online import POCO, Args, Interaction


@dataclass
class Speed:
    task: str = "lift"                         # which task
    preset: Literal["paper", "cpu"] = "cpu"    # whose sizes to measure
    modes: tuple[str, ...] = ("0", "1", "4-ray")  # rollout workers
    steps: int = 400                           # timed environment steps of each mode
    threads: int = 1                           # the learner's; 0 leaves torch's own choice
    before: int = 200                          # steps before them, while queues fill
    out: str | None = None                     # JSON file; default benchmarks/rollouts-<preset>.json


def measure(speed, mode):
    """Seconds of the timed steps, in all and per phase."""
    args, clock = preset_defaults(Args, speed.task, speed.preset), Clock()
    count, _, ray = mode.partition("-")
    args.preset, args.rollouts, args.ray, args.warmup_steps = speed.preset, int(count), "local" if ray else None, 0
    args.threads = speed.threads
    device, data = setup(args), demonstrations(args)
    agent = POCO(args, make_policy(args, device, data), clock)
    with contextlib.closing(Interaction(args, agent, clock, len(data["obs"]))) as world:
        world.start(data)
        while world.steps < speed.before + speed.steps:
            if world.steps == speed.before:
                clock.split()
                start = time.perf_counter()
            world.step()
            for batch in world.batches():
                agent.update(batch, warmup=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, clock.split()


def main():
    speed, rows = tyro.cli(Speed, description=__doc__), {}
    check_numbers(speed, {"threads": 0})
    if speed.task not in envs.TASKS:
        raise UserError(f"unknown task '{speed.task}'; tasks: {', '.join(envs.TASKS)}")
    if wrong := [mode for mode in speed.modes if not mode.removesuffix("-ray").isdigit()]:
        raise UserError(f"--modes are numbers of workers, as actors of Ray with -ray behind: 0 1 4-ray, not {wrong[0]}")
    for mode in speed.modes:
        seconds, phases = measure(speed, mode)
        rows[mode] = {"env_steps_per_s": speed.steps / seconds, "ms_per_step": 1e3 * seconds / speed.steps,
                      "phase_ms": {name: 1e3 * value / speed.steps for name, value in phases.items()}}
    print("| rollouts | env steps/s | ms per step | of which environment or waiting for it | acting | learning |")
    print("|---" * 6 + "|")
    for mode, row in rows.items():
        env, act, *rest = (row["phase_ms"].get(name, 0.0) for name in ("env", "act", "critic", "e_step", "m_step"))
        print(f"| {mode} | {row['env_steps_per_s']:.1f} | {row['ms_per_step']:.1f} | {env:.1f} | {act:.1f} | "
              f"{sum(rest):.1f} |")
    report = {"task": speed.task, "preset": speed.preset, "machine": platform.processor() or platform.machine(),
              "cores": os.cpu_count(), "torch": torch.__version__, "threads": speed.threads,
              "steps": speed.steps, "modes": rows}
    out = Path(speed.out or f"benchmarks/rollouts-{speed.preset}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli(main)
