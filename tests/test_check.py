"""The check of demonstrations: it agrees with what was just recorded and finds what was changed; the command line."""
import runpy
import shutil
import sys

import numpy as np
import pytest

import demos
from demos.check import check, newest

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", params=["lift", "can"])
def recorded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, demos.collect(request.param, 1, 5, folder / "a.hdf5", progress=False)


@pytest.fixture(scope="module")
def lift(tmp_path_factory):
    return demos.collect("lift", 1, 5, tmp_path_factory.mktemp("lift") / "a.hdf5", progress=False)


def test_simulator_and_fresh_demonstrations_agree(recorded):
    task, path = recorded
    report = check(task, path)
    with h5py.File(path) as file:
        assert report.steps == len(file["data/demo_0/actions"]) and report.rewards == 0
    assert 0 < report.position < 0.003 and report.step < 0.01 and report.typical < 5e-4


def shift(file, key, rows, columns, by):
    values = file[f"data/demo_0/{key}"][()]
    values[rows, columns] += by
    file[f"data/demo_0/{key}"][...] = values


TAMPERED = {
    "a cube 1 cm aside, once": (lambda f: shift(f, "obs/object", 7, 0, 0.01), "step 7: observation of the recorded"),
    "a turned hand": (lambda f: shift(f, "obs/robot0_eef_quat", slice(9, None), 1, 0.1), "step 9: observation of the"),
    "shifted actions": (
        lambda f: f["data/demo_0/actions"].__setitem__(..., np.roll(f["data/demo_0/actions"][()], 12, axis=0)),
        "reward|observations? after the recorded action"),
    "actions aside": (
        lambda f: shift(f, "actions", slice(None), 0, 0.5), ": observations after the recorded act"),
    "an early reward": (lambda f: f["data/demo_0/rewards"].__setitem__(4, 1.0), "step 4: reward"),
    "no reward": (lambda f: f["data/demo_0/rewards"].__setitem__(-1, 0.0), "reward"),
    "other states": (lambda f: shift(f, "states", slice(3, None), 1, 0.2), "step 3: observation of the recorded"),
}


def spoiled(lift, tmp_path, spoil):
    copy = shutil.copy(lift, tmp_path / "copy.hdf5")
    with h5py.File(copy, "r+") as file:
        spoil(file)
    return copy


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_file_is_found_out(lift, tmp_path, name):
    spoil, where = TAMPERED[name]
    with pytest.raises(ValueError, match=f"copy.hdf5 and the simulator disagree, first at demo_0.*({where})"):
        check("lift", spoiled(lift, tmp_path, spoil))


def set_version(name, value):
    def spoil(file):
        attributes = file["data"].attrs
        if name == "mujoco":
            attributes["mujoco_version"] = value
            shift(file, "obs/object", 7, 0, 0.01)
        else:
            attributes["env_args"] = attributes["env_args"].replace('"env_version": "1.5', f'"env_version": "{value}')
    return spoil


@pytest.mark.parametrize("spoil, told", [
    (set_version("robosuite", "1.4"), "recorded with robosuite 1.4.*pip install robosuite==1.4"),
    (set_version("mujoco", "2.3.2"), "recorded with mujoco 2.3.2 .*pip install mujoco==2.3.2"),
    (lambda file: file["data/demo_0"].pop("states"), "'states' is missing"),
    (lambda file: [file["data/demo_0"].pop("states"), file["data/demo_0"].create_dataset("states", data=[[1.0]])],
     "key 'states' must be"),
    (lambda file: file["data/demo_0"].pop("actions"), "key 'actions' is missing"),
])
def test_what_cannot_be_replayed_is_told_with_what_to_install(lift, tmp_path, spoil, told):
    with pytest.raises(ValueError, match=told):
        check("lift", spoiled(lift, tmp_path, spoil))


