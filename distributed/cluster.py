"""Rollout workers as actors of a Ray cluster: the same pull and push as between processes, through one small actor.

    python train_online.py --task lift --rollouts 4 --ray local            # starts Ray on this machine
    python train_online.py --task lift --rollouts 64 --ray 10.0.0.2:6379   # joins a cluster; this machine is one of it

The hub lives beside the learner: references to the newest weights and the episodes on their way, nothing else, so it
always answers. Weights and episodes are numpy, so torch may differ between machines; Python, Ray and numpy may not.
Whoever reaches Ray's ports can run code there, so an address that is not this machine's needs Ray's token
authentication: export RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN on every machine, before `ray start` too. A token
is no encryption: use a private network. Dashboard and usage statistics are off.
Ray is imported here and in arm.py only, when asked for: pip install ray==2.60.0
Not here: what a worker does (__init__.py), an arm's learner (arm.py).
"""
import contextlib
import os
import re
import secrets
import signal
import threading
import time
from pathlib import Path

import numpy as np

from logbook import UserError

from . import play

TIMEOUT = 60.0                                 # seconds for any one call
REFRESH = 0.1                                  # seconds between two sets of weights, published or asked for
STORE = 256 << 20                              # bytes of shared memory of a Ray started here


def connect(address, cpus=None):
    """The ray module, connected; UserError if it is missing, unsafe or not there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":                     # it listens on every interface, so it gets a token that nobody else has
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_worker_niceness", "0")      # 15 otherwise: where cores are few nothing would arrive
        if not has_token():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif not loopback(address) and not (os.environ.get("RAY_AUTH_MODE") == "token" and has_token()):
        raise UserError(f"{address} is another machine, and anyone who reaches Ray's ports can run code: set "
                        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here and wherever `ray start` ran")
    try:
        import ray
    except ImportError:
        raise UserError("this needs Ray: pip install ray==2.60.0") from None
    if not ray.is_initialized():
        local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE}
        with own_signals():
            try:
                ray.init(address, log_to_driver=False, **local if address == "local" else {})
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(f"no Ray at {address}: {str(error).splitlines()[0]}") from error
    return ray


@contextlib.contextmanager
def own_signals():
    """Ray takes SIGTERM for itself; what it ended at once should be saved first."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def loopback(address):
    host = address.rpartition("://")[2]
    host = host if host == "::1" else re.sub(r":\d+$", "", host).strip("[]")
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


def has_token():
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


def hub_class():
    """Class of the hub; in a function, so that Ray sends all of it and its process starts without importing torch."""
    class Hub:
        """Versioned weights one way, episodes the other; a note for each slot. No Ray in here."""

        def __init__(self, slots):
            self.version, self.weights, self.notes, self.items = 0, None, [0] * slots, []

        def publish(self, version, weights, notes):
            """weights is a list of one reference, so that Ray does not fetch what it refers to; None: the same."""
            self.version, self.notes, self.weights = version, notes, weights or self.weights

        def pull(self, version, slot):
            return self.version, None if version == self.version else self.weights, self.notes[slot]

        def push(self, slot, item):
            self.items.append((slot, item))

        def take(self):
            items, self.items = self.items, []
            return items

    return Hub


def own(item):
    """An episode whose arrays are not Ray's read-only ones; anything else as it is."""
    return {name: np.array(x) if np.ndim(x) else x for name, x in item.items()} if isinstance(item, dict) else item


def make_hub(ray, slots):
    """On this machine: it must not die with another."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(hub_class()).options(num_cpus=0, scheduling_strategy=here).remote(slots)


class Feed:
    """pull(version) of one slot, answered from what a thread has fetched in the background."""

    def __init__(self, hub, slot):
        self.hub, self.slot, self.newest, self.error = hub, slot, (0, None, 0), None
        self._fetch()
        threading.Thread(target=self._follow, daemon=True).start()

    def _fetch(self):
        import ray
        version, weights, note = ray.get(self.hub.pull.remote(self.newest[0], self.slot), timeout=TIMEOUT)
        vector = np.array(ray.get(weights[0], timeout=TIMEOUT)) if weights else self.newest[1]
        self.newest = version, vector, note

    def _follow(self):
        try:
            while True:
                time.sleep(REFRESH)            # asking more often only costs the learner its speed
                self._fetch()
        except Exception as error:             # whatever it is, the worker must not go on with old weights for ever
            self.error = error

    def pull(self, known):
        if self.error is not None:
            raise ConnectionError("the learner is gone") from self.error
        version, vector, note = self.newest
        return version, vector if version != known else None, note


class Worker:
    """What Ray makes an actor of."""

    def run(self, hub, slot, job):
        import ray
        signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C is the learner's

        def push(item):
            ray.get(hub.push.remote(slot, item), timeout=TIMEOUT)

        try:
            play(Feed(hub, slot).pull, push, **job)
        except (OSError, ray.exceptions.RayError):
            raise                                          # died
        except Exception as error:
            push(f"{type(error).__name__}: {error}")
            time.sleep(TIMEOUT)                            # so that this is heard before the end of the call is


class Actors:
    """The same as Processes, on a cluster. `taken` counts the steps the learner has taken from each slot."""

    def __init__(self, count, vector, address):
        self.ours, self.ray = address == "local", connect(address, count)
        cpus = self.ray.cluster_resources().get("CPU", 0)
        if cpus < count:
            print(f"the cluster has {cpus:.0f} CPUs: {count - cpus:.0f} rollout workers wait for more", flush=True)
        self.hub, self.workers, self.futures = make_hub(self.ray, count), [None] * count, [None] * count
        self.taken, self.version, self.since = [0] * count, 0, 0.0
        self.publish(vector)

    def _call(self, reference):
        try:
            return self.ray.get(reference, timeout=TIMEOUT)
        except self.ray.exceptions.RayError as error:
            raise UserError(f"Ray does not answer ({type(error).__name__}): see to it, then --resume") from error

    def start(self, slot, job):
        self.workers[slot] = self.ray.remote(Worker).options(num_cpus=1, max_restarts=0).remote()
        self.futures[slot] = self.workers[slot].run.remote(self.hub, slot, job)

    def publish(self, vector):
        """The counts at once; weights once in REFRESH seconds, so that large ones do not fill the network."""
        weights, now = None, time.monotonic()
        if now - self.since > REFRESH:
            weights, self.since, self.version = [self.ray.put(vector.numpy())], now, self.version + 1
        self.hub.publish.remote(self.version, weights, list(self.taken))

    def take(self, seconds):
        end = time.monotonic() + seconds
        while True:
            dead = [(slot, None) for slot in self._dead()]           # first: what they still sent is then in the hub
            found = self._call(self.hub.take.remote()) + dead
            if found or time.monotonic() >= end:
                return [(slot, own(item)) for slot, item in found]
            time.sleep(0.02)

    def _dead(self):
        over, _ = self.ray.wait(self.futures, num_returns=len(self.futures), timeout=0)
        return [slot for slot, future in enumerate(self.futures) if future in over]

    def close(self):
        for actor in (*filter(None, self.workers), self.hub):
            self.ray.kill(actor)
        if self.ours:
            self.ray.shutdown()
