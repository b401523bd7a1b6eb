"""Compare methods like with like: same demonstrations, stage I and evaluation episodes, seeds.

    python -m benchmarks.compare --tasks lift --methods poco,qc,qc-fql,rlpd-ac,dsrl-na --seeds 3
    python -m benchmarks.compare --tasks can,square,cube-double --methods poco,qc --seeds 3
    python -m benchmarks.compare --tasks lift --methods "poco,poco --clip inf,poco --act posterior"
    python -m benchmarks.compare --tasks lift --ablation clip      # or guidance, candidates ...
    python -m benchmarks.compare --tasks lift --online-steps 6000  # unknown flags go to every run
    python -m benchmarks.compare --table benchmarks/results/compare-lift.csv     # draws it again

A run takes 10 to 45 minutes on one core. Runs go to runs/<task>-<method>-s<seed>/ and start from
runs/<task>-bc-s<seed>/, trained if it is missing; two at a time, one thread each. A finished run is
skipped and an interrupted one continued, so the same command picks up where it stopped, adds tasks,
methods and seeds. A run that was made with other flags is refused. With --finished it shows what is
there. An ablation is POCO with several values of one argument; "poco" is the preset's own value.
Writes --out .csv, .md (the table), .png (over environment steps) and -time.png (over minutes); by
default runs/compare-<tasks> or runs/<ablation>-<tasks>.
Not here: behaviour cloning as a run (it is step 0 of the others), why a method loses (oracle.py).
"""

import argparse
import sys
from pathlib import Path

import envs
import train_online
from benchmarks.fairness import (
    names_of,
    refuse_other_flags,
    refuse_other_value,
    refuse_unfair,
)
from benchmarks.jobs import METHODS, Job, finished, run_all
from benchmarks.scores import Rows, draw, read_rows, rows_of, table, write_rows
from logbook import UserError, cli
from logbook.options import option, parse

# POCO's arguments and their values: the paper's Figs. 9 and 10, and two more.
ABLATIONS = {
    "clip": ("clip", (0.0, 0.15, 0.3, 0.6, float("inf"))),
    "guidance": ("guidance", (0.0, 0.1, 1.0, 3.0, 10.0)),
    "candidates": ("num_candidates", (4, 16, 64)),
    "temperature": ("temperature", (0.0001, 0.001, 0.01, 0.1, 1.0)),
}
OF_EACH_RUN = ("task", "seed", "run_dir", "resume", "eval", "overwrite")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", default="lift", help="separated by commas, default lift")
    parser.add_argument(
        "--methods",
        help=f"of {', '.join(METHODS)}; each may carry flags of its own; default poco,qc",
    )
    parser.add_argument(
        "--ablation",
        choices=ABLATIONS,
        help="instead of --methods: POCO with several values of this argument",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, default 3")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, default 2")
    parser.add_argument("--out", help="where the results go, without an ending")
    parser.add_argument(
        "--finished", action="store_true", help="run nothing: show the finished runs alone"
    )
    parser.add_argument("--table", help="run nothing: print and draw this .csv again")
    return parser


def read_command(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the comparison's own arguments and the flags of every run."""
    args, flags = build_parser().parse_known_args(argv)
    for name in ("seeds", "parallel"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {vars(args)[name]}")
    if args.ablation and args.methods:
        raise UserError("--ablation chooses the methods itself: leave --methods out")
    args.tasks = args.tasks.split(",")
    args.methods = [" ".join(one.split()) for one in (args.methods or "poco,qc").split(",")]
    refuse_unknown(args.tasks, envs.TASKS, "task")
    refuse_unknown([(one.split() or [""])[0] for one in args.methods], METHODS, "method")
    given = [*flags, *" ".join(args.methods).split()]
    for name in names_of(given):
        if name in OF_EACH_RUN:
            raise UserError(
                f"each run has its own {option(name)}: leave it out (for tasks and seeds there are "
                "--tasks, --seeds and --first-seed; to repeat a run remove its folder)"
            )
    for name in ("threads", "workers"):
        if name not in names_of(given):
            flags += [option(name), "1"]
    return args, flags


def refuse_unknown(names: list[str], table: dict, kind: str) -> None:
    for name in names:
        if name not in table:
            raise UserError(f"unknown {kind} '{name}'; {kind}s: {', '.join(table)}")


def ablation(name: str, task: str, flags: list[str]) -> tuple[list[str], float]:
    """Return POCO with each value, in order, and the preset's own value.

    The preset's own value needs no flag: it is plain poco's run.
    """
    field, values = ABLATIONS[name]
    if field in names_of(flags):
        raise UserError(f"--ablation {name} sets {option(field)} itself: leave it out")
    own = vars(parse(train_online.Args, ["--task", task, *flags]))[field]
    methods = []
    for value in sorted({*values, own}):
        methods.append("poco" if value == own else f"poco {option(field)} {value:g}")
    return methods, own


def jobs_of(args: argparse.Namespace, flags: list[str]) -> list[Job]:
    """List the runs: all tasks and methods of a seed before the next seed."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    methods = {task: args.methods for task in args.tasks}
    if args.ablation:
        methods = {task: ablation(args.ablation, task, flags)[0] for task in args.tasks}
    jobs = [
        Job(task, method, seed) for seed in seeds for task in args.tasks for method in methods[task]
    ]
    if args.finished:
        jobs = [job for job in jobs if finished(job.folder)]
        if not jobs:
            raise UserError("none of these runs is finished; without --finished they are made")
    return jobs


def refuse_wrong_runs(args: argparse.Namespace, flags: list[str], jobs: list[Job]) -> None:
    """Refuse runs that are there and are not those of this command."""
    for job in jobs:
        if args.ablation and job.method == "poco":
            field, _ = ABLATIONS[args.ablation]
            _, own = ablation(args.ablation, job.task, flags)
            refuse_other_value(job.folder, field, own)
        if not args.finished:
            refuse_other_flags(job, flags)


def show(rows: Rows, out: Path, title: str) -> None:
    """Print the table, and write it with its figures."""
    text = table(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.md").write_text(text + "\n")
    draw(rows, out.with_name(f"{out.name}.png"), title)
    draw(rows, out.with_name(f"{out.name}-time.png"), title, over_time=True)
    print(f"{text}\n{out}.md, .png, -time.png")


def main(argv: list[str] | None = None) -> None:
    args, flags = read_command(sys.argv[1:] if argv is None else argv)
    if args.table:
        path = Path(args.table)
        show(read_rows(path), Path(args.out) if args.out else path.with_suffix(""), title="")
        return
    jobs = jobs_of(args, flags)
    refuse_wrong_runs(args, flags, jobs)
    if not args.finished and not run_all(jobs, flags, args.parallel):
        print("interrupted; the same command continues")
        return
    for task in args.tasks:
        of_task = [job for job in jobs if job.task == task]
        if of_task:
            refuse_unfair(of_task, args.ablation is not None)
    rows = [row for job in jobs for row in rows_of(job)]
    out = Path(args.out or f"runs/{args.ablation or 'compare'}-{'-'.join(args.tasks)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(rows, out.with_name(f"{out.name}.csv"))
    show(rows, out, title_of(args, flags))


def title_of(args: argparse.Namespace, flags: list[str]) -> str:
    """Return the title of an ablation's figure; otherwise each panel is named by its task."""
    if not args.ablation:
        return ""
    named = []
    for task in args.tasks:
        _, own = ablation(args.ablation, task, flags)
        named.append(f"{task} {own:g}")
    return f"{args.ablation} (poco: {', '.join(named)})"


if __name__ == "__main__":
    cli(main)
