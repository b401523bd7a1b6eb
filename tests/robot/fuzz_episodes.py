"""Altered files of an arm's episodes: each is read, or refused in one sentence with its name.

    python tests/robot/fuzz_episodes.py 10000 0        # how many, seed

Anything else ends the program with the number of the file: a traceback, a file that takes longer
than SECONDS, or memory beyond MEGABYTES. test_damaged_episodes.py runs a few hundred.
"""

import collections
import contextlib
import io
import re
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE), str(HERE.parent / "data")]

from arm_data import TASK, write_episode  # noqa: E402
from fuzz import altered_bytes, altered_hdf5  # noqa: E402

from arms.episodes import Episode, length, load, merge, outcome, workspace_of  # noqa: E402
from logbook import UserError  # noqa: E402

SECONDS = 10
MEGABYTES = 1000


def sources(folder):
    """Write a success, and an episode of two pieces."""
    whole = write_episode(folder, 0, steps=12)
    rng = np.random.default_rng(1)
    holed = Episode(rng.normal(size=TASK.obs_dim))
    for step in range(9):
        action = rng.uniform(-1, 1, TASK.action_dim)
        holed.add(action, action, rng.normal(size=TASK.obs_dim))
        if step == 4:
            holed.drop(rng.normal(size=TASK.obs_dim))
    holed.outcome = "fail"
    path = folder / "episode_00001.hdf5"
    holed.save(path, TASK, False)
    return [whole, path]


def readers(path):
    """All that is ever asked of an episode's file."""
    return {
        "load": lambda: load([path], TASK),
        "outcome": lambda: outcome(path),
        "length": lambda: length(path),
        "workspace": lambda: workspace_of([path]),
        "merge": lambda: merge([path], path.parent / "merged.hdf5"),
    }


def check(name, value):
    """Refuse an answer that a whole file cannot give."""
    if name == "load":
        assert all(np.isfinite(column).all() for column in value.values())
        assert np.abs(value["action"]).max() <= 1
    elif name == "outcome":
        assert value is None or isinstance(value, str)
    elif name == "length":
        assert 0 <= value < 10**9
    elif name == "workspace":
        assert value.shape == (2, 3) and np.isfinite(value).all()


def ask(path):
    """Ask a file everything; count what was read and what refused. Anything else is raised."""
    found = collections.Counter()
    for name, read in readers(path).items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check(name, read())
            found[f"{name} read"] += 1
        except UserError as error:
            text = str(error)
            named = str(path) in text or "no recorded episodes" in text
            if not named or "\n" in text or len(text) > 2000:
                raise AssertionError(f"not one sentence with the file's name: {text}") from error
            found[f"{name} refused"] += 1
    return found


def run(count, seed):
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"a file took more than {SECONDS} s"))
    found = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = sources(Path(folder))
        path = Path(folder) / "altered.hdf5"
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            source = files[rng.integers(len(files))]
            if rng.random() < 0.6:
                path.write_bytes(altered_bytes(source.read_bytes(), rng))
            else:
                altered_hdf5(source, path, rng)
            print(f"file {number} of seed {seed}", file=sys.stderr, flush=True)
            signal.alarm(SECONDS)
            found += ask(path)
            signal.alarm(0)
    # Not by getrusage, whose figure a program inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    if used > MEGABYTES:
        sys.exit(f"{used:.0f} MB were used")
    return found


if __name__ == "__main__":
    how_many, first_seed = map(int, sys.argv[1:])
    for key, value in sorted(run(how_many, first_seed).items()):
        print(key, value)
