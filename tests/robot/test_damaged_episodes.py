"""Damaged files of episodes: one sentence with the file's name, no traceback, bounded memory.

    python -m pytest tests/robot/test_damaged_episodes.py
    python tests/robot/fuzz_episodes.py 10000 0        # longer, by hand

Not here: files of demonstrations in general (tests/data/test_hostile.py).
"""

import os
import re
import subprocess
import sys

import fuzz_episodes
import h5py
import numpy as np
import pytest
from arm_data import TASK, settings, write_episode

from arms.episodes import length, load, merge, outcome, workspace_of
from arms.learner import Learner
from logbook import UserError

FILES = 300


def test_altered_files_are_read_or_refused_in_one_sentence():
    """In a process of its own, since a damaged HDF5 file could crash the library itself."""
    command = [sys.executable, fuzz_episodes.__file__, str(FILES), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(re.findall(r"(\w+ \w+) (\d+)", done.stdout))
    for reader in ("load", "outcome", "length", "workspace", "merge"):
        read, refused = int(counts[f"{reader} read"]), int(counts[f"{reader} refused"])
        assert read + refused == FILES and min(read, refused) > 10


@pytest.fixture
def path(tmp_path):
    return write_episode(tmp_path / "episodes", 0)


READERS = {
    "outcome": outcome,
    "length": length,
    "workspace": lambda path: workspace_of([path]),
    "merge": lambda path: merge([path], path.parent / "all.hdf5"),
    "load": lambda path: load([path], TASK),
}


def bomb(file):
    """54 kB that declare 160 million steps."""
    del file["data/demo_0/actions"]
    file.create_dataset("data/demo_0/actions", (160_000_000, 7), "f4", chunks=True)


def elsewhere(file):
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = h5py.ExternalLink("/etc/passwd", "/data")


def not_a_group(file):
    del file["data/demo_0"]
    file["data/demo_0"] = np.zeros(3)


def no_data(file):
    del file["data"]


@pytest.mark.parametrize("reader", ["length", "merge", "load"])
@pytest.mark.parametrize("damage", [bomb, elsewhere, not_a_group, no_data])
def test_what_a_file_claims_is_checked_before_it_is_read(damage, reader, path):
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(UserError, match="episode_00000.hdf5"):
        READERS[reader](path)


@pytest.mark.parametrize("value", ["x", np.zeros(3), -1, np.inf, b"\xff"])
def test_the_length_does_not_hang_on_what_the_file_says_of_it(value, path):
    """`total` is written for robomimic; steps are counted."""
    with h5py.File(path, "r+") as file:
        file["data"].attrs["total"] = value
    assert length(path) == 30
    assert length(merge([path, path], path.parent / "all.hdf5")) == 60


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"outcome": 7}', "[" * 100_000])
def test_an_outcome_that_is_none_is_refused(text, path):
    with h5py.File(path, "r+") as file:
        file["data"].attrs["env_args"] = text if len(text) < 60_000 else text[:60_000]
    with pytest.raises(UserError, match="episode_00000.hdf5 is damaged .*: remove it"):
        outcome(path)


def test_an_episode_that_is_gone_or_empty_is_named(tmp_path):
    (tmp_path / "empty.hdf5").touch()
    for name in ("gone.hdf5", "empty.hdf5"):
        for reader, read in READERS.items():
            with pytest.raises(UserError, match=name):
                pytest.fail(f"{reader} read {read(tmp_path / name)}")


def test_a_whole_file_that_may_not_be_read_now_is_not_called_damaged(path, monkeypatch):
    """Somebody would remove it."""

    def locked(*_, **__):
        raise BlockingIOError(11, "unable to lock file, errno = 11")

    monkeypatch.setattr(h5py, "File", locked)
    with pytest.raises(UserError) as refused:
        length(path)
    assert "in use by another program" in str(refused.value)
    assert "damaged" not in str(refused.value) and "remove" not in str(refused.value)


# ---- recordings that have changed


def test_a_run_refuses_demonstrations_that_were_recorded_again(tmp_path):
    """Same names, other content: nothing else would tell."""
    for seed in range(2):
        write_episode(tmp_path / "demos", seed)
    learner = Learner(settings(tmp_path), TASK)
    state = learner.state_dict()
    Learner(settings(tmp_path), TASK).load_state_dict(state, tmp_path / "run/episodes")
    (tmp_path / "demos/episode_00001.hdf5").unlink()
    write_episode(tmp_path / "demos", 7, steps=13)
    with pytest.raises(UserError, match="demonstrations have changed: 60 steps then, 43 now"):
        Learner(settings(tmp_path), TASK).load_state_dict(state, tmp_path / "run/episodes")
    (tmp_path / "demos/episode_00001.hdf5").unlink()
    write_episode(tmp_path / "demos", 8, steps=30)
    with pytest.raises(UserError, match="demonstrations have changed: 60 steps as then, but other"):
        Learner(settings(tmp_path), TASK).load_state_dict(state, tmp_path / "run/episodes")
