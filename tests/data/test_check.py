"""The check of demonstrations: it agrees with a fresh recording and finds what was changed.

    python -m pytest tests/data/test_check.py

Also the command line of demos/.
"""

import runpy
import shutil
import sys

import numpy as np
import pytest

import demos
import envs
from demos import npz
from demos.check import check, describe, newest
from demos.ranges import implausible, refuse_implausible

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", params=["lift", "can"])
def recorded(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "a.hdf5"
    return request.param, demos.collect(request.param, 1, 5, path, progress=False)


@pytest.fixture(scope="module")
def lift(tmp_path_factory):
    path = tmp_path_factory.mktemp("lift") / "a.hdf5"
    return demos.collect("lift", 1, 5, path, progress=False)


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


def turn_actions(file):
    actions = file["data/demo_0/actions"]
    actions[...] = np.roll(actions[()], 12, axis=0)


def push_actions(file):
    shift(file, "actions", slice(None), 0, 0.5)


TAMPERED = {
    "a cube 1 cm aside, once": (
        lambda f: shift(f, "obs/object", 7, 0, 0.01),
        "step 7: observation of the recorded",
    ),
    "a turned hand": (
        lambda f: shift(f, "obs/robot0_eef_quat", slice(9, None), 1, 0.1),
        "step 9: observation of the",
    ),
    "shifted actions": (turn_actions, "reward|observations? after the recorded action"),
    "actions aside": (push_actions, ": observations after the recorded act"),
    "an early reward": (
        lambda f: f["data/demo_0/rewards"].__setitem__(4, 1.0),
        "step 4: reward",
    ),
    "no reward": (lambda f: f["data/demo_0/rewards"].__setitem__(-1, 0.0), "reward"),
    "other states": (
        lambda f: shift(f, "states", slice(3, None), 1, 0.2),
        "step 3: observation of the recorded",
    ),
}


def spoiled(lift, tmp_path, spoil):
    copy = shutil.copy(lift, tmp_path / "copy.hdf5")
    with h5py.File(copy, "r+") as file:
        spoil(file)
    return copy


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_file_disagrees(lift, tmp_path, name):
    spoil, where = TAMPERED[name]
    message = f"copy.hdf5 and the simulator disagree, first at demo_0.*({where})"
    with pytest.raises(ValueError, match=message):
        check("lift", spoiled(lift, tmp_path, spoil))


def set_version(name, value):
    def spoil(file):
        attributes = file["data"].attrs
        if name == "mujoco":
            attributes["mujoco_version"] = value
            shift(file, "obs/object", 7, 0, 0.01)
        else:
            attributes["env_args"] = attributes["env_args"].replace(
                '"env_version": "1.5', f'"env_version": "{value}'
            )

    return spoil


def replace_states(file):
    del file["data/demo_0/states"]
    file["data/demo_0/states"] = [[1.0]]


@pytest.mark.parametrize(
    "spoil, told",
    [
        (
            set_version("robosuite", "1.4"),
            "recorded with robosuite 1.4.*pip install robosuite==1.4",
        ),
        (
            set_version("mujoco", "2.3.2"),
            "recorded with mujoco 2.3.2 .*pip install mujoco==2.3.2",
        ),
        (lambda file: file["data/demo_0"].pop("states"), "'states' is missing"),
        (replace_states, "key 'states' must be"),
        (lambda file: file["data/demo_0"].pop("actions"), "key 'actions' is missing"),
    ],
)
def test_what_cannot_be_replayed_is_told_with_what_to_install(lift, tmp_path, spoil, told):
    with pytest.raises(ValueError, match=told):
        check("lift", spoiled(lift, tmp_path, spoil))


def test_a_file_without_next_observations_is_checked_too(lift, tmp_path):
    path = spoiled(lift, tmp_path, lambda file: file["data/demo_0"].pop("next_obs"))
    assert check("lift", path).steps == check("lift", lift).steps
    with h5py.File(path, "r+") as file:
        push_actions(file)
    with pytest.raises(ValueError, match="observations after the recorded act"):
        check("lift", path)


def test_a_description_says_what_was_understood(lift, tmp_path):
    text = describe("lift", lift)
    steps = len(demos.load(lift)["obs"])
    assert f"1 demonstrations, {steps} steps, {steps} to {steps} long" in text
    assert "1 of 1 succeed" in text and "observations (19,) from" in text
    assert "actions (7,) from -1 to 1" in text and "rewards 0 to 1" in text
    assert "filters: train (1)" in text and "training refuses" not in text
    far = spoiled(lift, tmp_path, push_actions)
    assert "training refuses it: " in describe("lift", far)


# ---- the units of observations


@pytest.fixture(scope="module")
def lift_env():
    env = envs.make_env("lift")
    yield env
    env.close()


@pytest.mark.parametrize("scale", [57.3, 100, 1000, 1e38])
def test_observations_in_another_unit_are_refused(lift, lift_env, scale):
    data = demos.load(lift)
    assert implausible(data, lift_env) is None
    with np.errstate(over="ignore"):
        scaled = data | {"obs": np.clip(data["obs"] * scale, -3e38, 3e38).astype(np.float32)}
    with pytest.raises(ValueError, match="a.hdf5: observation . (begins|reaches).*another unit"):
        refuse_implausible("a.hdf5", scaled, lift_env)


def test_a_value_that_no_state_has_is_refused(lift, lift_env):
    data = demos.load(lift)
    data["obs"][7, 3] = 1e9
    with pytest.raises(ValueError, match="observation 3 reaches 1e[+]09 in size"):
        refuse_implausible("a.hdf5", data, lift_env)


def test_the_check_looks_at_units(lift, tmp_path):
    def millimetres(file):
        for kind in ("obs", "next_obs"):
            values = file[f"data/demo_0/{kind}/robot0_eef_pos"]
            values[...] = values[()] * 1000

    with pytest.raises(ValueError, match="copy.hdf5: observation 0 begins episodes at"):
        check("lift", spoiled(lift, tmp_path, millimetres))


# ---- the command line


def test_the_newest_file_made_here_is_checked_if_no_public_one_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m demos --task lift --out data/lift"):
        newest("lift")
    made = demos.made("lift", 3, 0)
    made.parent.mkdir()
    made.touch()
    assert newest("lift") == made
    public = tmp_path / ".robomimic/lift/mh/low_dim_v15.hdf5"
    public.parent.mkdir(parents=True)
    public.touch()
    assert newest("lift") == public


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["demos", *map(str, argv)])
    runpy.run_module("demos", run_name="__main__", alter_sys=True)


