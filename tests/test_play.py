"""How OGBench's oracles play here: their recipe, errands that serve the task, and what is played again.

    python -m pytest tests/test_play.py

Not here: the files this makes (test_ogbench.py), a step to the last bit (test_control.py).
"""
from types import SimpleNamespace

import numpy as np
import pytest

import envs
from demos import ogbench

pytest.importorskip("ogbench")
pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore:.*precision lowered")]


def test_a_scene_whose_cube_is_out_of_sight_is_played_again(monkeypatch):
    seen, rule = [], iter([False, False, True])
    monkeypatch.setattr(ogbench, "_in_sight", lambda cube: seen.append(cube.shape) or next(rule))
    monkeypatch.setattr(ogbench, "_play", lambda *job: {"qpos": np.zeros((job[-1], 25))})
    monkeypatch.setattr(ogbench, "_env", type("Env", (), {"task": envs.TASKS["scene"]}))
    ogbench._trajectory((envs.TASKS["scene"], 0, 0, False, 6))
    assert seen == [(6, 3)] * 3


@pytest.mark.parametrize("task", ["scene", "puzzle-3x3", "cube-double", "cube-triple"])
def test_directed_play_demonstrates_the_task_and_replays_bitwise(task, tmp_path):
    """From the first state of an episode of the task to its first success, which ends it."""
    path = ogbench.collect(task, 2, 2, tmp_path / "x.npz", progress=False, directed=True)
    file, data, steps = np.load(path), ogbench.load(path, task), 0
    first = np.r_[0, np.flatnonzero(file["terminals"])[:-1] + 1]
    episode = envs.make_env(task)                               # not the world that made them
    for seed, row in zip(file["seeds"], first):
        obs, ended = episode.reset(seed=int(seed))[0], False
        while not ended:
            assert np.array_equal(obs, file["observations"][row]) and not file["terminals"][row]
            obs, reward, ended, truncated, _ = episode.step(file["actions"][row])
            assert (data["reward"][steps], data["terminated"][steps]) == (reward, ended) and not truncated
            row, steps = row + 1, steps + 1
        assert file["terminals"][row] and np.array_equal(obs, file["observations"][row])
    assert steps == len(data["obs"]) and file["directed"]
    episode.close()


def test_an_oracle_is_told_the_errand_of_now():
    """A new errand does not move the world, yet the oracle must not be given the reading of the old one."""
    env, told = ogbench.PlayEnv(envs.TASKS["cube-double"]), []

    class Oracle:
        done = True

        def reset(self, obs, info):
            block, place = info["privileged/target_block"], info["privileged/target_block_pos"]
            own = env.simulator._data.mocap_pos[env.simulator._cube_target_mocap_ids[block]]
            told.append((block == env.simulator._target_block, np.array_equal(place, own)))

        def select_action(self, obs, info):
            return np.zeros(5)

    ogbench._play(env, {"cube": Oracle()}, np.random.default_rng(0), True, 12)
    assert told == [(True, True)] * 12
    env.close()


def test_the_recipe_of_play_is_ogbenchs(monkeypatch):
    """Noise 0.1 and never an end before its time; demonstrations have noise of their own, and end when they succeed."""
    env, noises = ogbench.PlayEnv(envs.TASKS["cube-double"]), []

    class Oracle:
        done = False

        def reset(self, obs, info):
            noises.append(self._noise)

        def select_action(self, obs, info):
            return np.zeros(5)

    monkeypatch.setattr(envs.Task, "met", lambda *_: np.ones(2, bool))
    lengths = [len(ogbench._play(env, {"cube": Oracle()}, np.random.default_rng(seed), directed, 5)["actions"])
               for seed in range(3) for directed in (False, True)]
    assert lengths == [5, 2] * 3 and noises[::2] == [0.1] * 3
    assert len(set(noises)) == 4 and all(0.1 < noise < 0.4 for noise in noises[1::2])
    assert ogbench.ROWS == 1001 and ogbench.STACKING["cube-double"] == (0.0, 0.25)      # data_gen_scripts
    env.close()


def test_every_trajectory_draws_from_a_stream_of_its_own(monkeypatch):
    monkeypatch.setattr(ogbench, "_env", type("Env", (), {"task": envs.TASKS["cube-double"]}))
    monkeypatch.setattr(ogbench, "_play", lambda *_: {"drawn": np.random.rand()})
    drawn = [ogbench._trajectory((envs.TASKS["cube-double"], seed, episode, False, 3))["drawn"]
             for seed, episode in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


def test_lights_out_is_solved():
    assert list(ogbench.lights_out(np.zeros(9, int), envs.TASKS["puzzle-3x3"].goal.buttons)) == [0, 8]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lights, goal = rng.integers(0, 2, (2, 9))
        for button in ogbench.lights_out(lights, goal):
            for other in range(9):
                distance = abs(button // 3 - other // 3) + abs(button % 3 - other % 3)
                lights[other] ^= distance <= 1
        assert np.array_equal(lights, goal)


def test_a_cube_is_within_reach_unless_another_lies_on_it_or_the_drawer_holds_it():
    places = np.array([[0.4, 0.0, 0.02], [0.41, 0.01, 0.06], [0.4, 0.1, 0.06], [0.3, -0.3, 0.07]])
    qpos = np.zeros(14 + 7 * 4)
    qpos[14:].reshape(4, 7)[:, :3] = places
    world = SimpleNamespace(_data=SimpleNamespace(qpos=qpos))
    assert [ogbench._within_reach(world, i, 4) for i in range(4)] == [False, True, True, True]
    world._is_in_drawer = lambda place: place[1] < -0.2
    assert [ogbench._within_reach(world, i, 4) for i in range(4)] == [False, True, True, False]


def test_out_of_sight_is_ogbenchs_rule():
    inside = np.array([[0.4, 0.1, 0.02], [0.33, -0.35, 0.061], [0.33, -0.35, 0.079]])  # on the table, in the drawer
    assert ogbench._in_sight(inside)
    for y, z in ((0.29, 0.02), (-0.31, 0.02), (-0.31, 0.09)):
        assert not ogbench._in_sight(np.array([*inside, [0.4, y, z]]))
