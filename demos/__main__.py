"""Make demonstrations, check a file against the simulator, or write a run's episodes.

    python -m demos --task can --episodes 50 --out can.hdf5 --workers 2    # scripted experts
    python -m demos --task scene --out scene.npz               # OGBench's play: random errands
    python -m demos --task scene --out scene.npz --directed    # errands that serve the task (ours)
    python -m demos --check --task can --data can.hdf5         # replay them, compare every step
    python -m demos --check --task can                         # the file that training would find
    python -m demos --from-run runs/lift-poco-s0 --out more.npz    # what a run played

Training makes, finds or downloads its demonstrations by itself; this is for looking and sharing.
"""

from dataclasses import dataclass

import tyro

import demos
import envs
from demos.check import check, describe, newest
from demos.from_run import export
from logbook import UserError, cli, user_errors


@dataclass(frozen=True)
class Args:
    """What can be asked."""

    task: str | None = None  # a task of the table, or module:Id-v0 of a gymnasium environment
    out: str | None = None  # the file to write
    episodes: int | None = None  # demonstrations to keep (default 20), or to check (default 5)
    seed: int = 0  # the same seed makes the same file
    workers: int = 1  # processes; the file does not depend on it
    directed: bool = False  # OGBench's tasks: demonstrations of the task instead of play
    check: bool = False  # check a file instead
    data: str | None = None  # the file to check; default: the public one, or the newest in data/
    obs_keys: tuple[str, ...] = ()  # observations of an HDF5 file, in this order
    filter_key: str | None = None  # check the demonstrations of this mask of an HDF5 file
    from_run: str | None = None  # write the episodes that this run played


def main(args: Args) -> None:
    if args.from_run is not None:
        write_run(args)
    elif args.check:
        check_file(args)
    else:
        make_file(args)


def write_run(args: Args) -> None:
    if args.out is None:
        raise UserError("say where to write: --out FILE.npz or FILE.hdf5")
    print(f"{export(args.from_run, args.out)}: the steps that {args.from_run} played")


def check_file(args: Args) -> None:
    if args.out is not None or args.directed:
        raise UserError("--check makes nothing: it looks at --data; leave out --out and --directed")
    if args.task is None:
        raise UserError("say which task the file is of: --check --task TASK --data FILE")
    path = args.data or newest(args.task)
    episodes = 5 if args.episodes is None else args.episodes
    report = check(args.task, path, episodes, args.obs_keys, args.filter_key)
    print(describe(args.task, path, args.obs_keys, args.filter_key))
    if report.steps:
        print(f"{report}. File and simulator agree.")
    else:
        print("It holds neither states nor seeds, so its actions cannot be replayed.")


def make_file(args: Args) -> None:
    if args.task is None or args.out is None:
        raise UserError(
            "say what to make, --task TASK --out FILE, or what to check, --check --task TASK"
        )
    if args.data is not None:
        raise UserError(
            f"--data names a file to check; the file to write is --out, here {args.out}"
        )
    if args.directed and envs.get_task(args.task).suite != "ogbench":
        raise UserError(
            f"--directed is for OGBench's tasks: those of {args.task} always head for the goal"
        )
    episodes = 20 if args.episodes is None else args.episodes
    demos.collect(args.task, episodes, args.seed, args.out, args.workers, directed=args.directed)


def run() -> None:
    args = tyro.cli(Args, description=__doc__)
    with user_errors():
        main(args)


if __name__ == "__main__":
    cli(run)