def test_the_command_checks_and_says_so(lift, monkeypatch, capsys):
    command(monkeypatch, "--check", "--task", "lift", "--data", lift)
    told = capsys.readouterr().out
    assert "File and simulator agree" in told and "1 of 1 succeed" in told


def test_ctrl_c_is_no_traceback(monkeypatch, tmp_path):
    def collect(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demos, "collect", collect)
    with pytest.raises(SystemExit, match="130"):
        command(monkeypatch, "--task", "lift", "--out", tmp_path / "a.hdf5")


LIFT = ("--task", "lift")
CHECK = ("--check", "--task", "lift")


@pytest.mark.parametrize(
    "argv, told",
    [
        ((), "--task TASK --out FILE"),
        (LIFT, "--out FILE"),
        (("--task", "lfit", "--out", "a.hdf5"), "'lfit'"),
        ((*LIFT, "--out", "a.hdf5", "--episodes", 0), "at least one demonstration, got 0"),
        (
            (*CHECK, "--data", "a.hdf5", "--episodes", 0),
            "at least one demonstration to replay, got 0",
        ),
        ((*LIFT, "--out", "folder"), "folder is a folder: name a file in it"),
        ((*LIFT, "--out", "a.hdf5", "--directed"), "--directed is for OGBench's tasks"),
        ((*CHECK, "--data", "none.hdf5"), "no demonstrations at none.hdf5"),
        ((*CHECK, "--data", "folder"), "folder is a folder: name a file in it"),
        ((*CHECK, "--data", "https://x.org/a.hdf5"), "is an address: download the file"),
        (("--check", "--task", "door"), "'door'"),
        ((*CHECK, "--out", "a.hdf5"), "leave out --out and --directed"),
        (("--check",), "--check --task TASK --data FILE"),
        (
            (*LIFT, "--out", "a.hdf5", "--data", "b.hdf5"),
            "the file to write is --out, here a.hdf5",
        ),
        (
            (*CHECK, "--data", "folder", "--episodes", -2),
            "at least one demonstration to replay, got -2",
        ),
        (("--from-run", "folder"), "--out FILE.npz or FILE.hdf5"),
        (("--from-run", "folder", "--out", "a.csv"), "a file that ends in .npz or .hdf5"),
        (("--from-run", "folder", "--out", "a.npz"), "folder"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *argv)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and told in message and message.count("\n") == 1


# ---- OGBench's files


def test_play_data_agrees_and_tampered_play_data_does_not(tmp_path, monkeypatch):
    pytest.importorskip("ogbench")
    from demos import ogbench

    def write(name, **changes):
        return npz.save(tmp_path / f"{name}.npz", columns | changes)

    monkeypatch.setattr(ogbench, "ROWS", 81)
    path = ogbench.collect("puzzle-3x3", 2, 0, tmp_path / "a.npz", progress=False)
    assert check("puzzle-3x3", path).steps == 160
    columns = dict(np.load(path))
    moved = {"observations": columns["observations"] + 0.1, "qpos": columns["qpos"] + 0.02}
    for key, values in moved.items():
        with pytest.raises(ValueError, match="trajectory 0: observations of recorded states"):
            check("puzzle-3x3", write(key, **{key: values}))
    for qvel in (columns["qvel"][:-5], columns["qvel"][:, 1:], np.array(["x"])):
        with pytest.raises(ValueError, match="qvel.npz: key 'qvel' must be .162, "):
            check("puzzle-3x3", write("qvel", qvel=qvel))
    with pytest.raises(ValueError, match="trajectory 0: observations"):
        check("puzzle-3x3", write("actions", actions=columns["actions"][::-1]))
    ends = np.zeros_like(columns["terminals"])
    with pytest.raises(ValueError, match="trajectory 0: observations of recorded states"):
        check("puzzle-3x3", write("no-end", terminals=ends, observations=moved["observations"]))


def test_what_holds_nothing_to_replay_from_is_described_all_the_same(lift, tmp_path, capsys):
    """An npz of Lift: its shapes and ranges can be told, its actions not replayed."""
    data = demos.load(lift)
    columns = {
        "observations": data["obs"],
        "actions": data["action"],
        "rewards": data["reward"],
        "terminals": data["terminated"],
        "next_observations": data["next_obs"],
    }
    path = npz.save(tmp_path / "a.npz", columns)
    assert check("lift", path).steps == 0
    assert f"{len(data['obs'])} steps" in describe("lift", path)
    assert demos.fingerprint(demos.load(path, "lift")) == demos.fingerprint(data)
