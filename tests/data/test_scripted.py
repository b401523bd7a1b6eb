"""Scripted demonstrations: the file depends on the seed alone, the experts succeed unevenly.

    python -m pytest tests/data/test_scripted.py

Not here: the file format (test_hdf5.py), OGBench's oracles (test_play.py).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import demos
import envs
from demos import motion, ogbench, scripted
from demos.scripted import play_attempt
from demos.square import HANDLE

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.sim
EPISODES = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    return demos.collect("lift", EPISODES, 1, folder / "lift.hdf5", progress=False)


def test_transitions_are_ready_for_the_replay(path):
    data = demos.load(path, "lift")
    count = len(demos.load(path)["obs"])
    shapes = {
        "obs": (19,),
        "action": (7,),
        "reward": (),
        "next_obs": (19,),
        "terminated": (),
        "truncated": (),
    }
    wanted = {key: (count, *rest) for key, rest in shapes.items()}
    assert {key: array.shape for key, array in data.items()} == wanted
    assert data["terminated"].sum() == EPISODES == data["reward"].sum()
    assert not data["truncated"].any()
    assert data["terminated"].dtype == data["truncated"].dtype == bool
    assert data["obs"].dtype == np.float32
    inside = ~data["terminated"][:-1]
    assert np.array_equal(data["next_obs"][:-1][inside], data["obs"][1:][inside])
    assert np.abs(data["action"]).max() <= 1.0


def test_labels_are_the_environments_own(path):
    """Replaying seed and actions gives bitwise the stored observations, rewards and ends."""
    env = envs.make_env("lift", env_args=demos.env_args(path))
    data = demos.load(path)
    row = 0
    with h5py.File(path) as file:
        seeds = [int(file[f"data/demo_{index}"].attrs["seed"]) for index in range(EPISODES)]
    for seed in seeds:
        obs = env.reset(seed=seed)[0]
        ended = False
        while not ended:
            assert np.array_equal(obs, data["obs"][row])
            obs, reward, terminated, truncated, _ = env.step(data["action"][row])
            assert np.array_equal(obs, data["next_obs"][row])
            assert (reward, terminated) == (data["reward"][row], data["terminated"][row])
            ended = terminated or truncated
            row += 1
    assert row == len(data["obs"])
    env.close()


def test_states_belong_to_their_observations(path):
    env = envs.make_env("lift")
    env.reset(seed=0)
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        for step in (0, len(demo["states"]) - 1):
            env.simulator.sim.set_state_from_flattened(demo["states"][step])
            env.simulator.sim.forward()
            cube = env.simulator.sim.data.body_xpos[env.simulator.cube_body_id]
            assert np.allclose(cube, demo["obs/object"][step][:3], atol=2e-3)
    env.close()


def test_collect_depends_on_the_seed_and_not_on_workers(path, tmp_path):
    again = demos.load(
        demos.collect("lift", EPISODES, 1, tmp_path / "again.hdf5", workers=2, progress=False)
    )
    other = demos.load(demos.collect("lift", EPISODES, 2, tmp_path / "other.hdf5", progress=False))
    first = demos.load(path)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["obs"][0], other["obs"][0])
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith(".part")] == []


def die(job):
    os._exit(1)


@pytest.mark.parametrize("task", ["lift", "puzzle-3x3"])
def test_a_worker_that_dies_ends_it_with_a_word(tmp_path, monkeypatch, task):
    """Out of memory, for instance; multiprocessing's own pool would wait for it for ever."""
    monkeypatch.setattr(scripted, "play_attempt", die)
    monkeypatch.setattr(ogbench, "make_trajectory", die)
    with pytest.raises(RuntimeError, match="died: out of memory. Try --workers 1"):
        demos.collect(task, 2, 0, tmp_path / "a.hdf5", workers=2, progress=False)
    assert not list(tmp_path.iterdir())


