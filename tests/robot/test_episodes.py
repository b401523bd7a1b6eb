"""Labels at a hole in an episode, and what of an episode's file reaches the disk.

    python -m pytest tests/test_episodes.py

Not here: episodes without holes, their numbers, what is refused (test_robot_runs.py, test_robot_care.py).
"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arms.episodes import Take, layout, load, outcome
from test_robot_runs import Scene, still

pytest.importorskip("h5py")
TASK = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
OBS, ACTION = np.zeros(16), np.zeros(7)


def played(steps, *lost):
    """So many steps, then these losses, each with what it ended with or None."""
    take = Take(OBS)
    for _ in range(steps):
        take.add(ACTION, ACTION, OBS)
    for obs in lost:
        take.drop(obs)
    return take


def stored(take, path):
    take.save(path, TASK, take.outcome == "success")
    return {name: column.tolist() for name, column in load([path], TASK).items()
            if name in ("reward", "terminated", "truncated")}


HOLES = ([OBS], [None], [OBS, None], [None, OBS], [None, None])


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("label, counted", [("success", "unlabelled"), ("fail", "fail")])
def test_a_label_at_a_hole_is_not_put_on_the_step_before_it(hole, label, counted, tmp_path, capfd):
    """Whatever is known of the lost step. A success is told, and is none in the file either."""
    take = played(2, *hole)
    take.outcome = label
    assert stored(take, tmp_path / "one.hdf5") == {"reward": [0, 0], "terminated": [0, 0], "truncated": [0, 1]}
    assert take.outcome == outcome(tmp_path / "one.hdf5") == counted and take.dropped == len(hole)
    assert ("NOT A SUCCESS" in capfd.readouterr().err) == (label == "success")


@pytest.mark.parametrize("hole", HOLES)
def test_a_success_after_a_hole_is_one_as_soon_as_a_step_can_bear_it(hole, tmp_path, capfd):
    """After None the first step has no beginning and is lost as well."""
    take = played(2, *hole)
    for _ in range(2):
        take.add(ACTION, ACTION, OBS)
    take.outcome, more = "success", 1 + (hole[-1] is not None)
    end = [0] * (1 + more) + [1]
    assert stored(take, tmp_path / "one.hdf5") == {
        "reward": end, "terminated": end, "truncated": [0, 1] + [0] * more}
    assert take.steps == 2 + more and take.outcome == "success" and not capfd.readouterr().err


def test_a_success_of_no_step_at_all_is_none():
    take = Take(OBS)
    take.outcome = "success"
    assert take.outcome == "unlabelled"


def test_the_operator_who_says_success_while_the_arm_is_held_is_told(capfd):
    """Space without an operator's arm, then s: the same episode counts when a step comes after the second space."""
    for events, said in ((["pause", None, "success"], "unlabelled"), (["pause", "pause", None, "success"], "success")):
        with (scene := Scene([None] * 3 + events, teleop=False)).rig as rig:
            assert rig.episode(still, 0).outcome == said and len(scene.sent) > 3
        assert ("NOT A SUCCESS" in capfd.readouterr().err) == (said == "unlabelled")


def test_a_finished_episode_survives_a_power_cut(tmp_path, monkeypatch):
    """The file reaches the disk before it takes its name, and its folder after."""
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
assert (folder / "one.hdf5").read_bytes() == whole and [path.name for path in folder.iterdir()] == ["one.hdf5"]
"""


def test_a_full_disk_is_an_ordinary_error_and_leaves_what_was_there(tmp_path):
    """Not HDF5's, which accuses the file that is read, leaves half of one and ends Python with a crash."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", FULL.format(paths=[str(here), str(here.parent)]), str(tmp_path)],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "File too large\n" * 2), done.stderr
