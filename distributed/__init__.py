"""Algorithm 1's interaction thread outside the learner's process: rollout workers, here or on a Ray cluster.

    python train_online.py --task lift --rollouts 1               # one process acts while this one learns
    python train_online.py --task lift --rollouts 4 --ray local   # the same workers as Ray actors (cluster.py)
    from distributed import Rollouts                              # what it then runs instead of a ChunkRunner

A worker plays whole episodes and knows two calls, `pull(version)` for weights and `push(episode)`; weights are one
vector of numbers, an episode a dict of arrays. Each chunk is drawn with the newest weights there are. The learner takes
the steps one at a time and in order, so it still owes exactly updates_per_step updates for each. A worker is at most
one episode limit and two chunks ahead of what the learner has taken from it. A worker that dies is told and replaced,
and its unfinished episode played again from its start, by the policy of that day; so it is after --resume. A run is a
function of its seed only without workers: which weights are the newest is a matter of time.
Not here: Ray (cluster.py), an arm's learner on another machine (arm.py), the updates (train_online.py).
Shapes: T steps of an episode (not the paper's T, a chunk's), D observation, A action.
"""
import collections
import contextlib
import copy
import pickle
import signal
import sys
import time
from multiprocessing.connection import wait

import numpy as np
import torch
from torch import multiprocessing

import envs
from arms.pipe import flat, unflatten
from logbook import UserError

PATIENCE = 3                                   # deaths in a row without an episode that a worker is forgiven


def networks(acting):
    """The networks of what acts: itself, or what it holds."""
    own = [acting] if isinstance(acting, torch.nn.Module) else vars(acting).values()
    return [part for part in own if isinstance(part, torch.nn.Module)]


# ---- a worker --------------------------------------------------------------------------------------------------------

def play(pull, push, *, slot, number, played, acting, make, options, seed, bound, horizon):
    """Play episodes `number`, `number` + 1, ... of this slot; each is a function of (seed, slot, number, weights).

    pull(version) -> newest version, its weights or None if that is the same one, steps of this slot the learner took.
    """
    torch.set_num_threads(1)
    env, parts, version = make(**options), networks(acting), -1
    lead = options["episode_limit"] + 2 * horizon      # less than a limit, and the learner could wait for ever
    while True:
        start, rng = (np.random.default_rng([seed, purpose, slot, number]) for purpose in (2, 1))
        moves, versions = [], []

        def act(obs):
            nonlocal version
            version, weights, taken = pull(version)
            while played + len(moves) + horizon - taken > lead:
                time.sleep(0.005)
                version, newer, taken = pull(version)
                weights = weights if newer is None else newer
            if weights is not None:
                unflatten(torch.from_numpy(weights), parts)
            return acting(obs[None], rng)

        runner = envs.ChunkRunner(env, act)
        runner.reset(int(start.integers(bound)))
        while not runner.ended:
            moves.append(runner.step())
            versions.append(version)
        episode = {name: np.array(column) for name, column in zip(envs.Transition._fields, zip(*moves))}   # (T, ...)
        push(episode | {"slot": slot, "number": number, "version": np.array(versions)})
        played, number = played + len(moves), number + 1


def serve(connection, payload, slot, weights, version, taken):
    """A worker's process; it ends with its parent."""
    for interruption in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interruption, signal.SIG_IGN)                  # the parent decides when to stop, and kills us
    parent = multiprocessing.parent_process()

    def pull(known):
        if not parent.is_alive():
            raise EOFError
        before = version.value                                       # odd while it is being written
        if before == known or before % 2:
            return known, None, int(taken[slot])
        vector = weights.numpy().copy()
        return (before, vector, int(taken[slot])) if version.value == before else (known, None, int(taken[slot]))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            play(pull, connection.send, **pickle.loads(payload))     # from our own parent
        except (EOFError, OSError):
            raise
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


