"""What the tests of rollout workers share: runners, workers as threads, checks of what arrives."""

import contextlib
import functools
import queue
import threading
import time
from types import SimpleNamespace

import numpy as np
from counter import HORIZON, LIMIT, Actor, Counter

from arms.pipe import flat
from distributed import Rollouts
from distributed.worker import play


class Threads:
    """Workers as threads of this process: the quickest pull and push there are."""

    start_limit = 60.0

    def __init__(self, count, vector):
        self.taken = [0] * count
        self.pulls = [0] * count
        self.queue = queue.Queue()
        self.version = 0
        self.stopped = False
        self.publish(vector)

    def start(self, job):
        def pull(known):
            if self.stopped:
                raise EOFError
            self.pulls[job.slot] += 1
            version, weights = self.newest
            return version, None if version == known else weights, self.taken[job.slot]

        def push(episode):
            self.queue.put((job.slot, job.attempt, episode))

        def run():
            with contextlib.suppress(EOFError):
                play(job, pull, push)

        threading.Thread(target=run, daemon=True).start()

    def publish(self, vector):
        self.version += 1
        self.newest = self.version, vector.numpy().copy()

    def take(self, seconds):
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self.queue.get(timeout=seconds or 1e-3))
            while True:
                found.append(self.queue.get_nowait())
        return found

    def signs_of_life(self):
        return list(self.pulls)

    def close(self):
        self.stopped = True


def rollouts(count=1, wait=0.001, seed=0, address=None, actor=None, threads=False, kind=Counter):
    runner = Rollouts(
        actor or Actor(),
        functools.partial(kind, wait),
        episode_limit=LIMIT,
        count=count,
        seed=seed,
        seed_bound=1_000_000,
        horizon=HORIZON,
        interrupt=SimpleNamespace(stop=False),
        address=address,
    )
    if threads:
        runner.crew.close()
        runner.crew = Threads(count, flat(runner.networks))
    return runner


def taken(runner, steps, actor=None):
    """Take so many steps; `actor` learns meanwhile: its weight is the number of steps taken."""
    moves = []
    for i in range(steps):
        moves.append(runner.step())
        if actor is not None:
            actor.weight.data.fill_(i + 1.0)
    return moves


def episodes(moves):
    """Split steps into one list for each episode; the last may be unfinished."""
    parts = [[]]
    for move in moves:
        parts[-1].append(move)
        if move.terminated or move.truncated:
            parts.append([])
    return [part for part in parts if part]


def check_order(moves):
    for part in episodes(moves):
        assert len({move.obs[0] for move in part}) == 1  # one seed
        assert [int(move.obs[1]) for move in part] == list(range(len(part)))
        for a, b in zip(part, part[1:]):
            np.testing.assert_array_equal(a.next_obs, b.obs)
    for part in episodes(moves)[:-1]:
        assert len(part) == 5 + int(part[0].obs[0]) % 8 and part[-1].success == part[-1].terminated


def seeds(moves):
    return [part[0].obs[0] for part in episodes(moves)]


def planned(count, number, seed=0):
    """Seeds of the first episodes of these slots: (count, number)."""
    return [
        [int(np.random.default_rng([seed, 2, slot, n]).integers(1_000_000)) for n in range(number)]
        for slot in range(count)
    ]


def check_sequence(moves, count):
    """Every slot's episodes came in the order of their numbers, from 0, none twice."""
    for plan in planned(count, len(moves)):
        came = [seed for seed in seeds(moves) if seed in plan]
        assert came == plan[: len(came)]


def watched(runner, steps, wait=0.002):
    """Take steps while a learner's weight counts them; return them and their weights' versions."""
    moves, versions = [], []
    for i in range(steps):
        episode, row = runner.waiting[0] if runner.waiting else None, runner.row
        moves.append(runner.step())
        episode = episode or (runner.waiting[0] if runner.row else None)
        versions.append(episode["version"][row] if episode else versions[-1])
        runner.acting.weight.data.fill_(i + 1.0)
        time.sleep(wait)
    return moves, versions


def check_lead(runner, pause=0.5):
    """When a learner stops its workers do too, soon."""
    time.sleep(pause)
    for _ in range(20):
        runner._receive(0)
    ahead = [0] * len(runner.received)
    for episode in runner.waiting:
        ahead[episode["slot"]] += len(episode["reward"])
    if runner.waiting:
        ahead[runner.waiting[0]["slot"]] -= runner.row
    assert max(ahead) <= LIMIT + 2 * HORIZON and sum(ahead) > 0


def workers(runner):
    return [process.pid for process in runner.crew.workers]
