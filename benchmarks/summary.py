"""The README's tables, from the CSV files of runs.

    python -m benchmarks.summary benchmarks/lift/*        # a row per run and way of acting, then seconds
    python -m logbook benchmarks/lift/poco-s*             # the figure

Seconds are progress.csv's; the last evaluation is among them in newer runs only. Folders without eval.csv are left out.
"""
import csv
import sys
from collections import defaultdict
from pathlib import Path

from logbook import UserError, cli, read_args
from logbook.figure import read_run, wilson


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
    if {"-h", "--help"} & set(folders):
        return print(__doc__)
    if not folders or folders[0].startswith("-"):
        raise UserError("give run folders: python -m benchmarks.summary RUN_DIR [RUN_DIR ...]")
    folders = [folder for folder in folders if (Path(folder) / "eval.csv").is_file()]
    if not folders:
        raise UserError("none of these folders holds an eval.csv")
    runs = {folder: read_run(folder)[1] for folder in folders}        # {acting: {step: (successes, episodes)}}
    steps = sorted({step for run in runs.values() for found in run.values() for step in found})
    print("| run | act | evaluated | " + " | ".join(f"{step:,.0f}" for step in steps) + " | 95 % interval at the end |")
    print("|---" * (len(steps) + 4) + "|")
    for folder, run in runs.items():
        for acting, found in sorted(run.items()):
            percent = [f"{100 * found[step][0] / found[step][1]:.0f}" if step in found else "" for step in steps]
            low, high = wilson(*found[max(found)])
            print(f"| {Path(folder).name} | {read_args(folder).get('act', '')} | {acting} | " + " | ".join(percent)
                  + f" | {100 * low:.0f}-{100 * high:.0f} |")
    for folder in folders:
        spent = seconds(folder)
        print(f"{Path(folder).name}: {sum(spent.values()):.0f} s, " +
              ", ".join(f"{name} {value:.0f}" for name, value in spent.items()))


if __name__ == "__main__":
    cli(lambda: main(sys.argv[1:]))
