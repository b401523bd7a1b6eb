"""What a run's CSV files say of its success: the numbers behind figures and tables.

    running, evaluations = read_run("runs/lift-poco-s0")
    for one in read_series(folders):
        print(one.name, one.label, one.final)

Not here: how it is drawn (figure.py), checks of the files (tables.py).
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .arguments import read_args
from .errors import UserError
from .tables import EVAL_COLUMNS, read_table


class Series(NamedTuple):
    """One method, evaluated in one way: a curve per seed."""

    name: str  # of the folders, without the seed
    collects: str | None  # the way of acting that collects, None where the run does not say
    evaluated: str  # the way of acting that is evaluated
    steps: np.ndarray  # (T,), where all seeds have been evaluated
    success: np.ndarray  # (S, T), in percent

    @property
    def label(self) -> str:
        return acting_label(self.collects, self.evaluated)

    @property
    def final(self) -> float:
        """Return the mean success of the seeds at the end, in percent."""
        return float(self.success[:, -1].mean())


def acting_label(collects: str | None, evaluated: str) -> str:
    """Say which way of acting collected and which was evaluated."""
    if collects is None:
        return f"evaluated: {evaluated}"
    return f"collects: {collects}, evaluated: {evaluated}"


def read_run(folder: str | Path) -> tuple[list, dict]:
    """Read what a run's figures show.

    Returns the running success as [(step, share)], where it was known, and the evaluations as
    {acting: {step: (successes, episodes)}}. Raises UserError for what is no run folder.
    """
    columns, rows = _read_existing(folder, "progress.csv")
    if not columns or columns[0] != "step":
        raise UserError(f"{folder}/progress.csv is damaged (its first column is not step)")
    running = []
    if "success" in columns:
        place = columns.index("success")
        for row in rows:
            if row[place] and math.isfinite(float(row[place])):
                running.append((float(row[0]), float(row[place])))
    columns, rows = _read_existing(folder, "eval.csv")
    if columns != EVAL_COLUMNS:
        wanted = ",".join(EVAL_COLUMNS)
        raise UserError(f"{folder}/eval.csv is damaged (its columns are not {wanted})")
    evaluations = {}
    for step, acting, _, success, _, _ in rows:
        counts = evaluations.setdefault(acting, {})
        successes, episodes = counts.get(float(step), (0, 0))
        counts[float(step)] = (successes + int(success), episodes + 1)
    return running, evaluations


def _read_existing(folder: str | Path, name: str) -> tuple[list[str], list[list[str]]]:
    path = Path(folder) / name
    if not path.exists():
        raise UserError(f"{folder} is not a run folder: it has no {name}")
    return read_table(path)


def read_series(folders: list[Path]) -> list[Series]:
    """Read the evaluations of runs, the seeds of a method together.

    Where none was evaluated on its way, as on an arm, read the success while collecting instead.
    """
    tasks = {str(read_args(folder).get("task")) for folder in folders}
    evaluated = {}  # (name, collects, evaluated): curves (T, 2), one per seed
    collecting = {}
    for folder in folders:
        args = read_args(folder)
        name = re.sub(r"-s\d+$", "", folder.resolve().name)
        if len(tasks) > 1:
            name = f"{args.get('task')}, {name}"
        running, evaluations = read_run(folder)
        for acting, counts in evaluations.items():
            curve = [(step, counts[step][0] / counts[step][1]) for step in sorted(counts)]
            evaluated.setdefault((name, args.get("act"), acting), []).append(curve)
        if running:
            key = (name, args.get("act"), "last 20 episodes")
            collecting.setdefault(key, []).append(running)
    if all(len(curve) < 2 for seeds in evaluated.values() for curve in seeds):
        evaluated = collecting or evaluated
    series = [align(*key, seeds) for key, seeds in evaluated.items()]
    return sorted((one for one in series if len(one.steps)), key=lambda one: one.name)


def align(name: str, collects: str | None, evaluated: str, seeds: list[list]) -> Series:
    """Bring seeds, each a list of (step, share), to common steps.

    Between its own steps a seed is interpolated; a series reaches as far as all its seeds do.
    """
    curves = [np.array(seed) for seed in seeds]  # (T, 2) each
    start = max(curve[0, 0] for curve in curves)
    end = min(curve[-1, 0] for curve in curves)
    steps = sorted({step for curve in curves for step in curve[:, 0] if start <= step <= end})
    success = [100 * np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves]
    return Series(name, collects, evaluated, np.array(steps), np.array(success))


def warmup_end(folder: Path) -> float:
    """Return the last step of a run's critic warm-up, 0 where it has none."""
    columns, rows = read_table(folder / "progress.csv")
    if "warmup" not in columns:
        return 0.0
    place = columns.index("warmup")
    return max((float(row[0]) for row in rows if row[place] in ("1", "1.0")), default=0.0)
