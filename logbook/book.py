"""One run's folder: args.json, progress.csv, eval.csv, TensorBoard events, last.pt and best.pt.

    book = Logbook.create("runs/lift-poco-s0", args, columns=["success", "time/env"])
    book.log(1000, success=0.6, **{"time/env": 3.2})
    book.save("last.pt", {"step": 1000, "policy": policy.state_dict()})

    book = Logbook.resume("runs/lift-poco-s0", columns=["success", "time/env"])   # the next day
    state = book.load("last.pt")
    book.rewind(state["step"])

Log and evaluate first, then save: what a kill interrupts in between is rewound and done again.
Not here: what is worth logging (each script), the picture (figure.py).
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arguments import amend_args, read_args, write_args
from .checkpoints import load_checkpoint, replacing, save_checkpoint
from .errors import UserError, reason
from .events import Board
from .tables import EVAL_COLUMNS, read_table, write_rows

CHECKPOINTS = ("last.pt", "best.pt")
RUN_FILES = ("args.json", "progress.csv", "eval.csv", *CHECKPOINTS, "curve.png", "policy.mp4")


class Logbook:
    """A run's folder, written by one process at a time. Begin with `create` or `resume`."""

    def __init__(self, folder: str | Path, args: dict[str, Any], columns: list[str]):
        self.folder = Path(folder)
        self.args = args
        self.columns = ["step", *(name for name in columns if name != "step")]
        self._board = Board(self.folder)
        self._lock = None

    # ---- beginning and resuming ----

    @classmethod
    def create(
        cls,
        folder: str | Path,
        args: dict[str, Any],
        columns: list[str],
        overwrite: bool = False,
    ) -> "Logbook":
        """Start a run. A folder that already holds a checkpoint is refused unless `overwrite`.

        Raises UserError, and then leaves no file of a run half begun.
        """
        book = cls(folder, dict(args), columns)
        folder = book.folder
        is_new = False
        is_begun = False
        try:
            cls.refuse_existing(folder, overwrite)
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            book._claim()
            write_args(folder, book.args)  # first: if this fails, nothing was removed yet
            is_begun = True
            book._remove_earlier_run()
            book._rewrite("progress.csv", book.columns, [])
            book._rewrite("eval.csv", EVAL_COLUMNS, [])
        except OSError as error:
            book._undo(is_new, is_begun)
            raise UserError(
                f"cannot write to the run folder {folder}: {reason(error)}; "
                "choose another with --run-dir DIR"
            ) from error
        return book

    @staticmethod
    def refuse_existing(folder: str | Path, overwrite: bool) -> None:
        """Raise UserError where `create` would."""
        if overwrite:
            return
        if any((Path(folder) / name).exists() for name in CHECKPOINTS):
            raise UserError(
                f"{folder} already holds a run: continue it with --resume {folder}, "
                "replace it with --overwrite, or choose another folder with --run-dir DIR"
            )

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        columns: list[str],
        task: str | None = None,
        method: str | None = None,
    ) -> "Logbook":
        """Reopen a run that has a last.pt. Its arguments are in `.args`; load, then rewind.

        Raises UserError where the folder is not the run of this task and method.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}")
        if not (folder / "last.pt").is_file():
            raise UserError(
                f"{folder} has no checkpoint last.pt: start the run again without --resume"
            )
        book = cls(folder, read_args(folder, task=task, method=method), columns)
        with _writing(folder):
            book._claim()
        found, _ = read_table(folder / "progress.csv")
        if found and found != book.columns:
            changed = ", ".join(sorted(set(found) ^ set(book.columns))) or "their order"
            raise UserError(
                f"{folder}/progress.csv has other columns ({changed:.300}): start a new run"
            )
        return book

    def amend(self, args: dict[str, Any]) -> None:
        """Store the arguments that a resumed run goes on with, and keep what they replace."""
        with _writing(self.folder / "args.json"):
            self.args = amend_args(self.folder, dict(args))

    def rewind(self, step: int) -> None:
        """Forget every row after `step`, so that a killed and resumed run has no row twice."""
        for name, columns in (("progress.csv", self.columns), ("eval.csv", EVAL_COLUMNS)):
            found, rows = read_table(self.folder / name)
            if found and found != columns:
                raise UserError(f"{self.folder / name} has other columns: start a new run")
            kept = [row for row in rows if int(row[0]) <= step]
            with _writing(self.folder / name):
                self._rewrite(name, columns, kept)
        with _writing(self.folder / "TensorBoard events"):
            self._board.hide_after(step)

    # ---- rows ----

    def log(self, step: int, **scalars: Any) -> None:
        """Write one row of progress.csv and one point per TensorBoard curve.

        None is an empty cell and no point. Raises KeyError for a name that is not in `columns`,
        TypeError for what is no number, UserError where the disk is full.
        """
        numbers = {}
        for name, value in scalars.items():
            if name not in self.columns:
                raise KeyError(
                    f"{name} is not a column of {self.folder}/progress.csv: declare it in columns"
                )
            if value is not None:
                numbers[name] = _number(name, value)
        row = {"step": step, **numbers}
        path = self.folder / "progress.csv"
        line = ",".join(str(row.get(name, "")) for name in self.columns)
        with _writing(path), open(path, "a") as file:
            file.write(line + "\n")
        self._point(step, numbers)

    def evaluation(self, step: int, acting: str, episodes: list[dict[str, Any]]) -> None:
        """Write one row of eval.csv per episode: dicts with seed, success, length and return.

        All rows or none are written. An evaluation that is repeated at the same step replaces the
        earlier one.
        """
        path = self.folder / "eval.csv"
        _, rows = read_table(path)
        rows = [row for row in rows if row[:2] != [str(step), acting]]
        for episode in episodes:
            success = int(episode["success"])
            rows.append(
                [step, acting, episode["seed"], success, episode["length"], episode["return"]]
            )
        with _writing(path):
            self._rewrite(path.name, EVAL_COLUMNS, rows)
        if episodes:
            rate = sum(bool(episode["success"]) for episode in episodes) / len(episodes)
            self._point(step, {f"eval/success_{acting}": rate})

    def close(self) -> None:
        """Close the TensorBoard file. A later row opens another."""
        with _writing(self.folder / "TensorBoard events"):
            self._board.close()

    # ---- checkpoints ----

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically (save_checkpoint)."""
        save_checkpoint(self.folder / name, state)

    def load(self, name: str, device: str = "cpu") -> dict[str, Any]:
        """Read a checkpoint (load_checkpoint)."""
        return load_checkpoint(self.folder / name, device)

    def last_good(self) -> str:
        """Say what a run that has to stop leaves behind."""
        path = self.folder / "last.pt"
        return f"{path} is the last good checkpoint" if path.is_file() else "nothing was saved yet"

    # ---- the files ----

    def _claim(self) -> None:
        """Lock the folder until this process ends: two writers would mix their rows."""
        self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115, open for good
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is writing to {self.folder}: wait until it has finished, or "
                "choose another folder with --run-dir DIR"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _remove_earlier_run(self) -> None:
        for name in RUN_FILES:
            if name != "args.json":
                (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()

    def _undo(self, is_new: bool, is_begun: bool) -> None:
        """Remove what `create` has written before it failed."""
        with contextlib.suppress(OSError):
            if is_begun:
                for name in RUN_FILES:
                    (self.folder / name).unlink(missing_ok=True)
            (self.folder / ".lock").unlink(missing_ok=True)
            if is_new:
                self.folder.rmdir()

    def _rewrite(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        with replacing(self.folder / name) as file:
            file.write(write_rows(columns, rows))

    def _point(self, step: int, scalars: dict[str, float]) -> None:
        with _writing(self.folder / "TensorBoard events"):
            self._board.add(step, scalars)


def _number(name: str, value: Any) -> int | float:
    """Return a number of Python. Raises TypeError for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r:.80}: rows of progress.csv hold numbers")
    return value


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a lost mount into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
