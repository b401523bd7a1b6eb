"""What a run played becomes the next one's demonstrations, transition for transition.

python -m pytest tests/data/test_from_run.py
"""

import json

import numpy as np
import pytest
from recordings import write_hdf5

import demos
import envs
from demos.from_run import export, transitions
from logbook import UserError, save_checkpoint
from replay import ChunkReplay

pytestmark = pytest.mark.sim
FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
OFFSET = -0.25  # exact in float32


def moves(task, count):
    """Steps as an episode makes them: some end with success, some run out of time."""
    task = envs.get_task(task)
    rng = np.random.default_rng(0)
    won = np.arange(count) % 7 == 6
    late = np.arange(count) % 11 == 10
    obs = rng.normal(size=(count + 1, task.obs_dim)).astype(np.float32)
    met = np.repeat(won[:, None], task.conditions, 1)
    return {
        "obs": obs[:-1],
        "action": rng.uniform(-1, 1, (count, task.action_dim)).astype(np.float32),
        "reward": task.reward(met).astype(np.float32),
        "next_obs": obs[1:],
        "terminated": won,
        "truncated": late & ~won,
    }


def write_run(folder, task, steps, ring, demonstrations=9):
    """A run's folder whose replay holds these steps, after its demonstrations."""
    row = {name: values[:demonstrations] for name, values in steps.items()}
    size = (steps["obs"].shape[1], steps["action"].shape[1])
    replay = ChunkReplay(demonstrations + ring, *size, 3, 0.99)
    replay.extend(row)
    for move in zip(*(steps[name] for name in FIELDS)):
        obs, action, reward, *rest = move
        replay.add(obs, action, reward + np.float32(OFFSET), *rest)
    folder.mkdir()
    args = {"task": task, "method": "poco", "reward_offset": OFFSET}
    (folder / "args.json").write_text(json.dumps({"args": args, "versions": {}}))
    save_checkpoint(folder / "last.pt", {"world": {"replay": replay.state_dict()}})
    return folder


@pytest.mark.parametrize("task", ["lift", "cube-double"])
@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
@pytest.mark.parametrize("ring", [100, 30])
def test_the_steps_of_a_run_come_back_in_order(tmp_path, task, suffix, ring):
    """Also where the ring has been overwritten, oldest first; the last episode is cut."""
    steps = moves(task, 45)
    run = write_run(tmp_path / "run", task, steps, ring)
    data = demos.load(export(run, tmp_path / f"out.{suffix}"), task)
    kept = min(ring, 45)
    wanted = {name: values[-kept:].copy() for name, values in steps.items()}
    wanted["truncated"][-1] = True
    for name in FIELDS:
        assert np.array_equal(data[name], wanted[name]), name
        assert data[name].dtype == wanted[name].dtype


def test_the_file_can_be_the_next_runs_data(tmp_path):
    """It names its task and its world, as any robomimic file does."""
    run = write_run(tmp_path / "run", "lift", moves("lift", 20), 50)
    path = export(run, tmp_path / "out.hdf5")
    assert len(demos.load(path)["obs"]) == 20
    env = envs.make_env("lift", env_args=demos.env_args(path))
    assert env.env_args["env_kwargs"]["robots"] == "Panda"
    env.close()


def test_runs_that_hold_no_steps_are_refused(tmp_path):
    steps = moves("lift", 20)
    run = write_run(tmp_path / "run", "lift", steps, 50)
    out = tmp_path / "out.npz"
    (run / "episodes").mkdir()
    with pytest.raises(ValueError, match="is a run of an arm: its episodes are the files in"):
        export(run, out)
    (run / "episodes").rmdir()
    wide = steps | {name: np.repeat(steps[name], 2, 1) for name in ("obs", "next_obs")}
    with pytest.raises(ValueError, match="holds features of a backbone"):
        export(write_run(tmp_path / "vla", "lift", wide, 50), out)
    save_checkpoint(run / "last.pt", {"step": 3})
    with pytest.raises(ValueError, match="keeps no transitions"):
        export(run, out)
    empty = {name: values[:0] for name, values in steps.items()}
    with pytest.raises(ValueError, match="has played no step yet"):
        export(write_run(tmp_path / "new", "lift", empty, 50, demonstrations=0), out)
    with pytest.raises(UserError, match="none"):
        export(tmp_path / "none", out)
    with pytest.raises(ValueError, match="a file that ends in .npz or .hdf5"):
        export(run, write_hdf5(tmp_path / "a.txt", [[0]]))
    assert not out.exists()


def test_rewards_are_as_the_environment_paid_them(tmp_path):
    steps, task = transitions(write_run(tmp_path / "run", "lift", moves("lift", 20), 50))
    assert task.name == "lift" and set(steps["reward"]) == {0.0, 1.0}
