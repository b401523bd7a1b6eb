"""An environment and a policy that cost nothing, for the rollout workers; light to import."""

import os
import signal
import time

import gymnasium
import numpy as np
import torch

LIMIT = 12
HORIZON = 3


class Counter(gymnasium.Env):
    """Show (episode seed, step, pid); 5 to 12 steps by the seed, a success where that is even."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, wait):
        self.wait = wait
        self.episode_seed = 0
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        self.episode_seed = seed
        self.steps = 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.episode_seed, self.steps, os.getpid()], np.float32)

    def step(self, action):
        time.sleep(self.wait)
        if not np.isfinite(action).all():
            raise ValueError("the action is not finite")
        self.steps += 1
        end = self.steps == 5 + self.episode_seed % 8
        success = end and self.episode_seed % 2 == 0
        return self._obs(), float(success), success, end and not success, {"success": success}


class Suicide(Counter):
    """An environment that kills its worker as soon as it is played."""

    def reset(self, **_):
        os.kill(os.getpid(), signal.SIGKILL)


class Unwilling(Counter):
    """An environment that stops its worker as soon as it is played."""

    def reset(self, **_):
        os.kill(os.getpid(), signal.SIGSTOP)


class Large(Counter):
    """An environment whose episodes are longer than a pipe holds."""

    def _obs(self):
        return np.concatenate([super()._obs(), np.zeros(50_000, np.float32)])


class Actor(torch.nn.Module):
    """Acts with its only weight, so that a step tells which weights chose it."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), weight))

    def forward(self, obs, rng):
        return np.full((HORIZON, 2), self.weight[0].item(), np.float32)
