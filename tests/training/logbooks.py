"""What the tests of logbook/ share: a small run, a full disk, readers of what was written."""

import contextlib
import csv
import resource
import signal
import time
from pathlib import Path

from logbook import Logbook

ROOT = Path(__file__).parents[2]
ARGS = {"task": "lift", "method": "poco", "seed": 0, "preset": "cpu", "clip": float("inf")}
COLUMNS = ["success", "q/mean", "time/env"]


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes: the write that tries fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def episodes(successes):
    return [
        {"seed": 100 + i, "success": bool(success), "length": 40 + i, "return": float(success)}
        for i, success in enumerate(successes)
    ]


def next_second():
    """Wait: TensorBoard reads a folder's files in the order of the seconds in their names."""
    time.sleep(1.01 - time.time() % 1)


def points(book):
    """Return what TensorBoard shows of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(book.folder)).Reload()
    return {
        tag: [(point.step, round(point.value, 4)) for point in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def fill(book, top):
    """Write a run of 1,000 steps that ends with `top` of 10 successes."""
    for step in range(0, 1001, 50):
        book.log(step, success=float("nan") if step == 0 else 0.5 * step / 1000)
    for step, success in ((0, 3), (500, 6), (1000, top)):
        book.evaluation(step, "policy", episodes([1] * success + [0] * (10 - success)))
        book.evaluation(step, "posterior", episodes([1] * 10))


def small_run(folder, **args):
    return Logbook.create(folder, ARGS | args, COLUMNS)
