"""Comparing runs of different settings is the mistake that this file prevents.

    from benchmarks.fairness import refuse_other_flags, refuse_unlike
    refuse_unlike(folders, SHARED)     # UserError: the runs differ in preset: cpu in ..., paper in

Checks runs made earlier against the flags of this comparison, and all of them against each other.
Not here: the comparison itself (compare.py).
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.jobs import METHODS, Job, finished
from logbook import UserError, read_args
from logbook.options import option, parse
from train_offline import resolve_preset

# The same in all methods.
SHARED = (
    "preset",
    "setting",
    "data",
    "demo_episodes",
    "hidden",
    "layers",
    "flow_steps",
    "batch_size",
    "pretrain_steps",
    "learning_rate",
    "episode_limit",
    "reward_offset",
    "discount",
    "pessimism",
    "tau",
    "capacity",
    "warmup_steps",
    "online_steps",
    "updates_per_step",
    "online_learning_rate",
    "critic_learning_rate",
    "eval_every",
    "eval_episodes",
    "final_episodes",
)
# The same in all methods but those with a value of their own.
MOSTLY = ("horizon", "normalize", "heads", "policy_tau", "demo_share")
# The same in all runs of an ablation.
OF_POCO = (
    "act",
    "num_candidates",
    "particles",
    "temperature",
    "guidance",
    "clip",
    "heads",
    "policy_tau",
)
# These change no result, or hardly.
HARMLESS = ("threads", "workers", "device", "precision", "video", "overwrite")
# What one run of a method may have and another not.
OF_A_RUN = (
    *HARMLESS,
    "seed",
    "run_dir",
    "resume",
    "eval",
    "checkpoint",
    "log_every",
    "save_every",
    "graph",
    "ray",
)


def names_of(flags: Iterable[str]) -> list[str]:
    """Name the arguments that flags set: --no-normalize --heads=5 -> heads, normalize."""
    names = []
    for flag in flags:
        if flag.startswith("--"):
            name = flag.removeprefix("--").split("=")[0].replace("-", "_")
            names.append(name.removeprefix("no_"))
    return sorted(names)


def arguments_of(job: Job, flags: list[str]) -> Any:
    """Parse the arguments that this job would be started with."""
    module = importlib.import_module(job.kind.module)
    argv = ["--task", job.task, "--seed", str(job.seed)]
    args = parse(module.Args, [*argv, *job.kind.flags, *job.own_flags, *flags])
    args.preset = resolve_preset(args.preset)[0]
    return args


def refuse_other_flags(job: Job, flags: list[str]) -> None:
    """Refuse a run that is there and was made with other flags: it must not pass for this one."""
    if not finished(job.folder) and not job.begun:
        return
    stored = read_args(job.folder)
    asked = vars(arguments_of(job, flags))
    for name in names_of([*job.kind.flags, *job.own_flags, *flags]):
        if name in HARMLESS or name not in stored or name not in asked:
            continue
        if not same_setting(name, stored[name], asked[name]):
            raise UserError(
                f"{job.folder} was made with {name} {stored[name]}, not {asked[name]}: move it "
                f"away, or leave {option(name)} out"
            )


def same_setting(name: str, stored: Any, asked: Any) -> bool:
    if name == "data" and stored is not None and asked is not None:
        return Path(stored) == Path(asked).expanduser()
    return stored == asked


def refuse_other_value(folder: Path, name: str, value: float) -> None:
    """In an ablation plain poco stands for the preset's own value: refuse a run with another."""
    if not (folder / "args.json").exists():
        return
    stored = read_args(folder).get(name, value)
    if stored != value:
        raise UserError(
            f"{folder} was made with {name} {stored}, not with the preset's {value}: move it away"
        )


def refuse_unfair(jobs: list[Job], is_ablation: bool) -> None:
    """Refuse to compare these runs of one task if they differ in what is not compared."""
    methods = list(dict.fromkeys(job.method for job in jobs))
    compared = {name for method in methods for name in names_of(method.split())}
    names = set(SHARED) | set(OF_POCO if is_ablation else ())
    refuse_unlike([job.folder for job in jobs], names - compared)
    for name in set(MOSTLY) - compared:
        folders = [job.folder for job in jobs if not has_its_own(job.method, name)]
        refuse_unlike(folders, known(folders) & {name})
    for method in methods:  # a folder's name does not tell the flags that all runs were given
        folders = [job.folder for job in jobs if job.method == method]
        refuse_unlike(folders, known(folders) - set(OF_A_RUN))


def refuse_unlike(folders: list[Path], names: Iterable[str]) -> None:
    """Refuse runs that differ in one of these arguments."""
    for name in sorted(names):
        found = {setting_of(folder, name): folder for folder in folders}
        if len(found) > 1:
            listed = ", ".join(f"{value} in {folder}" for value, folder in found.items())
            raise UserError(f"the runs differ in {name}: {listed}; move the old ones away")


def known(folders: list[Path]) -> set[str]:
    """Return the arguments that all these runs have stored."""
    stored = [set(read_args(folder)) for folder in folders]
    return set.intersection(*stored) if stored else set()


def has_its_own(method: str, name: str) -> bool:
    """Say whether a method declares an argument of the loop anew.

    The published FQL and RLPD are of single actions, so their horizon is their own as well.
    """
    variant = method.split()[0]
    declared = vars(importlib.import_module(METHODS[variant].module).Args)["__annotations__"]
    if name == "horizon" and variant in ("fql", "rlpd"):
        return True
    return name in declared


def setting_of(folder: Path, name: str) -> str:
    """Return an argument of a run as text, the same for 1 and 1.0 and for data of any seed."""
    args = read_args(folder)
    value = args.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).replace(f"-s{args.get('seed')}.", ".")  # data made here: a file per seed
