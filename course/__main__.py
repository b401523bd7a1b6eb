"""The course's command line.

python -m course check              # judge course/exercises.py, 3 seconds
python -m course check 4 --file F   # one unit of another file; --json for an autograder
python -m course bug 3              # a planted bug: healthy and sick statistics, 2 to 9 seconds
python -m course notebooks          # the six scripts as .ipynb
python -m course page               # the interactive page, one offline HTML file
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from .toy import FIGURES

HAND_IN = Path(__file__).parent / "exercises.py"
MARKS = {"right": "right", "wrong": "wrong", "not attempted": "  -  "}


def check(args: argparse.Namespace) -> int:
    """Judge a hand-in. Exit status: 0 all right, 1 something missing or wrong, 2 not loadable."""
    from .checker import Refused, check_file

    if not args.json:
        print(f"This runs the code in {args.file} on your machine, with your rights.\n")
    try:
        verdicts = check_file(args.file, args.unit)
    except Refused as refusal:
        print(json.dumps({"file": str(args.file), "error": str(refusal)}) if args.json else refusal)
        return 2
    right = sum(verdict.status == "right" for verdict in verdicts)
    if args.json:
        rows = [dataclasses.asdict(verdict) for verdict in verdicts]
        summary = {"file": str(args.file), "right": right, "of": len(rows), "exercises": rows}
        print(json.dumps(summary, indent=1))
    else:
        for verdict in verdicts:
            words = verdict.message or verdict.status
            print(f"{verdict.exercise}  {verdict.name:20s} {MARKS[verdict.status]}  {words}")
        print(f"\n{right} of {len(verdicts)} right")
    return 0 if right == len(verdicts) else 1


def bug(args: argparse.Namespace) -> int:
    """Show a planted bug by its statistics, or tell what it was."""
    from .bugs import BUGS, statistics

    planted = BUGS[args.number - 1]
    if args.tell:
        print(f"bug {args.number}: {planted.name}\nin {planted.file}: {planted.lesson}")
        print(f"a test that notices: {planted.killer}")
        return 0
    print(f"bug {args.number}: one line of a method file was changed. The same toy, twice:\n")
    healthy, sick = statistics(planted)
    print(f"{'':42s} healthy      sick")
    for name, value in healthy.items():
        print(f"{name:40s} {value:9.3f} {sick[name]:9.3f}")
    print("\nWhich number is impossible, or which formula does it break? Name the line that was")
    print("changed, and a test of tests/method that would have noticed. Write both down; then:")
    print(f"    python -m course bug {args.number} --tell")
    return 0


def notebooks(args: argparse.Namespace) -> int:
    """Write the notebooks."""
    from .notebooks import write

    for path in write(args.to or FIGURES / "notebooks"):
        print(path)
    return 0


def page(args: argparse.Namespace) -> int:
    """Write the interactive page."""
    from .page import write

    path = write(args.to or FIGURES / "page.html")
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB): open it in any browser")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m course", description="RL as inference: exercises, bugs, notebooks, page"
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("check", help="judge the exercises")
    one.add_argument("unit", type=int, nargs="?", choices=range(1, 7), help="all units if left out")
    one.add_argument("--file", type=Path, default=HAND_IN, help="the hand-in to judge")
    one.add_argument("--json", action="store_true", help="for an autograder")
    one.set_defaults(run=check)
    one = commands.add_parser("bug", help="show a planted bug by its statistics")
    one.add_argument("number", type=int, choices=range(1, 8), metavar="K", help="1 to 7")
    one.add_argument("--tell", action="store_true", help="what it was, and a test that notices")
    one.set_defaults(run=bug)
    one = commands.add_parser("notebooks", help="write the six scripts as .ipynb")
    one.add_argument("--to", type=Path, help="folder, runs/course/notebooks if left out")
    one.set_defaults(run=notebooks)
    one = commands.add_parser("page", help="write the interactive page")
    one.add_argument("--to", type=Path, help="file, runs/course/page.html if left out")
    one.set_defaults(run=page)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
