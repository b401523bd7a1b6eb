"""Recordings of an environment of one's own: npz, HDF5 and Minari say the same; the check replays.

python -m pytest tests/data/test_own_data.py
"""

import json

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.spaces.utils import flatten
from recordings import write_npz

import demos
import envs
from demos import hdf5
from demos.check import check, describe
from demos.columns import environment_units

TASK = "pointmass:PointMass-v0"
EPISODES = 6


@pytest.fixture(scope="module")
def task():
    return envs.get_task(TASK)


def play(env, count=EPISODES):
    """Yield the steps of whole episodes.

    (seed, obs, action, reward, next_obs, terminated, truncated)
    """
    from pointmass import expert

    rng = np.random.default_rng(0)
    for seed in range(100, 100 + count):
        obs, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action = expert(obs, rng)
            following, reward, terminated, truncated, _ = env.step(action)
            yield seed, obs, action, reward, following, terminated, truncated
            obs = following
            ended = terminated or truncated


@pytest.fixture(scope="module")
def steps(task):
    """The recorded steps, and what the replay should get of them."""
    env = gymnasium.make(task.name)
    space = env.observation_space
    rows = list(play(env))
    wanted = {
        "obs": np.array([flatten(space, row[1]) for row in rows], np.float32),
        "action": np.array([row[2] for row in rows], np.float32) / 2,
        "reward": np.array([row[3] for row in rows], np.float32),
        "next_obs": np.array([flatten(space, row[4]) for row in rows], np.float32),
        "terminated": np.array([row[5] for row in rows]),
        "truncated": np.array([row[6] for row in rows]),
    }
    assert wanted["terminated"].sum() >= EPISODES - 2 and np.abs(wanted["action"]).max() == 1
    return rows, wanted


def same(data, wanted):
    for name, values in wanted.items():
        assert data[name].dtype == values.dtype and data[name].shape == values.shape, name
        assert np.allclose(data[name], values, rtol=0, atol=1e-7), name
        if name != "action":
            assert np.array_equal(data[name], values), name


def columns(rows, wanted, **changes):
    """The rows of an npz file, with actions as the environment takes them."""
    return {
        "observations": wanted["obs"],
        "actions": np.array([row[2] for row in rows]),
        "rewards": wanted["reward"],
        "next_observations": wanted["next_obs"],
        "terminals": wanted["terminated"],
        "timeouts": wanted["truncated"],
        "seeds": np.arange(100, 100 + EPISODES),
    } | changes


# ---- the same steps from every format


def test_npz(task, steps, tmp_path):
    path = write_npz(tmp_path / "x.npz", columns(*steps))
    same(demos.load(path, task), steps[1])
    same(demos.load(path, TASK), steps[1])


def write_hdf5(path, task, rows, wanted, **attributes):
    """A file as users write it: parts of the observation, no env_args."""
    ends = np.flatnonzero(wanted["terminated"] | wanted["truncated"]) + 1
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, value in attributes.items():
            data.attrs[name] = value
        for index, (first, stop) in enumerate(zip([0, *ends[:-1]], ends)):
            group = data.create_group(f"demo_{index}")
            part = rows[first:stop]
            for kind, place in (("obs", 1), ("next_obs", 4)):
                for key in part[0][place]:
                    group[f"{kind}/{key}"] = np.array([row[place][key] for row in part])
            group["actions"] = np.array([row[2] for row in part])
            group["rewards"] = wanted["reward"][first:stop]
            group["dones"] = wanted["terminated"][first:stop].astype(int)
            group.attrs["seed"] = 100 + index
    return path


def test_hdf5(task, steps, tmp_path):
    path = write_hdf5(tmp_path / "x.hdf5", task, *steps)
    same(demos.load(path, task, obs_keys=gymnasium.make(TASK).observation_space.spaces), steps[1])
    named = json.dumps({"env_name": task.env_name, "env_kwargs": {}})
    same(
        demos.load(write_hdf5(tmp_path / "named.hdf5", task, *steps, env_args=named), task),
        steps[1],
    )
    other = json.dumps({"env_name": "Walker2d-v5"})
    with pytest.raises(ValueError, match="'env_args' is for Walker2d-v5"):
        demos.load(write_hdf5(tmp_path / "other.hdf5", task, *steps, env_args=other), task)