def test_the_newest_own_file_is_checked_if_no_public_one_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m demos --task lift --out FILE"):
        newest("lift")
    own = demos.made("lift", 3, 0)
    own.parent.mkdir()
    own.touch()
    assert newest("lift") == own
    public = tmp_path / ".robomimic/lift/mh/low_dim_v15.hdf5"
    public.parent.mkdir(parents=True)
    public.touch()
    assert newest("lift") == public


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["demos", *map(str, argv)])
    runpy.run_module("demos", run_name="__main__", alter_sys=True)


def test_the_command_checks_and_says_so(lift, monkeypatch, capsys):
    command(monkeypatch, "--check", "lift", "--data", lift)
    assert "File and simulator agree" in capsys.readouterr().out


def test_ctrl_c_is_no_traceback(monkeypatch, tmp_path):
    def collect(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(demos, "collect", collect)
    with pytest.raises(SystemExit, match="130"):
        command(monkeypatch, "--task", "lift", "--out", tmp_path / "a.hdf5")


@pytest.mark.parametrize("argv, told", [
    ((), "--task TASK --out FILE"),
    (("--task", "lift"), "--out FILE"),
    (("--task", "lfit", "--out", "a.hdf5"), "unknown task 'lfit'; tasks: lift"),
    (("--task", "lift", "--out", "a.hdf5", "--episodes", 0), "at least one demonstration, got 0"),
    (("--check", "lift", "--data", "a.hdf5", "--episodes", 0), "at least one demonstration to replay, got 0"),
    (("--task", "lift", "--out", "folder"), "folder is a folder: name a file in it"),
    (("--task", "lift", "--out", "a.hdf5", "--directed"), "--directed is for OGBench's tasks"),
    (("--check", "lift", "--data", "none.hdf5"), "no demonstrations at none.hdf5"),
    (("--check", "lift", "--data", "folder"), "no demonstrations at folder"),
    (("--check", "door"), "unknown task 'door'"),
    (("--check", "lift", "--out", "a.hdf5"), "leave out --task, --out and --directed"),
    (("--task", "lift", "--out", "a.hdf5", "--data", "b.hdf5"), "the file to write is --out, here a.hdf5"),
    (("--check", "lift", "--data", "folder", "--episodes", -2), "at least one demonstration to replay, got -2"),
])
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *argv)
    message = str(caught.value)
    assert message.startswith("error: ") and told in message and "\n" not in message


@pytest.mark.skipif("puzzle-3x3" not in demos.envs.TASKS, reason="no OGBench task")
def test_play_data_agrees_and_tampered_play_data_does_not(tmp_path, monkeypatch):
    from demos import ogbench

    monkeypatch.setattr(ogbench, "ROWS", 81)
    monkeypatch.setattr(ogbench, "_env", None)
    path = ogbench.collect("puzzle-3x3", 2, 0, tmp_path / "a.npz", progress=False)
    assert check("puzzle-3x3", path).steps == 160
    columns = dict(np.load(path))
    moved = {"observations": columns["observations"] + 0.1, "qpos": columns["qpos"] + 0.02}
    for key, values in moved.items():
        with pytest.raises(ValueError, match="trajectory 0: observations of recorded states"):
            check("puzzle-3x3", ogbench.save(tmp_path / f"{key}.npz", columns | {key: values}))
    for qvel in (columns["qvel"][:-5], columns["qvel"][:, 1:], np.array(["x"])):
        with pytest.raises(ValueError, match="qvel.npz: key 'qvel' must be .162, "):
            check("puzzle-3x3", ogbench.save(tmp_path / "qvel.npz", columns | {"qvel": qvel}))
    with pytest.raises(ValueError, match="trajectory 0: observations"):
        actions = columns["actions"][::-1]
        check("puzzle-3x3", ogbench.save(tmp_path / "actions.npz", columns | {"actions": actions}))
    no_end = columns | {"terminals": np.zeros_like(columns["terminals"]), "observations": moved["observations"]}
    with pytest.raises(ValueError, match="trajectory 0: observations of recorded states"):
        check("puzzle-3x3", ogbench.save(tmp_path / "no-end.npz", no_end))
