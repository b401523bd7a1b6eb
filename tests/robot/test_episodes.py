"""Labels at a hole in an episode, and what of an episode's file reaches the disk.

    python -m pytest tests/robot/test_episodes.py

Not here: episodes without holes, their numbers, what is refused (test_session.py), damaged files
(test_damaged_episodes.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from robot_toys import Scene, still

from arms.episodes import Episode, layout, load, outcome

pytest.importorskip("h5py")
ROOT = Path(__file__).parent.parent.parent
TASK = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
OBS, ACTION = np.zeros(16), np.zeros(7)


def played(steps, *lost):
    """So many steps, then these losses, each with what it ended with or None."""
    episode = Episode(OBS)
    for _ in range(steps):
        episode.add(ACTION, ACTION, OBS)
    for obs in lost:
        episode.drop(obs)
    return episode


def stored(episode, path):
    episode.save(path, TASK, episode.outcome == "success")
    return {
        name: column.tolist()
        for name, column in load([path], TASK).items()
        if name in ("reward", "terminated", "truncated")
    }


HOLES = ([OBS], [None], [OBS, None], [None, OBS], [None, None])


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("label, counted", [("success", "unlabelled"), ("fail", "fail")])
def test_a_label_at_a_hole_is_not_put_on_the_step_before_it(hole, label, counted, tmp_path, capfd):
    """Whatever is known of the lost step. A success is told, and is none in the file either."""
    episode = played(2, *hole)
    episode.outcome = label
    assert stored(episode, tmp_path / "one.hdf5") == {
        "reward": [0, 0],
        "terminated": [0, 0],
        "truncated": [0, 1],
    }
    assert episode.outcome == outcome(tmp_path / "one.hdf5") == counted and episode.dropped == len(
        hole
    )
    assert ("NOT A SUCCESS" in capfd.readouterr().err) == (label == "success")


@pytest.mark.parametrize("hole", HOLES)
def test_a_success_after_a_hole_is_one_as_soon_as_a_step_can_bear_it(hole, tmp_path, capfd):
    """After None the first step has no beginning and is lost as well."""
    episode = played(2, *hole)
    for _ in range(2):
        episode.add(ACTION, ACTION, OBS)
    episode.outcome = "success"
    more = 1 if hole[-1] is None else 2
    end = [0] * (1 + more) + [1]
    assert stored(episode, tmp_path / "one.hdf5") == {
        "reward": end,
        "terminated": end,
        "truncated": [0, 1] + [0] * more,
    }
    assert episode.steps == 2 + more and episode.outcome == "success" and not capfd.readouterr().err


def test_a_success_of_no_step_at_all_is_none():
    episode = Episode(OBS)
    episode.outcome = "success"
    assert episode.outcome == "unlabelled"


def test_the_operator_who_says_success_while_the_arm_is_held_is_told(capfd):
    """Space without an operator's arm, then s: it counts when a step comes after a second space."""
    for events, said in (
        (["pause", None, "success"], "unlabelled"),
        (["pause", "pause", None, "success"], "success"),
    ):
        with (scene := Scene([None] * 3 + events, teleop=False)).rig as rig:
            assert rig.episode(still, 0).outcome == said and len(scene.sent) > 3
        assert ("NOT A SUCCESS" in capfd.readouterr().err) == (said == "unlabelled")


def test_a_finished_episode_survives_a_power_cut(tmp_path, monkeypatch):
    """The file reaches the disk before it episodes its name, and its folder after."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    played(1).save(tmp_path / "one.hdf5", TASK, False)
    assert calls == ["fsync", "replace", "fsync"]


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_episodes as t
from arms.episodes import merge
folder = Path(sys.argv[1])
t.played(1).save(folder / "one.hdf5", t.TASK, False)
whole = (folder / "one.hdf5").read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for write in (lambda: t.played(9).save(folder / "one.hdf5", t.TASK, False),
              lambda: merge([folder / "one.hdf5"], folder / "all.hdf5")):
    try:
        write()
    except OSError as error:
        print(error.strerror)
assert (folder / "one.hdf5").read_bytes() == whole
assert [path.name for path in folder.iterdir()] == ["one.hdf5"]
"""


def test_a_full_disk_is_an_ordinary_error_and_leaves_what_was_there(tmp_path):
    """HDF5's own accuses the file that is read, leaves half of one and ends Python with a crash."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FULL.format(paths=[str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "File too large\n" * 2), done.stderr
