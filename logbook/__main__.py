"""python -m logbook RUN_DIR [RUN_DIR ...]: redraw one run's curve.png, or compare several in ./curves.png."""
import sys

from .errors import UserError, cli
from .figure import curve


def main():
    folders = sys.argv[1:]
    if {"-h", "--help"} & set(folders):
        return print(__doc__)
    if not folders or folders[0].startswith("-"):
        raise UserError("give at least one run folder: python -m logbook RUN_DIR [RUN_DIR ...]")
    print(curve(*folders))


if __name__ == "__main__":
    cli(main)
