"""A rollout worker: plays whole episodes with the newest weights there are.

    from distributed.worker import Job, play
    play(job, pull, push)                    # until pull or push raises

pull(version) returns the newest version, its weights (one vector, None if that version is the known
one) and how many steps of this worker the learner has taken. push(episode) hands over a finished
episode, a dict of arrays. Every call of pull is a sign of life. With the same weights an episode is
a function of (seed, slot, number).
Not here: who answers (processes.py, cluster.py).

Shapes: T steps of an episode (not the paper's T, a chunk's), D observation, A action, H chunk.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

import envs
from arms.pipe import unflatten

Pull = Callable[[int], tuple[int, np.ndarray | None, int]]
Push = Callable[[dict[str, Any]], None]


@dataclass
class Job:
    """What a worker plays.

    slot: the worker's number. attempt: how often this slot was started. number: of its first
    episode. played: steps of this slot before that. seed_bound: episodes' seeds are below it.
    """

    slot: int
    attempt: int
    number: int
    played: int
    acting: Any
    make_env: Callable[[], gymnasium.Env]
    episode_limit: int
    seed: int
    seed_bound: int
    horizon: int


def networks_of(acting: Any) -> list[nn.Module]:
    """List the networks of what acts: itself, or what it holds."""
    parts = [acting] if isinstance(acting, nn.Module) else vars(acting).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def play(job: Job, pull: Pull, push: Push) -> None:
    """Play the job's episodes one after another, for ever."""
    torch.set_num_threads(1)
    player = Player(job, pull)
    number = job.number
    while True:
        push(player.episode(number))
        number += 1


class Player:
    """An environment, networks that follow the learner's, and how far ahead of it they are."""

    def __init__(self, job: Job, pull: Pull):
        self.job = job
        self.pull = pull
        self.env = job.make_env()
        self.networks = networks_of(job.acting)
        self.version = -1
        self.played = job.played
        # A worker may be ahead by so many steps. With less than an episode's limit the learner
        # could wait for an episode that its worker may not finish.
        self.lead = job.episode_limit + 2 * job.horizon

    def episode(self, number: int) -> dict[str, Any]:
        """Play an episode: the columns of envs.Transition and the weights' version, (T, ...)."""
        job = self.job
        start_rng = np.random.default_rng([job.seed, 2, job.slot, number])
        act_rng = np.random.default_rng([job.seed, 1, job.slot, number])

        def act(obs):
            self._follow_learner()
            return job.acting(obs[None], act_rng)

        runner = envs.ChunkRunner(self.env, act)
        runner.reset(int(start_rng.integers(job.seed_bound)))
        moves = []
        versions = []
        while not runner.ended:
            moves.append(runner.step())
            versions.append(self.version)
            self.played += 1
        columns = zip(envs.Transition._fields, zip(*moves))
        episode = {name: np.array(column) for name, column in columns}
        episode["version"] = np.array(versions)
        episode["slot"] = job.slot
        episode["number"] = number
        return episode

    def _follow_learner(self) -> None:
        """Take the newest weights; wait while the next chunk would lead too far ahead."""
        while True:
            self.version, vector, taken = self.pull(self.version)
            if vector is not None:
                unflatten(torch.from_numpy(vector), self.networks)
            if self.played + self.job.horizon - taken <= self.lead:
                return
            time.sleep(0.005)
