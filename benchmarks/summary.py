"""Tables of runs, from their CSV files: success, then where the time went.

    python -m benchmarks.summary benchmarks/results/lift/*    # a row per run and way of acting
    python -m logbook benchmarks/results/lift/poco-s*         # the figure

A second. Folders without eval.csv are left out. Seconds are progress.csv's; the last evaluation is
among them in newer runs only.
Not here: means over seeds (benchmarks/compare.py).
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

from logbook import UserError, cli, read_args, read_run, wilson


def seconds_of(folder: Path) -> dict[str, float]:
    """Return the run's seconds per phase."""
    total = defaultdict(float)
    with open(folder / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("time/") and value:
                    total[name.removeprefix("time/")] += float(value)
    return total


def success_table(folders: list[Path]) -> str:
    """Return a Markdown table: a row per run and way of acting, a column per evaluation."""
    runs = {folder: read_run(folder)[1] for folder in folders}
    steps = sorted({step for run in runs.values() for counts in run.values() for step in counts})
    named = [f"{step:,.0f}" for step in steps]
    header = ["run", "act", "evaluated", *named, "95 % interval at the end"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for folder, run in runs.items():
        collects = read_args(folder).get("act", "")
        for acting, counts in sorted(run.items()):
            percent = [cell(counts.get(step)) for step in steps]
            low, high = wilson(*counts[max(counts)])
            end = f"{100 * low:.0f}-{100 * high:.0f}"
            lines.append("| " + " | ".join([folder.name, collects, acting, *percent, end]) + " |")
    return "\n".join(lines)


def cell(counts: tuple[int, int] | None) -> str:
    """Write successes and episodes in percent; nothing where there was no evaluation."""
    if counts is None:
        return ""
    successes, episodes = counts
    return f"{100 * successes / episodes:.0f}"


def main(folders: list[str]) -> None:
    if "-h" in folders or "--help" in folders:
        print(__doc__)
        return
    if not folders or folders[0].startswith("-"):
        raise UserError("give run folders: python -m benchmarks.summary RUN [RUN ...]")
    found = [Path(folder) for folder in folders if (Path(folder) / "eval.csv").is_file()]
    if not found:
        raise UserError("none of these folders holds an eval.csv")
    print(success_table(found))
    for folder in found:
        seconds = seconds_of(folder)
        phases = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        print(f"{folder.name}: {sum(seconds.values()):.0f} s, {phases}")


if __name__ == "__main__":
    cli(lambda: main(sys.argv[1:]))
