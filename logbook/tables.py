"""A run's CSV files: plain numbers, read strictly.

    columns, rows = read_table("runs/lift-poco-s0/progress.csv")

A kill can tear the last row, which is then left out. Whatever else does not look as the logbook
wrote it is refused with the file's name and the line: dropping it would silently change a result.
Not here: who writes which rows (book.py), what they mean (figure.py).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import UserError, reason

EVAL_COLUMNS = ["step", "acting", "seed", "success", "length", "return"]
EVAL_KINDS = ("whole", "name", "whole", "flag", "whole", "number")
NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|inf|nan)")  # as Python writes it
LARGEST_FILE = 1 << 28  # bytes; a million rows of progress.csv are 2^29, a long run has thousands
LONGEST_CELL = 100  # characters of a number or a name


def write_rows(columns: list[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Return a table as the bytes of its file."""
    lines = [",".join(map(str, row)) + "\n" for row in [columns, *rows]]
    return "".join(lines).encode()


def read_table(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Return the columns and the rows of progress.csv or eval.csv, ([], []) if there is none.

    A row that stands there twice is returned once. Raises UserError for a damaged file.
    """
    path = Path(path)
    try:
        lines = _lines(path)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:
        raise _damaged(path, "", error) from error
    if not lines:
        return [], []
    columns = lines[0].split(",")
    if max(map(len, columns)) > LONGEST_CELL or len(set(columns)) < len(columns):
        raise _damaged(path, " in line 1", ValueError("these are no columns"))
    rows = {}
    for number, line in enumerate(lines[1:], start=2):
        row = line.split(",")
        try:
            key = _check_row(columns, row)
            if rows.setdefault(key, row) != row:
                raise ValueError(f"another row of {', '.join(map(str, key))} precedes it")
        except ValueError as error:
            raise _damaged(path, f" in line {number}", error) from error
    return columns, list(rows.values())


def _lines(path: Path) -> list[str]:
    """Return the file's complete lines. Raises ValueError for what is no text, or too much."""
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes")
    complete = content[: content.rfind(b"\n") + 1]  # what follows the last newline was torn
    return complete.decode().replace("\r\n", "\n").split("\n")[:-1]


def _check_row(columns: list[str], row: list[str]) -> tuple[str, ...]:
    """Return what tells this row from others. Raises ValueError where a cell cannot be right."""
    if len(row) != len(columns):
        raise ValueError(f"{len(row)} cells under {len(columns)} columns")
    if columns == EVAL_COLUMNS:
        for kind, cell in zip(EVAL_KINDS, row):
            _check_cell(kind, cell)
        return tuple(row[:3])  # step, acting, seed
    _check_cell("whole", row[0])
    for cell in row[1:]:
        if cell:
            _check_cell("number", cell)
    return (row[0],)


def _check_cell(kind: str, cell: str) -> None:
    """Raise ValueError where a cell is not of this kind: whole, flag, number or name."""
    if len(cell) > LONGEST_CELL:
        raise ValueError(f"a cell of {len(cell)} characters")
    if kind == "whole" and not (cell.isascii() and cell.isdigit()):
        raise ValueError(f"{cell!r} is no whole number")
    if kind == "flag" and cell not in ("0", "1"):
        raise ValueError(f"{cell!r} is neither 0 nor 1")
    if kind == "name" and (not cell or '"' in cell):
        raise ValueError(f"{cell!r} is no name")
    if kind == "number" and not NUMBER.fullmatch(cell):
        raise ValueError(f"{cell!r} is no number")


def _damaged(path: Path, where: str, error: ValueError) -> UserError:
    advice = "put it right, or start a new run"
    return UserError(f"{path} is damaged{where} ({error}): {advice}")
