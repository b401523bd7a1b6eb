"""Rollout workers: order, pace and versions of what arrives, deaths and resume, between processes and on Ray.

    python -m pytest tests/test_distributed.py

The environment is a counter that takes no time to import; the simulator itself is run by tests/test_train.py's settings.
Not here: an arm's learner on another machine (test_distributed_arm.py).
"""
import copy
import os
import signal
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch

import distributed
from distributed import Rollouts
from logbook import UserError

LIMIT, HORIZON = 12, 3


class Counter(gymnasium.Env):
    """obs is (episode seed, step, pid); an episode of 5 to 12 steps, by its seed, ends in success if that is even."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, task, episode_limit, env_args=None):
        self.episode_seed, self.steps, self.wait = 0, 0, task

    def reset(self, *, seed=None, options=None):
        self.episode_seed, self.steps = seed, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.episode_seed % 10_000, self.steps, os.getpid() % 10_000], np.float32)

    def step(self, action):
        time.sleep(self.wait)
        if not np.isfinite(action).all():
            raise ValueError("the action is not finite")
        self.steps += 1
        end, won = self.steps == 5 + self.episode_seed % 8, self.episode_seed % 2 == 0
        return self._obs(), float(end and won), end and won, end and not won, {"success": end and won}


class Actor(torch.nn.Module):
    """Acts with its only weight, so that a step tells which weights chose it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, obs, rng):
        return np.full((HORIZON, 2), self.weight[0].item(), np.float32)


def rollouts(count=1, wait=0.001, seed=0, address=None, actor=None):
    return Rollouts(actor or Actor(), {"task": wait, "episode_limit": LIMIT}, count, seed, 1_000_000, HORIZON, address,
                    make=Counter)


def taken(runner, steps, actor=None):
    """So many steps; `actor` learns meanwhile: its weight is the number of steps taken."""
    moves = []
    for i in range(steps):
        moves.append(runner.step())
        if actor is not None:
            actor.weight.data.fill_(i + 1.0)
    return moves


def episodes(moves):
    """The steps in lists, one for each episode; the last may be unfinished."""
    parts = [[]]
    for move in moves:
        parts[-1].append(move)
        if move.terminated or move.truncated:
            parts.append([])
    return [part for part in parts if part]


def check_order(moves):
    for part in episodes(moves):
        assert len({move.obs[0] for move in part}) == 1                            # one seed
        assert [int(move.obs[1]) for move in part] == list(range(len(part)))
        for a, b in zip(part, part[1:]):
            np.testing.assert_array_equal(a.next_obs, b.obs)
    for part in episodes(moves)[:-1]:
        assert len(part) == 5 + int(part[0].obs[0]) % 8 and part[-1].success == part[-1].terminated


@pytest.fixture
def one():
    made = []

    def make(*args, **kwargs):
        made.append(rollouts(*args, **kwargs))
        return made[-1]
    yield make
    for runner in made:
        runner.close()


@pytest.mark.parametrize("count", [1, 2])
def test_steps_come_in_order_and_whole_episodes_of_different_seeds(one, count):
    moves = taken(one(count), 80)
    check_order(moves)
    assert len({part[0].obs[0] for part in episodes(moves)}) == len(episodes(moves))
    assert len({move.obs[2] for move in moves} - {os.getpid() % 10_000}) == count
