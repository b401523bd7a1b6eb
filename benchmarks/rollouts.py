"""How many environment steps a second, with their updates: in turn, or with others acting.

    python -m benchmarks.rollouts           # Lift at the cpu preset, 2 minutes
    python -m benchmarks.rollouts --modes 0 1 --preset paper

A mode is a number of rollout workers: 0 acts and learns in turn, 1 acts in one process meanwhile,
4-ray in four actors of a Ray started here. The learner does one update for every step in all of
them, so only the time of acting and of the environment can be saved. Starting is not counted.
Writes runs/rollouts-<preset>.json, or --out.
Not here: what an update costs (benchmarks/speed.py), learning curves.
"""

import contextlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from logbook import Clock, Interrupt, UserError, cli
from logbook.options import Count, CountOrZero, parse
from train_offline import Simulation, setup
from train_online import POCO, Args, Interaction


@dataclass
class Measurement:
    """What to measure."""

    task: str = "lift"  # which task
    preset: Literal["paper", "cpu"] = "cpu"  # whose sizes
    modes: tuple[str, ...] = ("0", "1", "4-ray")  # rollout workers
    steps: Count = 400  # timed environment steps of each mode
    before: CountOrZero = 200  # steps before them, while queues fill
    threads: CountOrZero = 1  # the learner's; 0 leaves the choice to torch
    out: str | None = None  # JSON file; default runs/rollouts-<preset>.json

    kept: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        return {}


def run_arguments(asked: Measurement, mode: str) -> Args:
    """Return the arguments of a run of this mode, without warm-up. Raises UserError."""
    count, _, ray = mode.partition("-")
    if not count.isdigit() or ray not in ("", "ray"):
        raise UserError(
            f"--modes are numbers of workers, with -ray behind for actors of Ray: 0 1 4-ray, not "
            f"{mode}"
        )
    argv = ["--task", asked.task, "--preset", asked.preset, "--warmup-steps", "0"]
    argv += ["--threads", str(asked.threads), "--rollouts", count]
    if ray:
        argv += ["--ray", "local"]
    return parse(Args, argv)


def measure(asked: Measurement, args: Args) -> tuple[float, dict[str, float]]:
    """Return the seconds of the timed steps, in all and per phase."""
    clock = Clock()
    device = setup(args)
    simulation = Simulation(args)
    data = simulation.demonstrations()
    agent = POCO(args, simulation.make_policy(device, data), clock)
    with Interrupt() as interrupt:
        world = Interaction(args, agent, clock, simulation, len(data["obs"]), interrupt)
        with contextlib.closing(world):
            world.start(data)
            advance(world, agent, asked.before, interrupt)
            clock.split()
            start = time.perf_counter()
            advance(world, agent, asked.before + asked.steps, interrupt)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start, clock.split()


def advance(world: Interaction, agent: POCO, steps: int, interrupt: Interrupt) -> None:
    """Act and learn until the world has made so many steps in all."""
    while world.steps < steps:
        if interrupt.stop:
            raise KeyboardInterrupt
        if world.step():
            for batch in world.batches():
                agent.update(batch, warmup=False)


def table(rows: dict[str, dict[str, Any]]) -> str:
    header = (
        "rollouts",
        "env steps/s",
        "ms per step",
        "of which environment or waiting for it",
        "acting",
        "learning",
    )
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for mode, row in rows.items():
        phases = row["phase_ms"]
        learning = sum(phases.get(name, 0.0) for name in ("critic", "e_step", "m_step"))
        numbers = [
            row["env_steps_per_s"],
            row["ms_per_step"],
            phases.get("env", 0.0),
            phases.get("act", 0.0),
            learning,
        ]
        lines.append("| " + " | ".join([mode, *(f"{number:.1f}" for number in numbers)]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    asked = parse(Measurement, argv)
    runs = {mode: run_arguments(asked, mode) for mode in asked.modes}
    rows = {}
    for mode, args in runs.items():
        seconds, phases = measure(asked, args)
        rows[mode] = {
            "env_steps_per_s": asked.steps / seconds,
            "ms_per_step": 1e3 * seconds / asked.steps,
            "phase_ms": {name: 1e3 * value / asked.steps for name, value in phases.items()},
        }
    print(table(rows))
    report = {
        "task": asked.task,
        "preset": asked.preset,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": asked.threads,
        "steps": asked.steps,
        "modes": rows,
    }
    out = Path(asked.out or f"runs/rollouts-{asked.preset}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    cli(main)
