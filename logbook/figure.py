"""Figures of success over environment steps, drawn from the runs' CSV files alone.

    python -m logbook runs/lift-poco-s0                     # one run: its own curve.png
    python -m logbook runs/lift-poco-s* runs/lift-qc-s*     # several: seeds together, ./curves.png
    python -m logbook --grid --out results.png RUN ...      # a panel per task
    from logbook.figure import draw, draw_grid

A second each. Folders whose names differ only in the seed (-s0, -s1 ...) are seeds of one method:
three and more become a mean and a band from the lowest to the highest, fewer are drawn singly.
Not here: training scalars (TensorBoard shows those), tables (benchmarks/summary.py).
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import read_args
from .checkpoints import replacing
from .errors import UserError, reason
from .intervals import wilson
from .series import Series, acting_label, read_run, read_series, warmup_end

# Okabe and Ito: colour-blind eyes tell them apart.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
PALETTE = [BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
COLORS = {"policy": BLUE, "posterior": ORANGE}  # by the way of acting that is evaluated
STYLES = ["-", "--", ":", "-."]
MARKERS = ["o", "s", "^", "D"]
BAND = 3  # seeds from which on a band is drawn
LINE = 0.19  # inches between two names at the right


def curve(folder: str | Path) -> Path:
    """Draw a finished run's curve.png and return its path.

    A picture is not worth a run: where it cannot be drawn, say why and return the folder.
    """
    try:
        return draw([folder])
    except Exception as error:  # matplotlib, its settings or the disk
        print(f"{folder}/curve.png was not drawn: {reason(error)}", file=sys.stderr, flush=True)
        return Path(folder)


def draw(folders: list[str | Path], out: str | Path | None = None) -> Path:
    """Draw one folder's curve.png, or several folders as ./curves.png. `out` is another place.

    Returns the picture's path. Raises UserError for what is no run folder.
    """
    folders = [Path(folder) for folder in folders]
    if len(folders) == 1:
        path = folders[0] / "curve.png"
        figure, axes = new_figure(7.2, 4.4)
        draw_run(axes, folders[0])
    else:
        path = Path("curves.png")
        series = read_series(folders)
        is_ranking = len(series) > len(STYLES)  # with the methods' names at the right
        figure, axes = new_figure(9.2 if is_ranking else 7.2, max(4.4, 1.2 + LINE * len(series)))
        draw_runs(axes, folders, series)
    finish_axes(axes)
    axes.set_ylabel("success (%)")
    add_legend(figure, [axes])
    return save_figure(figure, out or path)


def draw_grid(folders: list[str | Path], out: str | Path, columns: int = 4) -> Path:
    """Draw several tasks as one figure, a panel each, in the order of the folders.

    Returns the picture's path. Raises UserError for what is no run folder.
    """
    tasks = {}
    for folder in folders:
        tasks.setdefault(str(read_args(folder).get("task")), []).append(Path(folder))
    columns = min(columns, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = new_figure(3.1 * columns, 2.5 * rows + 0.5, rows, columns)
    axes = np.atleast_1d(axes).ravel()
    for panel, (task, members) in zip(axes, tasks.items()):
        draw_task(panel, task, members)
    for panel in axes[::columns]:
        panel.set_ylabel("success (%)")
    for panel in axes[len(tasks) :]:
        panel.set_axis_off()
    note = "Mean of the seeds,\nband from the lowest to the highest"
    spare = axes[-1] if len(axes) > len(tasks) else None
    add_legend(figure, axes[: len(tasks)], note, inside=spare)
    return save_figure(figure, out)


# ---- what is drawn -------------------------------------------------------------------------------


def draw_task(panel: Any, task: str, folders: list[Path]) -> None:
    """Draw one task's runs as a panel of the grid. Its title says who collected, if all agree."""
    series = read_series(folders)
    seeds = sorted({len(one.success) for one in series})
    title = f"{task} ({count_of(seeds, 'seed')})"
    collectors = {one.collects for one in series}
    agree = len(collectors) == 1
    if agree and None not in collectors:
        title += f"\ncollects: {collectors.pop()}"
    draw_series(panel, series, COLORS, say_collects=not agree)
    shade_warmup(panel, folders)
    finish_axes(panel)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(step_label(folders))


