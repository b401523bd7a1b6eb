"""curve.png: success over environment steps, drawn from a run's CSV files alone, so it can always be redrawn.

    python -m logbook runs/lift-poco-s0                      # one run: its own curve.png
    python -m logbook runs/lift-poco-s* runs/lift-qc-s*      # several: mean and band over seeds, ./curves.png

Not here: training scalars (TensorBoard shows those).
"""
import csv
import math
import re
from pathlib import Path

import numpy as np

from .arguments import read_args
from .book import _writing
from .checkpoints import replacing
from .intervals import wilson
from .tables import read_run

COLORS = {"policy": "#0072b2", "posterior": "#d55e00"}      # Okabe-Ito: colour-blind eyes tell them apart
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def curve(*folders, out=None):
    """Draw curve.png of one run, or one figure of several; returns the path of the picture."""
    return draw(folders, out)


def draw(folders, out=None):
    """One folder: its curve.png. Several: one figure of them all, ./curves.png. `out` overrides the place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg      # needs no display, leaves pyplot alone
    from matplotlib.figure import Figure
    folders = [Path(folder) for folder in folders]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    if len(folders) == 1:
        _draw_run(axes, folders[0])
    else:
        _draw_runs(axes, folders)
    axes.set_ylabel("success (%)")
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path = Path(out) if out else folders[0] / "curve.png" if len(folders) == 1 else Path("curves.png")
    with _writing(path), replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path


def _draw_run(axes, folder):
    args = read_args(folder)
    running, evaluations = read_run(folder)
    if running:
        steps, shares = zip(*running)
        axes.plot(steps, 100 * np.array(shares), color="0.6", linewidth=1.2, zorder=1,
                  label="collecting, last 20 episodes")
    start = evaluations.get("policy", {}).get(0)
    if start and args.get("method") != "bc":          # stage II starts from the cloned policy, if there was a stage I
        untrained = args.get("setting") == "online" or args.get("method") in ("rlpd", "rlpd-ac")
        axes.axhline(100 * start[0] / start[1], color="0.3", linewidth=1.2, linestyle=(0, (4, 3)), zorder=0,
                     label=f"{'untrained' if untrained else 'behaviour cloning'}, {100 * start[0] / start[1]:.0f} %")
    last = max([step for steps in evaluations.values() for step in steps], default=0)
    for index, (acting, steps) in enumerate(sorted(evaluations.items())):
        counts = np.array([steps[step] for step in sorted(steps)])           # (evaluations, 2)
        rate = 100 * counts[:, 0] / counts[:, 1]
        low, high = 100 * np.array([wilson(*pair) for pair in counts]).T
        # a small shift, so that the bars of the two ways of acting do not hide each other
        axes.errorbar(np.array(sorted(steps)) + 0.006 * last * index, rate, yerr=[rate - low, high - rate],
                      fmt="o-", markersize=5, linewidth=1.6, elinewidth=1, capsize=2.5,
                      color=COLORS.get(acting, "#009e73"), label=f"evaluation, {acting} (95 % interval)")
    axes.set_xlabel("gradient steps" if args.get("method") == "bc" else "environment steps")
    axes.set_title(", ".join([str(args.get("task")), str(args.get("method")), f"seed {args.get('seed')}",
                              f"preset {args.get('preset')}"]), fontsize=11)


def _draw_runs(axes, folders):
    """Runs whose folder names differ only in the seed (-s0, -s1, ...) become one line with a band."""
    groups, args = {}, [read_args(folder) for folder in folders]
    tasks, methods = (sorted({str(one.get(name)) for one in args}) for name in ("task", "method"))
    for folder, task in zip(folders, (one.get("task") for one in args)):
        for acting, steps in read_run(folder)[1].items():
            points = [(step, 100 * steps[step][0] / steps[step][1]) for step in sorted(steps)]
            name = re.sub(r"-s\d+$", "", folder.resolve().name)
            groups.setdefault((name if len(tasks) == 1 else f"{task}, {name}", acting), []).append(points)
    colors = dict(zip(sorted({name for name, _ in groups}), PALETTE * len(groups)))
    for (name, acting), seeds in sorted(groups.items()):
        # only where every seed has begun and got to; between its own evaluations a seed is interpolated
        start, end = max(points[0][0] for points in seeds), min(points[-1][0] for points in seeds)
        grid = sorted({step for points in seeds for step, _ in points if start <= step <= end})
        curves = np.array([np.interp(grid, *zip(*points)) for points in seeds])
        axes.plot(grid, curves.mean(0), "o-" if acting == "policy" else "s--", color=colors[name],
                  markersize=4, linewidth=1.6, label=f"{name}, {acting} (seeds: {len(seeds)})")
        if len(seeds) > 1:
            axes.fill_between(grid, curves.min(0), curves.max(0), color=colors[name], alpha=0.15, linewidth=0)
    axes.set_xlabel("gradient steps" if methods == ["bc"] else "environment steps")
    axes.set_title(" and ".join(tasks) + ": mean over seeds, band from the lowest to the highest", fontsize=11)