class Processes:
    """Workers as processes of this machine; weights in shared memory, without a lock that a dead one could hold.

    `taken` counts the steps the learner has taken from each slot.
    """

    def __init__(self, count, vector):
        self.context = multiprocessing.get_context("spawn")          # fork would copy torch's locked thread pools
        self.weights, self.version = vector.clone().share_memory_(), self.context.Value("l", 2, lock=False)
        self.taken, self.workers = torch.zeros(count, dtype=torch.long).share_memory_(), [None] * count

    def start(self, slot, job):
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=serve, daemon=True, name=f"rollout-{slot}", args=(
            theirs, pickle.dumps(job), slot, self.weights, self.version, self.taken))
        process.start()
        theirs.close()                                               # so that its death is the end of the pipe
        self.workers[slot] = process, ours

    def publish(self, vector):
        self.version.value += 1
        self.weights.copy_(vector)
        self.version.value += 1

    def take(self, seconds):
        """What has arrived, waiting at most this long for a first one: (slot, episode), text of an error, or None."""
        slots, found = {connection: slot for slot, (_, connection) in enumerate(self.workers)}, []
        for connection in wait(list(slots), seconds):
            try:
                found.append((slots[connection], connection.recv()))
            except (EOFError, OSError):
                found.append((slots[connection], None))
        return found

    def close(self):
        for process, connection in filter(None, self.workers):
            connection.close()
            process.kill()
            process.join()


# ---- the learner's end -----------------------------------------------------------------------------------------------

class Rollouts:
    """Stands in for envs.ChunkRunner: `step` hands out what `count` workers have played, one episode after another.

    acting(obs (1, D), rng) -> chunk (H, A) acts, with the weights its networks have at the time; make(**options) is a
    worker's environment, bound limits the episodes' seeds; address: of a Ray cluster, or "local".
    """

    def __init__(self, acting, options, count, seed, bound, horizon, address=None,
                 make=envs.make_env):
        self.acting, self.parts, self.every = acting, networks(acting), horizon
        self.job = {"make": make, "options": options, "seed": seed, "bound": bound, "horizon": horizon}
        if address is None:
            self.crew = Processes(count, flat(self.parts))
        else:
            from .cluster import Actors
            self.crew = Actors(count, flat(self.parts), address)
        self.waiting, self.row, self.steps, self.started = collections.deque(), 0, 0, False
        self.numbers, self.received, self.deaths = ([0] * count for _ in range(3))

    def reset(self, seed=None):
        """The next step is that of another episode, whose worker has chosen its seed."""

    def step(self):
        """The next Transition; waits if no worker has finished an episode."""
        if not self.started:
            self.started = True
            for slot in range(len(self.numbers)):
                self._start(slot)
        if self.steps % self.every == 0 or not self.waiting:
            self.crew.publish(flat(self.parts))
            self._receive(0)
        while not self.waiting:
            self._receive(0.5)
        episode = self.waiting[0]
        move = envs.Transition(*(episode[name][self.row] for name in envs.Transition._fields))
        self.steps, self.row = self.steps + 1, self.row + 1
        self.crew.taken[episode["slot"]] += 1
        if self.row == len(episode["reward"]):
            self.waiting.popleft()
            self.row = 0
        return move

    def _start(self, slot):
        acting = copy.deepcopy(self.acting).to("cpu")
        self.crew.start(slot, self.job | {"slot": slot, "number": self.numbers[slot], "played": self.received[slot],
                                          "acting": acting})

    def _receive(self, seconds):
        for slot, item in self.crew.take(seconds):
            if isinstance(item, str):
                raise UserError(f"rollout worker {slot} failed: {item}")
            if item is None:
                self.deaths[slot] += 1
                if self.deaths[slot] > PATIENCE:
                    raise UserError(f"rollout worker {slot} died {self.deaths[slot]} times in a row: out of memory? "
                                    "Try fewer --rollouts")
                print(f"rollout worker {slot} died; a new one plays episode {self.numbers[slot]} from its start",
                      file=sys.stderr, flush=True)
                self._start(slot)
            else:
                self.waiting.append(item)
                self.received[slot] += len(item["reward"])
                self.numbers[slot], self.deaths[slot] = item["number"] + 1, 0

    def state_dict(self):
        """Episodes nobody has learnt from yet, the first one from where it is, and where each slot goes on."""
        waiting = [dict(episode) for episode in self.waiting]
        for name in (*envs.Transition._fields, "version") if waiting else ():
            waiting[0][name] = waiting[0][name][self.row:]
        return {"waiting": waiting, "numbers": self.numbers}

    def load_state_dict(self, state):
        """Before the first step; with another number of workers, too."""
        count, numbers = len(self.numbers), state["numbers"]
        self.numbers = [numbers[slot] if slot < len(numbers) else 0 for slot in range(count)]
        for episode in state["waiting"]:
            arrays = {name: np.asarray(value) for name, value in episode.items() if name not in ("slot", "number")}
            self.waiting.append(arrays | {"slot": episode["slot"] % count, "number": episode["number"]})
            self.received[episode["slot"] % count] += len(arrays["reward"])

    def close(self):
        self.crew.close()