KILLED = """
import multiprocessing, os, signal
from demos.processes import spread
if __name__ == "__main__":
    for _ in spread(abs, range(-100, 0), 2):
        print(*(one.pid for one in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(demos.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "killed.py"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        workers, end = parent.stdout.readline().split(), time.monotonic() + 30
    while time.monotonic() < end and any(Path("/proc", pid).exists() for pid in workers):
        time.sleep(0.1)
    left = [pid for pid in workers if Path("/proc", pid).exists()]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert len(workers) == 2 and not left


def test_a_wrong_place_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(scripted, "play_attempts", lambda *_: pytest.fail("it worked in vain"))
    for path in (tmp_path, "/proc/none/a.hdf5"):
        with pytest.raises(
            (ValueError, OSError), match=str(tmp_path) if path == tmp_path else "/proc/none"
        ):
            demos.collect("lift", 1, 0, path, progress=False)


def test_only_successes_are_kept_in_the_order_of_the_attempts(path, tmp_path, monkeypatch):
    """With an expert whose first attempt fails, the file holds the attempts after it."""
    attempts = []

    class Expert(scripted.LiftDemonstrator):
        def __init__(self, rng):
            super().__init__(rng)
            attempts.append(len(attempts))
            self.idle = len(attempts) == 1

        def __call__(self, obs):
            return np.zeros(7, np.float32) if self.idle else super().__call__(obs)

    monkeypatch.setitem(scripted.EXPERTS, "lift", Expert)
    data = demos.load(
        demos.collect("lift", EPISODES - 1, 1, tmp_path / "some.hdf5", progress=False)
    )
    every = demos.load(path)
    second = int(np.flatnonzero(every["terminated"])[0]) + 1
    assert attempts == [0, 1, 2] and np.array_equal(data["action"], every["action"][second:])


def test_the_first_episodes_of_a_file_can_be_taken(path):
    assert demos.load(path, episodes=2)["terminated"].sum() == 2
    with pytest.raises(ValueError, match="holds 3 demonstrations, 4 were asked for"):
        demos.load(path, episodes=4)


def test_the_expert_varies_and_recovers_from_misses():
    lengths, misses = [], 0
    for attempt in range(8):
        episode = play_attempt((envs.get_task("lift"), 31, attempt))
        lengths.append(len(episode["action"]))
        grip = episode["action"][:, 6]
        misses += ((grip[:-1] > 0) & (grip[1:] < 0)).any()  # closed on nothing and opened again
        assert episode["success"][-1]
    assert misses >= 2 and max(lengths) > 1.5 * min(lengths)


@pytest.mark.parametrize("task", ["can", "square"])
def test_the_other_experts_succeed_unevenly(task):
    """At least 90 of 100 fresh seeds; here 5, of which 4 must do."""
    episodes = [play_attempt((envs.get_task(task), 31, attempt)) for attempt in range(5)]
    lengths = [len(episode["action"]) for episode in episodes if episode["success"][-1]]
    assert len(lengths) >= 4 and max(lengths) > 1.2 * min(lengths)
    assert all(np.abs(episode["action"]).max() <= 1.0 for episode in episodes)


def test_tilt_is_the_turn_that_points_the_hand_straight_down():
    from scipy.spatial.transform import Rotation

    for hand in Rotation.random(50, random_state=0):
        axis = hand.apply([0, 0, 1])
        turn = np.append(motion.tilt(hand.as_quat()), 0.0)
        assert np.allclose(turn, np.cross(axis, [0, 0, -1]))
        turned = Rotation.from_rotvec(0.1 * turn) * hand
        assert turned.apply([0, 0, 1])[2] < axis[2]


def test_squares_expert_lifts_the_nut_by_its_handle_with_a_level_hand():
    """The hand begins tilted by 7 to 10 degrees, and shakes; a clone would tilt further."""
    for attempt in range(3):
        episode = play_attempt((envs.get_task("square"), 31, attempt))
        obs = episode["obs"][20:]  # the nut has settled
        lifted = obs[np.flatnonzero(obs[:, 18] > obs[0, 18] + 0.02)[0]]
        handle = lifted[16:19] + HANDLE * motion.x_axis(lifted[19:23])
        assert np.linalg.norm((lifted[:3] - handle)[:2]) < 0.012
        assert np.linalg.norm(motion.tilt(lifted[3:7])) < 0.06


@pytest.mark.parametrize("task", ["lift", "can", "square"])
def test_an_expert_sees_the_observation_and_its_own_stream_only(task):
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(30, envs.TASKS[task].obs_dim)).astype(np.float32)
    streams = [np.random.default_rng(seed) for seed in (1, 1, 2)]
    first, again, other = (scripted.EXPERTS[task](stream) for stream in streams)
    actions = [[expert(obs) for obs in seen] for expert in (first, again, other)]
    assert np.array_equal(actions[0], actions[1]) and not np.array_equal(actions[0], actions[2])


def test_a_task_without_an_expert_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(scripted.EXPERTS, "can")
    with pytest.raises(
        ValueError, match="no scripted expert for task 'can'; experts: lift, square"
    ):
        demos.collect("can", 1, 0, tmp_path / "can.hdf5")