def draw_run(axes: Any, folder: Path) -> None:
    """Draw one run: its evaluations with 95 % intervals, and its success while collecting."""
    args = read_args(folder)
    running, evaluations = read_run(folder)
    if running:
        steps, shares = zip(*running)
        percent = 100 * np.array(shares)
        label = "while collecting, last 20 episodes"
        axes.plot(steps, percent, color="0.6", linewidth=1.2, zorder=1, label=label)
    draw_start(axes, args, evaluations)
    shade_warmup(axes, [folder])
    last = max((step for counts in evaluations.values() for step in counts), default=0)
    for index, (acting, found) in enumerate(sorted(evaluations.items())):
        steps = np.array(sorted(found))
        counts = np.array([found[step] for step in steps])  # (T, 2)
        rate = 100 * counts[:, 0] / counts[:, 1]
        low, high = 100 * np.array([wilson(*pair) for pair in counts]).T
        axes.errorbar(
            steps + 0.006 * last * index,  # so that the two ways' intervals stand side by side
            rate,
            yerr=np.stack([rate - low, high - rate]),
            fmt="o-",
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            color=COLORS.get(acting, GREEN),
            label=f"{acting_label(args.get('act'), acting)} (95 % interval)",
        )
    axes.set_xlabel(step_label([folder]))
    words = [args.get("task"), args.get("method"), f"seed {args.get('seed')}"]
    words.append(f"preset {args.get('preset')}")
    axes.set_title(", ".join(map(str, words)), fontsize=11)


