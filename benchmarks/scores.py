"""What the runs of a comparison reached: rows, curves over seeds, the table, the figure.

    from benchmarks.scores import draw, rows_of, table
    rows = [row for job in jobs for row in rows_of(job)]
    print(table(rows))

A row is one evaluation: task, method, acting, seed, step, successes, episodes and the seconds of
stage II before it, evaluations not counted. Here "acting" is the way that was evaluated.
Not here: making the runs (jobs.py).
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.jobs import METHODS, Job
from logbook import UserError, read_run
from logbook.figure import count_of, draw_ranking, finish_axes, new_figure, save_figure
from logbook.series import Series

COLUMNS = ("task", "method", "acting", "seed", "step", "successes", "episodes", "seconds")
HEADER = (
    "method",
    "evaluated",
    "seeds",
    "start %",
    "mean over the run %",
    "end %",
    "95 % bootstrap",
    "worst dip",
    "steps to 90 %",
    "minutes",
)
GOAL = 0.9  # of "steps to 90 %"

Rows = list[dict[str, Any]]


class Curves(NamedTuple):
    """One method, evaluated in one way, on one task: a curve per seed."""

    steps: np.ndarray  # (T,)
    success: np.ndarray  # (S, T), a share
    seconds: np.ndarray  # (T,), mean over the seeds


def rows_of(job: Job) -> Iterator[dict[str, Any]]:
    """Yield a row for every evaluation of a finished run."""
    steps, seconds = seconds_of(job.folder)
    for acting, evaluations in read_run(job.folder)[1].items():
        for step, (successes, episodes) in sorted(evaluations.items()):
            spent = round(float(np.interp(step, steps, seconds)), 1)
            values = (*(job.task, job.method), acting, job.seed, int(step), successes, episodes)
            yield dict(zip(COLUMNS, (*values, spent)))


def seconds_of(folder: Path) -> tuple[list[float], list[float]]:
    """Return steps and the seconds of stage II up to them, evaluations not counted."""
    steps = [0.0]
    seconds = [0.0]
    with open(folder / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            spent = 0.0
            for name, value in row.items():
                if name.startswith("time/") and name != "time/eval" and value:
                    spent += float(value)
            steps.append(float(row["step"]))
            seconds.append(seconds[-1] + spent)
    return steps, seconds


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote. Raises UserError for another file."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} is no table of a comparison: its columns are not {COLUMNS}")
        rows = list(reader)
    for row in rows:
        for name in ("seed", "step", "successes", "episodes"):
            row[name] = int(row[name])
        row["seconds"] = float(row["seconds"])
    return rows


def write_rows(rows: Rows, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def curves(rows: Rows, task: str, method: str, acting: str) -> Curves:
    """Return a method's curves over the steps that all its seeds share.

    Step 0 is that of the bare policy, whatever is evaluated later.
    """
    points = {}
    for row in rows:
        if (row["task"], row["method"]) != (task, method):
            continue
        if row["acting"] == acting or row["step"] == 0:
            share = row["successes"] / row["episodes"]
            points[row["seed"], row["step"]] = (share, row["seconds"])
    seeds = sorted({seed for seed, _ in points})
    shared = [{step for one, step in points if one == seed} for seed in seeds]
    steps = sorted(set.intersection(*shared))
    table = np.array([[points[seed, step] for step in steps] for seed in seeds])  # (S, T, 2)
    return Curves(np.array(steps), table[..., 0], table[..., 1].mean(0))


def interval(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over seeds: values (S,)."""
    pick = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[pick].mean(1), (0.025, 0.975))
    return float(low), float(high)


# ---- the table -----------------------------------------------------------------------------------


def summary(found: Curves) -> list[str]:
    """Return the table's cells after method and acting."""
    steps, success, seconds = found
    widths = np.diff(steps)
    area = ((success[:, 1:] + success[:, :-1]) / 2 * widths).sum(1) / (steps[-1] - steps[0])
    dips = (success[:, :1] - success).max(1)
    band = ""
    if len(success) > 1:  # over one seed there is none
        low, high = interval(success[:, -1])
        band = f"{100 * low:.0f}-{100 * high:.0f}"
    return [
        str(len(success)),
        f"{100 * success[:, 0].mean():.0f}",
        f"{100 * area.mean():.1f}",
        f"{100 * success[:, -1].mean():.0f}",
        band,
        f"{100 * dips.max():.0f}",
        steps_to_goal(steps, success),
        f"{seconds[-1] / 60:.1f}",
    ]


def steps_to_goal(steps: np.ndarray, success: np.ndarray) -> str:
    """Say when the seeds first reached the goal, on average, or how many of them did."""
    reached = [steps[np.argmax(seed >= GOAL)] for seed in success if (seed >= GOAL).any()]
    if not reached:
        return "none"
    if len(reached) < len(success):
        return f"{len(reached)} of {count_of([len(success)], 'seed')}"
    return f"{np.mean(reached):,.0f}"


def table(rows: Rows) -> str:
    """Return a Markdown table: a row for every task, method and evaluated way of acting."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    header = HEADER if len(tasks) == 1 else ("task", *HEADER)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for task in tasks:
        for method, acting in evaluated(rows, task):
            cells = [method, acting, *summary(curves(rows, task, method, acting))]
            if len(tasks) > 1:
                cells.insert(0, task)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluated(rows: Rows, task: str) -> list[tuple[str, str]]:
    """Return methods and their evaluated ways of acting, the delivered one first."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows if row["task"] == task):
        delivered = METHODS[method.split()[0]].delivers
        ways = {
            row["acting"]
            for row in rows
            if (row["task"], row["method"]) == (task, method) and row["step"] > 0
        }
        found += [(method, acting) for acting in sorted(ways, key=lambda one: one != delivered)]
    return found


# ---- the figure ----------------------------------------------------------------------------------


def draw(rows: Rows, path: Path, title: str = "", over_time: bool = False) -> Path:
    """Draw what each method delivers, a panel per task: the best three stand out."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = math.ceil(math.sqrt(len(tasks)))
    height = max(4.4, 1.2 + 0.19 * max(len(delivered(rows, task)) for task in tasks))
    lines = math.ceil(len(tasks) / columns)
    figure, axes = new_figure(7.6 * columns, height * lines, lines, columns)
    panels = np.atleast_1d(axes).ravel()
    for panel, task in zip(panels, tasks):
        draw_panel(panel, rows, task, title or task, over_time)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    return save_figure(figure, path)


def draw_panel(axes: Any, rows: Rows, task: str, title: str, over_time: bool) -> None:
    """Draw one task: a named curve per method, in percent over steps or minutes."""
    series = []
    for method, acting in delivered(rows, task):
        found = curves(rows, task, method, acting)
        x = found.seconds / 60 if over_time else found.steps
        series.append(Series(method, None, acting, x, 100 * found.success))
    draw_ranking(axes, series)
    finish_axes(axes)
    axes.set_ylabel("success (%)")
    axes.set_xlabel("minutes of stage II, without evaluation" if over_time else "environment steps")
    seeds = sorted({len(one.success) for one in series})
    shown = f"{title}, {count_of(seeds, 'seed')}"
    if seeds[-1] >= 3:
        shown += ": mean; band of the best three from lowest to highest"
    axes.set_title(shown, fontsize=11)


def delivered(rows: Rows, task: str) -> list[tuple[str, str]]:
    """Return each method with the way of acting that it delivers."""
    return [
        (method, acting)
        for method, acting in evaluated(rows, task)
        if acting == METHODS[method.split()[0]].delivers
    ]
