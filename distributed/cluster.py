"""Rollout workers as actors of a Ray cluster: the same pull and push, through one small actor.

    python train_online.py --task lift --rollouts 4 --ray local     # starts Ray on this machine
    python train_online.py --task lift --rollouts 64 --ray 10.0.0.2:6379    # joins a cluster
    from distributed.cluster import Actors, connect, make_hub

The hub lives beside the learner. It holds references to the newest weights and the episodes on
their way, nothing else, so it always answers. Weights and episodes are numpy, so torch may differ
between machines; Python, Ray and numpy may not.
Whoever reaches Ray's ports can run code there. So an address that is not this machine's needs Ray's
token authentication: export RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN on every machine, also
before `ray start`. A token is no encryption: use a private network. Dashboard and usage statistics
are off. Ray is imported here and in arm.py only, when asked for: pip install ray==2.60.0
Not here: what a worker does (worker.py), when it is replaced (rollouts.py), an arm's learner
(arm.py).
"""

import contextlib
import math
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logbook import UserError

from .worker import Job, play

TIMEOUT = 60.0  # seconds for any one call
REFRESH = 0.1  # seconds between two sets of weights, published or asked for
STORE = 256 << 20  # bytes of shared memory of a Ray started here


# ---- connecting ----------------------------------------------------------------------------------


def connect(address: str, cpus: int | None = None) -> Any:
    """Return the ray module, connected. UserError if it is missing, unsafe or not there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # It listens on every interface, so it gets a token that nobody else has.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not has_token():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # The default niceness is 15: on few cores nothing would arrive.
        os.environ.setdefault("RAY_worker_niceness", "0")
    elif not loopback(address) and not requires_token():
        raise UserError(
            f"{address} is another machine, and anyone who reaches Ray's ports can run code: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here and wherever `ray start` ran"
        )
    try:
        import ray
    except ImportError:
        raise UserError("this needs Ray: pip install ray==2.60.0") from None
    if not ray.is_initialized():
        options = {"log_to_driver": False}
        if address == "local":
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE}
        with own_signals():
            try:
                ray.init(address, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"no Ray at {address}: {reason}") from error
    return ray


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Keep our signal handlers: Ray takes SIGTERM for itself and ends at once, without saving."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def loopback(address: str) -> bool:
    """Say whether an address is this machine's own."""
    host = address.rpartition("://")[2]
    if host != "::1":
        host = re.sub(r":\d+$", "", host).strip("[]")
    if host in ("localhost", "::1"):
        return True
    return host.startswith("127.") and host.replace(".", "").isdigit()


def requires_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE") == "token" and has_token()


def has_token() -> bool:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


# ---- the hub -------------------------------------------------------------------------------------


def hub_class() -> type:
    """Return the hub's class.

    It stands in a function so that Ray sends all of it, and its process starts without torch.
    """

    class Hub:
        """Versioned weights one way, items the other, a note for each slot. No Ray in here."""

        def __init__(self, slots):
            self.version = 0
            self.weights = None
            self.notes = [0] * slots
            self.items = []
            self.signs = {}

        def publish(self, version, weights, notes):
            """Keep the newest notes, and weights unless they are None.

            weights is a list of one reference, so that Ray does not fetch what it refers to.
            """
            self.version = version
            self.notes = notes
            if weights is not None:
                self.weights = weights

        def pull(self, version, slot, sender=None, signs=0):
            """Return the version, its weights unless that is the known one, and the slot's note.

            signs: how many signs of life the sender has given so far.
            """
            self.signs[sender] = signs
            weights = None if version == self.version else self.weights
            return self.version, weights, self.notes[slot]

        def push(self, sender, item):
            self.items.append((sender, item))

        def take(self):
            """Return every (sender, item) once."""
            items = self.items
            self.items = []
            return items

        def arrivals(self):
            """Return what `take` does, and the signs of life of every sender."""
            return self.take(), dict(self.signs)

    return Hub


def make_hub(ray: Any, slots: int) -> Any:
    """Start a hub on this machine: it must not die with another."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(hub_class()).options(num_cpus=0, scheduling_strategy=here).remote(slots)


# ---- a worker ------------------------------------------------------------------------------------


class Feed:
    """Answers a worker's `pull` at once with what a thread has fetched from the hub."""

    def __init__(self, hub: Any, job: Job):
        self.hub = hub
        self.slot = job.slot
        self.sender = (job.slot, job.attempt)
        self.pulls = 0
        self.newest = (0, None, 0)  # version, weights, steps taken from this slot
        self.error: Exception | None = None
        self._fetch()
        threading.Thread(target=self._follow, daemon=True).start()

    def pull(self, known: int) -> tuple[int, np.ndarray | None, int]:
        if self.error is not None:
            raise ConnectionError("the learner is gone") from self.error
        self.pulls += 1
        version, vector, taken = self.newest
        return version, None if version == known else vector, taken

    def _fetch(self) -> None:
        import ray

        known, vector, _ = self.newest
        call = self.hub.pull.remote(known, self.slot, self.sender, self.pulls)
        version, weights, taken = ray.get(call, timeout=TIMEOUT)
        if weights:
            vector = np.array(ray.get(weights[0], timeout=TIMEOUT))
        self.newest = (version, vector, taken)

    def _follow(self) -> None:
        try:
            while True:
                time.sleep(REFRESH)  # asking more often only costs the learner its speed
                self._fetch()
        except Exception as error:  # of any kind: the worker must not go on with old weights
            self.error = error


