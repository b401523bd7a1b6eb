"""An environment and a policy that cost nothing, for the rollout workers of test_distributed.py; light to import."""
import os
import signal
import time

import gymnasium
import numpy as np
import torch

LIMIT, HORIZON = 12, 3


class Counter(gymnasium.Env):
    """obs is (episode seed, step, pid); an episode of 5 to 12 steps, by its seed, ends in success if that is even."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, wait, episode_limit):
        self.episode_seed, self.steps, self.wait = 0, 0, wait

    def reset(self, *, seed=None, options=None):
        self.episode_seed, self.steps = seed, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.episode_seed, self.steps, os.getpid()], np.float32)

    def step(self, action):
        time.sleep(self.wait)
        if not np.isfinite(action).all():
            raise ValueError("the action is not finite")
        self.steps += 1
        end, won = self.steps == 5 + self.episode_seed % 8, self.episode_seed % 2 == 0
        return self._obs(), float(end and won), end and won, end and not won, {"success": end and won}


class Suicide(Counter):
    """A worker that dies as soon as it plays."""

    def reset(self, **_):
        os.kill(os.getpid(), signal.SIGKILL)


class Actor(torch.nn.Module):
    """Acts with its only weight, so that a step tells which weights chose it."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), weight))

    def forward(self, obs, rng):
        return np.full((HORIZON, 2), self.weight[0].item(), np.float32)
