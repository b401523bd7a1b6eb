"""The rows of progress.csv: means of what updates returned, rates, and where the time went.

    report = Report(book, clock, phases=("env", "critic"))
    report.add(stats)                      # after every update; no update waits for the CPU
    report.write(step, success=0.4)        # a row

Not here: the files (book.py).
"""

import math
from typing import Any

from torch import Tensor

from .book import Logbook
from .console import Clock


class Report:
    """What happened since the last row, and the seconds of each phase since the run began.

    `best`, the best evaluation so far, is kept here for the loop, since it is saved with the rest.
    """

    def __init__(self, book: Logbook, clock: Clock, phases: tuple[str, ...]):
        self.book = book
        self.clock = clock
        self.updates = 0
        self.best = -1.0
        self.seconds = dict.fromkeys(phases, 0.0)  # since the run began
        # since the last row
        self.sums: dict[str, tuple[Tensor | float, int]] = {}  # totals stay on their device
        self.row_step = 0
        self.row_updates = 0
        self.row_seconds = dict.fromkeys(phases, 0.0)

    def add(self, stats: dict[str, Tensor]) -> None:
        """Count one update and add up its statistics."""
        self.updates += 1
        for name, value in stats.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def write(self, step: int, **scalars: Any) -> None:
        """Write a row of progress.csv: these scalars, the means, and what was done per second."""
        self._split()
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        times = {f"time/{name}": value for name, value in self.row_seconds.items()}
        busy = max(sum(self.row_seconds.values()), 1e-9)
        self.book.log(
            step,
            **scalars,
            updates=self.updates,
            env_steps_per_s=(step - self.row_step) / busy,
            updates_per_s=(self.updates - self.row_updates) / busy,
            **means,
            **times,
        )
        self.sums = {}
        self.row_step = step
        self.row_updates = self.updates
        self.row_seconds = dict.fromkeys(self.seconds, 0.0)

    def time_split(self) -> str:
        """Say how long stage II took, and each of its phases."""
        self._split()
        parts = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return f"stage II took {sum(self.seconds.values()):.0f} s: {parts}"

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run counts on from."""
        self._split()
        return {
            "updates": self.updates,
            "best": self.best,
            "seconds": dict(self.seconds),
            "sums": dict(self.sums),
            "row_step": self.row_step,
            "row_updates": self.row_updates,
            "row_seconds": dict(self.row_seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`. Raises KeyError, TypeError or ValueError."""
        if not isinstance(state, dict):
            raise TypeError("a report is expected")
        self.updates = _whole(state["updates"])
        self.row_step = _whole(state["row_step"])
        self.row_updates = _whole(state["row_updates"])
        self.best = _number(state["best"], least=-1.0)
        for name in self.seconds:
            self.seconds[name] = _number(state["seconds"][name], least=0.0)
            self.row_seconds[name] = _number(state["row_seconds"][name], least=0.0)
        self.sums = {}
        for name, (total, count) in state["sums"].items():
            if name not in self.book.columns:
                raise ValueError(f"{name!r:.80} is no column of progress.csv")
            float(total)  # a number, or a tensor of one
            self.sums[name] = (total, max(_whole(count), 1))

    def _split(self) -> None:
        for name, seconds in self.clock.split().items():
            self.seconds[name] += seconds
            self.row_seconds[name] += seconds


def _whole(value: Any) -> int:
    """Return a count. Raises ValueError for anything else."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no count")
    return value


def _number(value: Any, least: float) -> float:
    """Return a finite number that is not below `least`. Raises ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf:
        raise ValueError(f"{value!r:.80} is no number from {least:g} upwards")
    return value
