"""benchmarks/instructions.py: goals by seed, experts that reach them, and what the head is told.

python -m pytest tests/vla/test_instructions.py
"""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

pytest.importorskip("transformers", reason="vla_head.py needs transformers")
import train_offline  # noqa: E402
import vla_head  # noqa: E402
from benchmarks.instructions import (  # noqa: E402
    EXPERTS,
    LIFT,
    PUSH,
    TwoGoals,
    TwoInstructions,
    as_arrays,
    play,
    pushed,
)


class Scene(gymnasium.Env):
    """A cube that the action moves: x, y, z; lifted above 0.9 m."""

    action_space = gymnasium.spaces.Box(-1, 1, (3,))
    observation_space = gymnasium.spaces.Box(-1, 1, (19,))
    episode_limit = 3

    def reset(self, seed=None, options=None):
        self.episode_seed = seed
        self.steps = 0
        self.cube = np.array([0.0, 0.0, 0.82])
        return self._obs(), {"success": False}

    def step(self, action):
        self.steps += 1
        self.cube = self.cube + action
        success = bool(self.cube[2] > 0.9)
        return self._obs(), float(success), success, False, {"success": success}

    def _obs(self):
        return np.concatenate([np.zeros(9), self.cube, np.zeros(7)]).astype(np.float32)


UP = np.array([0, 0, 0.1])
LEFT = np.array([0, 0.2, 0])
STILL = np.zeros(3)


@pytest.mark.parametrize(
    "seed, action, success", [(2, UP, True), (2, LEFT, False), (3, UP, False), (3, LEFT, True)]
)
def test_an_even_seed_asks_to_lift_and_an_odd_one_to_push(seed, action, success):
    env = TwoGoals(Scene())
    env.reset(seed=seed)
    assert env.goal == (PUSH if seed % 2 else LIFT)
    _, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated) == (float(success), success, False)
    assert info == {"success": success}


def test_an_episode_of_either_goal_ends_at_the_limit():
    env = TwoGoals(Scene())
    for seed in (0, 1):
        env.reset(seed=seed)
        ends = [env.step(STILL)[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), (False, True)]


def test_a_cube_that_is_lifted_over_the_left_is_not_pushed_there():
    obs = np.zeros(19)
    obs[9:12] = (0.0, 0.2, 0.95)
    assert not pushed(obs)
    obs[11] = 0.82
    assert pushed(obs)


class Eyes:
    """Stand in for the backbone: the observation is the number of the instruction."""

    def observe(self, images, state, which):
        return which[:, None].float()


@pytest.mark.parametrize("lie", [False, True])
def test_the_head_is_told_the_goal_or_with_a_lie_the_other(monkeypatch, lie):
    monkeypatch.setattr(train_offline.Simulation, "make_env", lambda self, mode: Scene())
    simulation = TwoInstructions.__new__(TwoInstructions)
    simulation.args = SimpleNamespace(horizon=2)
    simulation.backbone = Eyes()
    simulation.view = lambda env: np.zeros((vla_head.VIEWS, 4, 4, 3), np.uint8)
    simulation.lie = lie
    env = simulation.make_eval_env()
    for seed in (0, 1):
        told, _ = env.reset(seed=seed)
        assert told == [1 - seed if lie else seed]


def test_transitions_become_the_replays_columns():
    env = TwoGoals(Scene())
    rows = play_still(env)
    data = as_arrays(rows)
    assert set(data) == {"obs", "action", "reward", "next_obs", "terminated", "truncated"}
    assert data["obs"].shape == (3, 19) and data["truncated"].tolist() == [0, 0, 1]
    assert np.array_equal(data["obs"][1:], data["next_obs"][:-1])


def play_still(env):
    class Wrapped(gymnasium.Wrapper):  # where `play` expects the wrapper of pictures
        pass

    return play(Wrapped(env), lambda obs: STILL, 0)


@pytest.mark.sim
@pytest.mark.parametrize("goal", [LIFT, PUSH])
def test_the_experts_mostly_reach_their_goals(goal):
    pytest.importorskip("robosuite")
    import envs

    env = TwoGoals(envs.make_env("lift", episode_limit=150))
    successes = 0
    for number in range(5):
        rng = np.random.default_rng([5, number])
        obs, info = env.reset(seed=2 * int(rng.integers(2**30)) + goal)
        expert = EXPERTS[goal](rng)
        ended = False
        while not ended:
            obs, _, terminated, truncated, info = env.step(expert(obs))
            ended = terminated or truncated
        successes += info["success"]
    env.close()
    assert successes >= 3
