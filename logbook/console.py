"""What a training loop needs around it: signals that save first, where the time goes, a progress bar.

    from logbook import Clock, Interrupt, Progress

Not here: files (see __init__.py).
"""
import collections
import contextlib
import os
import signal
import sys
import threading
import time


class Interrupt:
    """`with Interrupt() as interrupt:` Ctrl-C and SIGTERM set `interrupt.stop`, so the loop can save."""

    def __init__(self):
        self.stop, self._previous, self._process = False, {}, os.getpid()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():       # elsewhere Python allows no handlers
            self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _handle(self, number, _frame):
        if os.getpid() != self._process:              # a forked worker: Ctrl-C is the parent's affair,
            if number == signal.SIGTERM:              # but the parent must still be able to terminate it
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.stop:
            # os.write, because print is not safe inside a handler that may have interrupted a print
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping: saving the checkpoint first (Ctrl-C again to quit at once)\n")
        self.stop = True


class Clock:
    """Where the time goes: `with clock("env"): ...`, then `clock.split()`.

    An inner phase is not counted in the outer one, so the parts never add up to more than the whole.
    On a GPU, work is charged to the phase that waits for it, unless `now` waits itself. For one thread.
    """

    def __init__(self, now=None):
        self._now = now or time.perf_counter
        self._seconds, self._running, self._since = collections.defaultdict(float), [], 0.0

    @contextlib.contextmanager
    def __call__(self, name):
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def split(self):
        """Seconds per phase since the last call."""
        self._charge()
        seconds, self._seconds = dict(self._seconds), collections.defaultdict(float)
        return seconds

    def _charge(self):
        now = self._now()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


class Progress:
    """Success, steps/s, updates/s, time left: a bar on a terminal, elsewhere a line every `every` steps."""

    def __init__(self, stage, total, every, step=0, updates=0, unit="env steps"):
        self.stage, self.total, self.every, self.unit = stage, total, every, unit
        self._start = self._mark = (time.monotonic(), step, updates)
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            layout = "{desc:14} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=total, initial=step, desc=stage, smoothing=0, dynamic_ncols=True,
                             bar_format=layout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def update(self, step, updates=0, success=None):
        """Call it as often as you like; `success` is the share of the last 20 episodes, None before any."""
        now = time.monotonic()
        then, step_then, updates_then = self._mark
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if now - then < 1.0:
                return
        elif step // self.every == step_then // self.every and step < self.total:
            return
        self._mark, seconds = (now, step, updates), max(now - then, 1e-9)
        parts = [] if success is None else [f"success {100 * success:.0f} %"]
        parts.append(f"{(step - step_then) / seconds:.0f} {self.unit}/s")
        if updates:
            parts.append(f"{(updates - updates_then) / seconds:.1f} updates/s")
        if self._bar is not None:
            self._bar.set_description_str(self.stage, refresh=False)      # callers change it as they go
            self._bar.set_postfix_str(", ".join(parts))
        else:
            left = (now - self._start[0]) / max(step - self._start[1], 1) * (self.total - step)
            print(f"{self.stage} {step}/{self.total}: {', '.join(parts)}, {_duration(left)} left", flush=True)

    def write(self, text):
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
