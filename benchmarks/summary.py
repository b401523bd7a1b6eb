"""The README's tables, from the CSV files of runs.

    python -m benchmarks.summary benchmarks/lift/*        # one row per run: success at every evaluation, time, settings
    python -m logbook benchmarks/lift/poco-s*             # the figure
"""
import csv
import sys
from collections import defaultdict
from pathlib import Path

from logbook import read_args
from logbook.figure import wilson


def evaluations(folder):
    """{(acting, step): (successes, episodes)}"""
    found = defaultdict(lambda: [0, 0])
    with open(Path(folder) / "eval.csv", newline="") as file:
        for row in csv.DictReader(file):
            found[row["acting"], int(row["step"])][0] += int(row["success"])
            found[row["acting"], int(row["step"])][1] += 1
    return found


def seconds(folder):
    """Seconds of stage II per phase."""
    total = defaultdict(float)
    with open(Path(folder) / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("time/") and value:
                    total[name[5:]] += float(value)
    return total


def main(folders):
    steps = sorted({step for folder in folders for _, step in evaluations(folder)})
    print("| run | act | evaluated | " + " | ".join(f"{step:,}" for step in steps) + " | 95 % interval at the end |")
    print("|---" * (len(steps) + 4) + "|")
    for folder in folders:
        found = evaluations(folder)
        for acting in sorted({acting for acting, _ in found}):
            cells = [found.get((acting, step)) for step in steps]
            percent = [f"{100 * cell[0] / cell[1]:.0f}" if cell else "" for cell in cells]
            low, high = wilson(*next(cell for cell in reversed(cells) if cell))
            print(f"| {Path(folder).name} | {read_args(folder)['act']} | {acting} | " + " | ".join(percent)
                  + f" | {100 * low:.0f}-{100 * high:.0f} |")
    for folder in folders:
        spent = seconds(folder)
        print(f"{Path(folder).name}: {sum(spent.values()):.0f} s, " +
              ", ".join(f"{name} {value:.0f}" for name, value in spent.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
