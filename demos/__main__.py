"""
Make demonstrations, or check that a file and the simulator on this machine agree.

    python -m demos --task can --episodes 50 --out can.hdf5 --workers 2   # scripted experts of ours
    python -m demos --task scene --out scene.npz                          # OGBench's play: its oracles' random errands
    python -m demos --task scene --out scene.npz --directed               # its oracles sent to the task's goal (ours)
    python -m demos --check can --data can.hdf5                           # replay them, compare every step
    python -m demos --check can                                           # the file that training would find

Training makes, finds or downloads its demonstrations by itself; this is for looking, sharing and doubting.
"""
import sys
from dataclasses import dataclass

import tyro

import demos
import envs
from demos.check import check, newest


@dataclass(frozen=True)
class Args:
    task: str | None = None  # make demonstrations of this task; envs.TASKS has the names
    out: str | None = None  # the file to write
    episodes: int | None = None  # demonstrations to keep (default 20), or to check (default 5)
    seed: int = 0  # the same seed makes the same file
    workers: int = 1  # processes; the file does not depend on it
    directed: bool = False  # OGBench's tasks: demonstrations of the task, as the cpu preset makes, instead of play
    check: str | None = None  # check demonstrations of this task instead
    data: str | None = None  # the file to check; default: the downloaded one, else the newest in data/


def main(args: Args) -> None:
    if args.check is not None and (args.task or args.out or args.directed):
        raise ValueError("--check makes nothing: it looks at --data; leave out --task, --out and --directed")
    if args.check is not None:
        path, episodes = args.data or newest(args.check), 5 if args.episodes is None else args.episodes
        print(f"{path}: {check(args.check, path, episodes)}. File and simulator agree.")
    elif args.task is None or args.out is None:
        raise ValueError("say what to make, --task TASK --out FILE, or what to check, --check TASK")
    elif args.data is not None:
        raise ValueError(f"--data names a file to check; the file to write is --out, here {args.out}")
    elif args.directed and envs.get_task(args.task).suite != "ogbench":
        raise ValueError(f"--directed is for OGBench's tasks: those of {args.task} always head for the goal")
    else:
        episodes = 20 if args.episodes is None else args.episodes
        demos.collect(args.task, episodes, args.seed, args.out, args.workers, directed=args.directed)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
