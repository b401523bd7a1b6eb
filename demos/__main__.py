"""python -m demos --task lift --episodes 20 --seed 0 --out demos/lift.hdf5"""
from dataclasses import dataclass

import tyro

import demos


@dataclass(frozen=True)
class Args:
    task: str  # see envs.TASKS
    out: str  # the file to write
    episodes: int = 20  # successful demonstrations to keep
    seed: int = 0
    workers: int = 1  # processes; the file does not depend on it


if __name__ == "__main__":
    args = tyro.cli(Args)
    demos.collect(args.task, args.episodes, args.seed, args.out, args.workers)
