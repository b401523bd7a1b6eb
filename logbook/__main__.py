"""Redraw figures from runs' CSV files.

python -m logbook RUN                          # one run: its own curve.png
python -m logbook RUN RUN ... [--out FILE]     # several in one figure, default curves.png
python -m logbook --grid --out FILE RUN ...    # a panel per task
"""

import argparse
import sys

from .errors import UserError, cli
from .figure import draw, draw_grid


def main(argv: list[str] | None = None) -> None:
    """Draw what the command line asks for and print the picture's path."""
    parser = argparse.ArgumentParser(
        prog="python -m logbook",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", metavar="RUN", help="a run's folder")
    parser.add_argument("--grid", action="store_true", help="a panel per task")
    parser.add_argument("--out", metavar="FILE", help="where the picture goes")
    args = parser.parse_args(argv)
    if not args.folders:
        raise UserError("give at least one run folder: python -m logbook RUN [RUN ...]")
    if args.grid and args.out is None:
        raise UserError("--grid needs a place for the picture: --out FILE")
    if args.grid:
        print(draw_grid(args.folders, args.out))
    else:
        print(draw(args.folders, args.out))


if __name__ == "__main__":
    cli(lambda: main(sys.argv[1:]))
