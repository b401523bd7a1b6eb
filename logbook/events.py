"""A run's TensorBoard events: SummaryWriter, with errors where they can be caught.

    board = Board(folder)
    board.add(1000, {"success": 0.6})
    board.hide_after(500)                  # a resumed run does step 501 and the following again

Not here: which scalars there are (book.py).
"""

import threading
from pathlib import Path
from typing import Any

NEVER = 10**9  # seconds


class Board:
    """The events of one run folder. A file is opened with the first point. Raises OSError."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer = None
        self._purge_step = None

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Write one point per curve; they are in the file when this returns."""
        writer = self._open()
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def hide_after(self, step: int) -> None:
        """Let TensorBoard hide what this folder's earlier files say of later steps."""
        self.close()
        self._purge_step = step + 1
        self._open().flush()  # now: the next interruption may come before a point

    def close(self) -> None:
        """Close the file. Another is opened with the next point."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            _leave_errors_to_flush()
            purge_step = self._purge_step
            self._purge_step = None  # a file that is opened later must not hide this one
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=NEVER)
        return self._writer


_previous_hook = threading.excepthook


def _leave_errors_to_flush() -> None:
    """Silence the traceback of SummaryWriter's thread on a full disk.

    The thread keeps the error, and flush raises it again in the thread that logs.
    """
    global _previous_hook
    if threading.excepthook is not _hook:
        _previous_hook = threading.excepthook
        threading.excepthook = _hook


def _hook(error: threading.ExceptHookArgs) -> None:
    is_writer = type(error.thread).__module__.startswith("tensorboard.")
    if not (is_writer and isinstance(error.exc_value, OSError)):
        _previous_hook(error)