def test_hdf5_of_ours(task, steps, tmp_path):
    """What --from-run writes: one flat observation, the environment's own actions."""
    rows, wanted = steps
    ends = np.flatnonzero(wanted["terminated"] | wanted["truncated"]) + 1
    episodes = [
        {
            "obs": wanted["obs"][first:stop],
            "next_obs": wanted["next_obs"][first:stop],
            "action": environment_units(wanted["action"][first:stop], task),
            "reward": wanted["reward"][first:stop],
            "success": wanted["terminated"][first:stop],
        }
        for first, stop in zip([0, *ends[:-1]], ends)
    ]
    world = {"env_name": task.env_name, "type": 2, "env_kwargs": {}}
    same(demos.load(hdf5.save(tmp_path / "x.hdf5", task, world, episodes), task), wanted)


def test_minari(task, steps, tmp_path, monkeypatch):
    """Written by Minari's own DataCollector."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("jax")  # which the collector uses
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gymnasium.make(TASK))
    assert len(list(play(collector))) == len(steps[0])
    collector.create_dataset("pointmass/noisy-v0")
    same(demos.load("minari:pointmass/noisy-v0", task), steps[1])
    first = demos.load("minari:pointmass/noisy-v0", task, 2)
    assert (first["terminated"] | first["truncated"]).sum() == 2
    assert check(task, "minari:pointmass/noisy-v0").steps > 10
    assert "6 demonstrations" in describe(task, "minari:pointmass/noisy-v0")
    with pytest.raises(ValueError, match="not in Minari's cache; fetch it: minari download none"):
        demos.load("minari:none", task)


def test_without_minari_the_way_out_is_said(task, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(ValueError, match="needs Minari: pip install"):
        demos.load("minari:pointmass/noisy-v0", task)


# ---- units of actions


def test_actions_are_scaled_to_one_and_back(task):
    actions = np.array([[-2.0, 2.0], [0.0, 1.0]], np.float32)
    assert task.unit_actions(actions).tolist() == [[-1, 1], [0, 0.5]]
    assert np.array_equal(environment_units(task.unit_actions(actions), task), actions)
    assert environment_units(actions, envs.get_task("lift")) is actions


def test_actions_beyond_the_environments_are_refused(task, steps, tmp_path):
    rows, wanted = steps
    far = np.array([row[2] for row in rows]) * 1.5
    path = write_npz(tmp_path / "x.npz", columns(rows, wanted, actions=far))
    with pytest.raises(ValueError, match="of the action values lie outside"):
        demos.load(path, task)
    assert np.abs(demos.load(path, task, clip_actions=True)["action"]).max() == 1


# ---- the check


def test_the_check_replays_seeds(task, steps, tmp_path):
    path = write_npz(tmp_path / "x.npz", columns(*steps))
    report = check(task, path, episodes=3)
    assert 0 < report.steps < len(steps[0])
    assert check(task, write_hdf5(tmp_path / "x.hdf5", task, *steps)).steps > report.steps
    text = describe(task, path)
    assert "6 demonstrations" in text and "end where the environment says so" in text
    blind = write_npz(tmp_path / "blind.npz", columns(*steps, seeds=None))
    assert check(task, blind).steps == 0


@pytest.mark.parametrize("name", ["actions", "observations", "rewards", "seeds"])
def test_what_was_changed_disagrees(task, steps, tmp_path, name):
    changed = columns(*steps)
    changed[name] = np.flip(changed[name], 0)
    path = write_npz(tmp_path / "x.npz", changed)
    with pytest.raises(ValueError, match="x.npz and the environment disagree, first at"):
        check(task, path)
    wrong = write_npz(tmp_path / "y.npz", columns(*steps, seeds=np.zeros(2)))
    with pytest.raises(ValueError, match="2 seeds for 6 demonstrations"):
        check(task, wrong)


def test_another_unit_is_a_warning_here(task, steps, tmp_path, capsys):
    """States of one's own environment may have any size."""
    path = write_npz(tmp_path / "x.npz", columns(*steps, seeds=None, observations=steps[1]["obs"]))
    check(task, path)
    assert "WARNING" not in capsys.readouterr().out
    big = {name: steps[1][key] * 100 for name, key in (("observations", "obs"),)}
    big["next_observations"] = steps[1]["next_obs"] * 100
    check(task, write_npz(tmp_path / "y.npz", columns(*steps, seeds=None, **big)))
    assert "WARNING" in capsys.readouterr().out


def test_what_nothing_here_makes_must_be_given(task, tmp_path):
    with pytest.raises(ValueError, match="give yours with --data FILE.*--demo-episodes 0"):
        demos.obtain(task, "cpu")
    assert str(demos.obtain(task, "cpu", "minari:a/b-v0")) == "minari:a/b-v0"
    with pytest.raises(ValueError, match="no scripted expert.*--data FILE"):
        demos.collect(task, 1, 0, tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError) as caught:
        demos.load(tmp_path / "none.npz", task)
    assert "make some" not in str(caught.value)  # no command could
