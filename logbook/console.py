"""What a training loop needs around it: signals that save first, where time goes, progress.

    from logbook import Clock, Interrupt, Progress

    clock = Clock()
    with Interrupt() as interrupt, Progress("poco", total=15_000, every=250) as bar:
        while step < 15_000 and not interrupt.stop:
            with clock("env"):
                step += 1
            bar.update(step)

Not here: files (book.py).
"""

import collections
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = b"\nstopping: saving the checkpoint first (Ctrl-C again to quit at once)\n"


class Interrupt:
    """`with Interrupt() as interrupt:` a signal sets `interrupt.stop`, so that the loop can save.

    The signals are Ctrl-C, SIGTERM and, unless the caller ignores it as nohup does, SIGHUP, which a
    closed terminal sends. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.stop = False
        self._previous = {}  # signal -> handler
        self._process = os.getpid()

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows no handlers there
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._handle_in_worker(number)
            return
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.stop:
            # not print, which is unsafe in a handler that may have interrupted a print
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)
        self.stop = True

    @staticmethod
    def _handle_in_worker(number: int) -> None:
        """In a forked worker: leave the signal to the parent, which may terminate the worker."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Clock:
    """Where the time goes: `with clock("env"): ...`, then `clock.split()`. For one thread.

    An inner phase is not counted in the outer one, so the parts never add up to more than the
    whole. A GPU's work is charged to the phase that waits for it, unless `now` waits itself.
    """

    def __init__(self, now: Callable[[], float] | None = None):
        self._now = now or time.perf_counter
        self._seconds = collections.defaultdict(float)
        self._running = []  # names of the phases, the innermost last
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def split(self) -> dict[str, float]:
        """Return seconds per phase since the last call."""
        self._charge()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _charge(self) -> None:
        now = self._now()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


BAR = "{desc:14} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


class Progress:
    """Show success, steps/s, updates/s and time left.

    On a terminal it is a bar, elsewhere a line every `every` steps. `stage` may change as it goes.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        every: int,
        step: int = 0,
        updates: int = 0,
        unit: str = "env steps",
    ):
        self.stage = stage
        self.total = total
        self.every = every
        self.unit = unit
        self._start = (time.monotonic(), step)
        self._mark = (time.monotonic(), step, updates)  # of the last line
        self._bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=step,
                desc=stage,
                smoothing=0,
                dynamic_ncols=True,
                bar_format=BAR,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, updates: int = 0, success: float | None = None) -> None:
        """Call it as often as you like. success: share of the last 20 episodes, None before any."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if not self._due(now, step):
            return
        text = self._rates(now, step, updates, success)
        self._mark = (now, step, updates)
        if self._bar is not None:
            self._bar.set_description_str(self.stage, refresh=False)
            self._bar.set_postfix_str(text)
        else:
            left = self._seconds_left(now, step)
            line = f"{self.stage} {step}/{self.total}: {text}, {_duration(left)} left"
            print(line, flush=True)

    def write(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def _due(self, now: float, step: int) -> bool:
        last_time, last_step, _ = self._mark
        if self._bar is not None:
            return now - last_time >= 1.0
        return step // self.every != last_step // self.every or step >= self.total

    def _rates(self, now: float, step: int, updates: int, success: float | None) -> str:
        last_time, last_step, last_updates = self._mark
        seconds = max(now - last_time, 1e-9)
        parts = []
        if success is not None:
            parts.append(f"success {100 * success:.0f} %")
        parts.append(f"{(step - last_step) / seconds:.0f} {self.unit}/s")
        if updates:
            parts.append(f"{(updates - last_updates) / seconds:.1f} updates/s")
        return ", ".join(parts)

    def _seconds_left(self, now: float, step: int) -> float:
        start_time, start_step = self._start
        done = max(step - start_step, 1)
        return (now - start_time) / done * (self.total - step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s"


# ---- output that may go away ---------------------------------------------------------------------


class _MortalOutput(io.FileIO):
    """A standard stream whose reader may die: `| head`, a closed ssh session, a full log disk.

    The first write that fails points the descriptor at /dev/null, for child processes as well.
    """

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
        return len(data) if written is None else written  # None: a full pipe that does not block


def outlive_console() -> None:
    """Make printing harmless: a dead stdout or stderr never raises, here or at exit."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = _mortal(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _mortal(sys.stderr)


def _mortal(stream: io.TextIOWrapper | None) -> io.TextIOWrapper | None:
    if stream is None:  # closed by the caller: print does nothing then
        return None
    with contextlib.suppress(OSError):
        stream.flush()
    output = _MortalOutput(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),  # PYTHONUNBUFFERED
        encoding=stream.encoding,
        errors="backslashreplace",  # nor does a character raise that the terminal lacks
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