def draw_start(axes: Any, args: dict[str, Any], evaluations: dict) -> None:
    """Draw where stage II began: the success of its first policy as a dashed line."""
    counts = evaluations.get("policy", {}).get(0)
    if counts is None or args.get("method") == "bc":
        return
    method = str(args.get("method"))
    untrained = args.get("setting") == "online" or method.startswith("rlpd")
    name = "untrained" if untrained else "behaviour cloning"
    percent = 100 * counts[0] / counts[1]
    style = {"color": "0.3", "linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 0}
    axes.axhline(percent, label=f"{name}, {percent:.0f} %", **style)


def draw_runs(axes: Any, folders: list[Path], series: list[Series]) -> None:
    """Draw the series of several runs: up to four with a legend, more as a ranking."""
    if len(series) <= len(STYLES):
        draw_series(axes, series, COLORS)
    else:
        draw_ranking(axes, series)
    shade_warmup(axes, folders)
    axes.set_xlabel(step_label(folders))
    tasks = sorted({str(read_args(folder).get("task")) for folder in folders})
    seeds = sorted({len(one.success) for one in series})
    title = f"{' and '.join(tasks)}, {count_of(seeds, 'seed')}"
    if seeds and seeds[-1] >= BAND:
        title += ": mean, band from the lowest to the highest"
    axes.set_title(title, fontsize=11)


def draw_series(
    axes: Any, series: list[Series], colors: dict[str, str], say_collects: bool = True
) -> None:
    """Draw few series: a colour per evaluated way of acting, a line style per method.

    The legend names the methods only where the ways of acting do not tell them apart.
    """
    names = list(dict.fromkeys(one.name for one in series))
    labels = [acting_label(one.collects if say_collects else None, one.evaluated) for one in series]
    is_clear = len(set(labels)) == len(labels)
    spare = iter([color for color in PALETTE if color not in colors.values()] * len(series))
    colors = dict(colors)
    for one, label in zip(series, labels):
        if one.evaluated not in colors:
            colors[one.evaluated] = next(spare)
        place = names.index(one.name)
        draw_seeds(
            axes,
            one.steps,
            one.success,
            label=label if is_clear else f"{one.name}, {label}",
            color=colors[one.evaluated],
            linestyle=STYLES[place % len(STYLES)],
            marker=MARKERS[place % len(MARKERS)],
        )


def draw_ranking(axes: Any, series: list[Series]) -> None:
    """Draw many series: the best three stand out, each is named at its end with its success.

    Colours follow the order of the series, so that a method keeps its own in several figures.
    """
    ranked = sorted(enumerate(series), key=lambda pair: -pair[1].final)
    ends = []
    for place, (number, one) in enumerate(ranked):
        color = PALETTE[number % len(PALETTE)]
        leads = place < 3
        draw_seeds(
            axes,
            one.steps,
            one.success,
            color=color,
            linestyle="-" if number < len(PALETTE) else "--",
            linewidth=2.2 if leads else 1.2,
            marker=MARKERS[place] if leads else None,
            band=leads,
            zorder=3 if leads else 2,
        )
        percent = one.final
        name = one.name if one.evaluated == "policy" else f"{one.name}, {one.evaluated}"
        ends.append((one.steps[-1], percent, f"{name} {percent:.0f} %", color))
    label_ends(axes, ends)


def draw_seeds(
    axes: Any,
    x: np.ndarray,
    success: np.ndarray,
    color: str,
    label: str | None = None,
    band: bool = True,
    marker: str | None = "o",
    linewidth: float = 1.6,
    **style: Any,
) -> None:
    """Draw success (S, T), in percent, over x (T,).

    The mean and a band from the lowest to the highest; fewer than three seeds singly.
    """
    if len(x) > 30:
        marker = None
    style |= {"color": color, "marker": marker, "markersize": 4.5, "markeredgecolor": "white"}
    if len(success) >= BAND:
        axes.plot(x, success.mean(0), linewidth=linewidth, label=label, **style)
        if band:
            low, high = success.min(0), success.max(0)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        return
    for seed in success:
        axes.plot(x, seed, linewidth=linewidth, label=label, **style)
        label = None  # one entry in the legend


def label_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names at the right of their curves' ends, where necessary apart from each other.

    ends: (x, percent, name, color), from the highest to the lowest.
    """
    right = max((x for x, _, _, _ in ends), default=0)
    gap = 106 * LINE / max(axes.figure.get_figheight() - 1.2, 1)  # of two lines, in percent
    heights = []
    for _, percent, _, _ in ends:
        highest = heights[-1] - gap if heights else 101
        heights.append(min(percent, highest))
    lowest = -1
    for i in reversed(range(len(heights))):  # pushed below the axis: make room upwards
        heights[i] = max(heights[i], lowest)
        lowest = heights[i] + gap
    for (x, percent, name, color), height in zip(ends, heights):
        axes.annotate(
            name,
            xy=(x, percent),
            xytext=(1.04 * right, height),
            color=color,
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def shade_warmup(axes: Any, folders: list[Path]) -> None:
    """Shade the critic's warm-up, where all these runs have one of the same length."""
    ends = {warmup_end(folder) for folder in folders}
    end = ends.pop() if len(ends) == 1 else 0
    if end > 0:
        axes.axvspan(0, end, color="0.93", linewidth=0, zorder=-1, label="critic warm-up")


def step_label(folders: list[Path]) -> str:
    """Name the x axis: stage I has no environment steps."""
    methods = {read_args(folder).get("method") for folder in folders}
    return "gradient steps" if methods == {"bc"} else "environment steps"


def count_of(counts: list[int], noun: str) -> str:
    """Say "3 seeds", "1 seed" or "1 to 3 seeds"."""
    if not counts:
        return f"no {noun}"
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} {noun}s"
    return f"{counts[0]} {noun}{'' if counts[0] == 1 else 's'}"


# ---- matplotlib ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_backend() -> Iterator[None]:
    """Hide MPLBACKEND while matplotlib is imported.

    A notebook sets it for all programs, and matplotlib refuses a backend that is not installed.
    """
    chosen = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure of this size in inches and its axes. It needs no display and no pyplot."""
    with _without_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def finish_axes(axes: Any) -> None:
    """Give a panel its scales: percent upwards, thousands of steps to the right."""
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.xaxis.set_major_formatter(thousands)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def thousands(value: float, _position: int | None = None) -> str:
    """Write 15000 as 15k."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def add_legend(
    figure: Any, panels: list[Any], title: str | None = None, inside: Any = None
) -> None:
    """Put one legend of all panels below the figure, or inside an empty panel."""
    entries = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if not entries:
        return
    style = {"frameon": False, "fontsize": 9, "title": title, "title_fontsize": 9}
    if inside is not None:
        inside.legend(entries.values(), entries.keys(), loc="center", **style)
    else:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=2, **style
        )


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a PNG atomically. Raises UserError where the disk refuses it."""
    path = Path(path)
    try:
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    return path
