"""The interaction thread of Algorithm 1 outside the learner's process.

    runner = Rollouts(acting, make_env, episode_limit=300, count=4, seed=0, seed_bound=1_000_000,
                      horizon=5, interrupt=interrupt)
    move = runner.step()                     # an envs.Transition; None once the user interrupted
    runner.close()

Takes the place of envs.ChunkRunner in train_online.Interaction. The learner takes the workers'
steps one at a time and in order, so it still owes exactly updates_per_step updates for each. A
worker is at most one episode limit and two chunks ahead. A worker that dies or stands still is
reported and replaced, and its unfinished episode is played again from its start, with the weights
of that moment; so it is after --resume. A run with workers is no function of its seed: which
weights are the newest is a matter of time.
Not here: what a worker does (worker.py), the ways to it (processes.py, cluster.py).

Shapes: T steps of an episode, D observation, A action, H chunk.
"""

import collections
import copy
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

import envs
from arms.pipe import flat
from logbook import Interrupt, UserError

from .processes import Processes
from .worker import Job, networks_of

PATIENCE = 3  # losses in a row, without an episode in between, that a worker is forgiven
STANDSTILL = 60.0  # seconds between two signs of life after which a worker is replaced


class Rollouts:
    """Hands out the steps that `count` workers have played, one episode after another.

    acting(obs (1, D), rng) -> chunk (H, A) acts, with the weights that its networks have at the
    time. make_env() builds a worker's environment; both must be picklable. Seeds of episodes are
    below seed_bound. address: of a Ray cluster, "local" to start one, None for processes here.
    """

    def __init__(
        self,
        acting: Callable,
        make_env: Callable[[], gymnasium.Env],
        *,
        episode_limit: int,
        count: int,
        seed: int,
        seed_bound: int,
        horizon: int,
        interrupt: Interrupt,
        address: str | None = None,
    ):
        self.acting = acting
        self.networks = networks_of(acting)
        self.make_env = make_env
        self.episode_limit = episode_limit
        self.seed = seed
        self.seed_bound = seed_bound
        self.horizon = horizon
        self.interrupt = interrupt
        self.crew = self._open_crew(count, address)
        self.watch = Watch(count, self.crew.start_limit)
        self.started = False
        self.waiting: collections.deque[dict[str, Any]] = collections.deque()  # finished episodes
        self.row = 0  # next step of the first one
        self.steps = 0
        self.numbers = [0] * count  # per slot: number of the next episode
        self.received = [0] * count  # steps so far
        self.losses = [0] * count  # in a row, without an episode in between
        self.attempts = [0] * count  # starts

    def _open_crew(self, count, address):
        if address is None:
            return Processes(count, self.networks)
        from .cluster import Actors

        return Actors(count, flat(self.networks), address)

    def reset(self, seed: int | None = None) -> None:
        """Go on to the next episode, whose seed its worker has chosen."""

    def step(self) -> envs.Transition | None:
        """Return the next step. Waits for a worker; None if the user interrupts that."""
        if not self.started:
            self.started = True
            for slot in range(len(self.numbers)):
                self._start(slot)
        if self.steps % self.horizon == 0 or not self.waiting:
            self.crew.publish(flat(self.networks))
            self._receive(0)
        while not self.waiting:
            if self.interrupt.stop:
                return None
            self._receive(0.5)
        episode = self.waiting[0]
        columns = [episode[name][self.row] for name in envs.Transition._fields]
        self.crew.taken[episode["slot"]] += 1
        self.steps += 1
        self.row += 1
        if self.row == len(episode["reward"]):
            self.waiting.popleft()
            self.row = 0
        return envs.Transition(*columns)

    def _start(self, slot: int) -> None:
        self.attempts[slot] += 1
        self.watch.reset(slot)
        job = Job(
            slot=slot,
            attempt=self.attempts[slot],
            number=self.numbers[slot],
            played=self.received[slot],
            acting=copy.deepcopy(self.acting).to("cpu"),
            make_env=self.make_env,
            episode_limit=self.episode_limit,
            seed=self.seed,
            seed_bound=self.seed_bound,
            horizon=self.horizon,
        )
        self.crew.start(job)

    def _receive(self, seconds: float) -> None:
        """Take what has arrived, waiting at most this long; replace workers that are lost."""
        for slot, attempt, item in self.crew.take(seconds):
            if attempt != self.attempts[slot]:
                continue  # from a worker that was replaced
            if item is None:
                self._replace(slot, "died")
            elif isinstance(item, str):
                raise UserError(f"rollout worker {slot} failed: {item}")
            else:
                self._keep(item)
        for slot in self.watch.silent(self.crew.signs_of_life()):
            self._replace(slot, f"has stood still for {self.watch.seconds[slot]:.0f} s")

    def _keep(self, episode: dict[str, Any]) -> None:
        slot = episode["slot"]
        self.waiting.append(episode)
        self.received[slot] += len(episode["reward"])
        self.numbers[slot] = episode["number"] + 1
        self.losses[slot] = 0

    def _replace(self, slot: int, what: str) -> None:
        self.losses[slot] += 1
        if self.losses[slot] > PATIENCE:
            raise UserError(
                f"rollout worker {slot} was lost {self.losses[slot]} times in a row; the last one "
                f"{what}. Out of memory? Try fewer --rollouts"
            )
        print(
            f"rollout worker {slot} {what}; a new one plays episode {self.numbers[slot]} from its "
            "start",
            file=sys.stderr,
            flush=True,
        )
        self._start(slot)

    def state_dict(self) -> dict[str, Any]:
        """Return the episodes still to learn from, the first from where it is; slots' numbers."""
        waiting = [dict(episode) for episode in self.waiting]
        if waiting:
            for name in (*envs.Transition._fields, "version"):
                waiting[0][name] = waiting[0][name][self.row :]
        return {"waiting": waiting, "numbers": self.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from there, before the first step; the number of workers may differ.

        Returns True: recorded episodes need not be played again, so they always continue.
        """
        count = len(self.numbers)
        for slot, number in enumerate(state["numbers"][:count]):
            self.numbers[slot] = number
        for episode in state["waiting"]:
            slot = episode["slot"] % count
            loaded = {"slot": slot, "number": episode["number"]}
            for name in (*envs.Transition._fields, "version"):
                loaded[name] = np.asarray(episode[name])
            self.waiting.append(loaded)
            self.received[slot] += len(loaded["reward"])
        return True

    def close(self) -> None:
        self.crew.close()


class Watch:
    """Finds workers that stand still, stopped or swapped out: their signs of life end.

    Only time in which the learner itself was awake counts. Otherwise all workers would look silent
    after a long evaluation, or after a laptop has slept. start_limit: seconds until the first sign;
    imports may take minutes.
    """

    def __init__(self, count: int, start_limit: float):
        self.start_limit = start_limit
        self.signs = [0] * count
        self.seconds = [0.0] * count  # since the last sign
        self.looked = time.monotonic()

    def reset(self, slot: int) -> None:
        """Begin anew with a new worker."""
        self.signs[slot] = 0
        self.seconds[slot] = 0.0

    def silent(self, signs: Sequence[int]) -> list[int]:
        """Return the slots that stand still; signs: how many each has given since its start."""
        now = time.monotonic()
        passed = min(now - self.looked, 1.0)
        self.looked = now
        found = []
        for slot, sign in enumerate(signs):
            if sign == self.signs[slot]:
                self.seconds[slot] += passed
            else:
                self.signs[slot] = sign
                self.seconds[slot] = 0.0
            limit = STANDSTILL if sign > 0 else self.start_limit
            if self.seconds[slot] > limit:
                found.append(slot)
        return found