class RolloutActor:
    """What Ray makes an actor of."""

    def run(self, hub: Any, job: Job) -> None:
        """Play until the learner is gone."""
        import ray

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's
        sender = (job.slot, job.attempt)

        def push(item):
            ray.get(hub.push.remote(sender, item), timeout=TIMEOUT)

        try:
            play(job, Feed(hub, job).pull, push)
        except (ConnectionError, ray.exceptions.RayError):
            raise  # that is a death
        except Exception as error:
            push(f"{type(error).__name__}: {error}")
            time.sleep(TIMEOUT)  # so that this is heard before the call's end is


# ---- the learner's side --------------------------------------------------------------------------


class Actors:
    """The same as Processes, on a cluster. `taken` counts the steps taken from each slot."""

    start_limit = math.inf  # Ray may have no room for a worker yet

    def __init__(self, count: int, vector: Tensor, address: str):
        self.is_ours = address == "local"
        self.ray = connect(address, count)
        cpus = self.ray.cluster_resources().get("CPU", 0)
        if cpus < count:
            print(
                f"the cluster has {cpus:.0f} CPUs: {count - cpus:.0f} rollout workers wait",
                flush=True,
            )
        self.hub = make_hub(self.ray, count)
        self.workers: list[Any] = [None] * count
        self.attempts = [0] * count
        self.calls: dict[Any, tuple[int, int]] = {}  # the calls that run -> (slot, attempt)
        self.taken = [0] * count
        self.signs: dict[tuple[int, int], int] = {}
        self.version = 0
        self.published = -math.inf
        self.question: Any = None  # what the hub has not answered yet
        self.asked = 0.0
        self.publish(vector)

    def start(self, job: Job) -> None:
        """Start a worker in its slot; one that is there is killed."""
        if self.workers[job.slot] is not None:
            self.ray.kill(self.workers[job.slot])
        actor = self.ray.remote(RolloutActor).options(num_cpus=1, max_restarts=0).remote()
        self.workers[job.slot] = actor
        self.attempts[job.slot] = job.attempt
        self.calls[actor.run.remote(self.hub, job)] = (job.slot, job.attempt)

    def publish(self, vector: Tensor) -> None:
        """Publish the counts at once, weights every REFRESH seconds: they fill the network."""
        weights = None
        now = time.monotonic()
        if now - self.published > REFRESH:
            self.published = now
            self.version += 1
            weights = [self.ray.put(vector.numpy())]
        self.hub.publish.remote(self.version, weights, list(self.taken))

    def take(self, seconds: float) -> list[tuple[int, int, Any]]:
        """Return (slot, attempt, item) of all that has arrived, waiting at most this long."""
        end = time.monotonic() + seconds
        while True:
            # Deaths first: what the dead still sent is then in the hub.
            deaths = self._deaths()
            items = self._arrivals(max(end - time.monotonic(), 0.01))
            found = [(slot, attempt, own(item)) for (slot, attempt), item in items]
            found += [(slot, attempt, None) for slot, attempt in deaths]
            if found or time.monotonic() >= end:
                return found
            time.sleep(0.02)

    def signs_of_life(self) -> list[int]:
        """Return how often each worker has asked for weights since it was started."""
        return [self.signs.get(sender, 0) for sender in enumerate(self.attempts)]

    def _arrivals(self, seconds: float) -> list[tuple[tuple[int, int], Any]]:
        """Ask the hub; an answer that takes longer comes with the next call."""
        if self.question is None:
            self.question = self.hub.arrivals.remote()
            self.asked = time.monotonic()
        try:
            answered, _ = self.ray.wait([self.question], timeout=seconds)
            if answered:
                self.question = None
                items, self.signs = self.ray.get(answered[0], timeout=TIMEOUT)
                return items
        except self.ray.exceptions.RayError as error:
            name = type(error).__name__
            raise UserError(f"Ray does not answer ({name}): see to it, then --resume") from error
        if time.monotonic() - self.asked > TIMEOUT:
            raise UserError("Ray does not answer: see to it, then --resume")
        return []

    def _deaths(self) -> list[tuple[int, int]]:
        """Return the workers whose call has ended."""
        ended, _ = self.ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)
        return [self.calls.pop(call) for call in ended]

    def close(self) -> None:
        for actor in (*self.workers, self.hub):
            if actor is not None:
                self.ray.kill(actor)
        if self.is_ours:
            self.ray.shutdown()


def own(item: Any) -> Any:
    """Copy the arrays of an episode, because Ray's are read-only; return anything else as it is."""
    if not isinstance(item, dict):
        return item
    return {name: np.array(x) if np.ndim(x) else x for name, x in item.items()}
