"""The far side of distributed/arm.py: an arm's learner on a machine that has a GPU.

    from distributed.arm_learner import HubInbox, HubOutbox, LearnerActor
    actor = ray.remote(LearnerActor).remote()
    actor.learn.remote(hub, args, task, demonstrations, run, episodes)

The hub (cluster.py) on the arm's machine brings files of episodes and takes weights, messages and
checkpoints. What arms.background.learn reads from a pipe and shared memory on one machine, it reads
here from HubInbox and writes to HubOutbox.
Not here: what is learnt (arms/learner.py), the arm's side (arm.py).
"""

import collections
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from arms.background import learn
from arms.episodes import Layout, digest, numbered
from arms.learner import Learner
from logbook import UserError, load_checkpoint, replacing

from .cluster import TIMEOUT

PERIOD = 0.2  # seconds between two questions to the hub


def read(path: Path) -> np.ndarray:
    return np.fromfile(path, np.uint8)


def write(path: Path, data: np.ndarray) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        data.tofile(file)


def digests(folder: Path) -> list[tuple[str, str | None]]:
    """List the episodes of a folder: (name, digest)."""
    return [(path.name, digest(path)) for path in numbered(folder)]


def set_aside(folder: Path, kept: dict[str, str | None]) -> None:
    """Rename the copies here of what the arm has deleted or recorded again.

    kept: {name: digest}, all that the arm has. What it recorded again is then missing here: it is
    sent, and read as a new one.
    """
    for path in numbered(folder):
        if kept.get(path.name) != digest(path):
            path.replace(path.with_suffix(".gone"))


class HubInbox:
    """Where the learner finds episodes: files that the hub brings, written into its own folder."""

    def __init__(self, ray: Any, hub: Any, folder: Path):
        self.ray = ray
        self.hub = hub
        self.folder = folder
        self.paths: collections.deque[Path | None] = collections.deque()  # None: the end
        self.asked = 0.0

    def get(self, seconds: float) -> Path | None:
        """Return the next path, None if none comes in so many seconds. EOFError at the end."""
        if not self.paths and time.monotonic() - self.asked > PERIOD:
            self.asked = time.monotonic()
            for name, data in answer(self.ray, self.hub.take.remote()):
                self.paths.append(self._stored(name, data) if name else None)
        if not self.paths:
            time.sleep(seconds)
            return None
        path = self.paths.popleft()
        if path is None:
            raise EOFError
        return path

    def _stored(self, name: str, data: np.ndarray) -> Path:
        path = self.folder / name
        try:
            write(path, data)  # also over one that the arm has recorded again
        except OSError as error:  # as it is, it would pass for the end of the arm
            raise UserError(f"cannot write {path} on its machine: {error.strerror}") from error
        return path


class HubOutbox:
    """Where the learner puts weights, messages, what it has, and its newest checkpoint.

    The hub keeps the last note only, so a note holds all that was ever said, last messages above
    all.
    """

    def __init__(self, ray: Any, hub: Any, folder: Path):
        self.ray = ray
        self.hub = hub
        self.folder = folder
        self.version = answer(ray, hub.pull.remote(-1, 0))[0]  # it never falls, whoever learns
        self.stats: dict[str, Any] = {}
        self.count = 0
        self.stamp: int | None = None  # when the checkpoint was written
        self.checkpoint: list | None = None  # one reference to it

    def publish(self, vector: Tensor, message: dict[str, Any]) -> None:
        """Publish weights and what is known about them."""
        self.version += 1
        self._send([self.ray.put(vector.numpy())], message)

    def send(self, message: dict[str, Any]) -> None:
        self._send(None, message)

    def send_last(self, message: dict[str, Any]) -> None:
        self._send(None, message)

    def flush(self) -> None:
        """Nothing waits here: the hub always answers."""

    def _send(self, weights: list | None, message: dict[str, Any]) -> None:
        self.stats |= message
        self.count += 1
        last = self.folder / "last.pt"
        if last.exists() and last.stat().st_mtime_ns != self.stamp:
            self.stamp = last.stat().st_mtime_ns
            self.checkpoint = [self.ray.put(read(last))]
        note = {
            "stats": self.stats,
            "count": self.count,
            "have": digests(self.folder / "episodes"),
            "stamp": self.stamp,
            "checkpoint": self.checkpoint,
        }
        answer(self.ray, self.hub.publish.remote(self.version, weights, [note]))


def answer(ray: Any, call: Any) -> Any:
    """Wait for the hub. Without an answer EOFError, at which the learner saves and ends."""
    try:
        return ray.get(call, timeout=TIMEOUT)
    except ray.exceptions.RayError as error:
        raise EOFError from error


class LearnerActor:
    """What Ray makes an actor of: stage I if it is still to do, then arms.background.learn."""

    def learn(
        self,
        hub: Any,
        args: Any,
        task: Layout,
        demonstrations: dict[str, np.ndarray],
        run: str,
        episodes: dict[str, str | None],
    ) -> None:
        """Learn until the hub says that it is the end.

        demonstrations: {name: content}. run: a name under runs/. episodes: {name: digest}, those of
        the arm.
        """
        import ray

        folder = Path("runs") / run
        last = folder / "last.pt"
        set_aside(folder / "episodes", episodes)
        recorded = folder / "demos"
        for name, data in demonstrations.items():
            write(recorded / name, data)
        set_aside(recorded, {name: digest(recorded / name) for name in demonstrations})
        data = recorded
        if len(demonstrations) == 1:
            data = recorded / next(iter(demonstrations))
        args = dataclasses.replace(args, run_dir=str(folder), data=str(data))
        outbox = HubOutbox(ray, hub, folder)
        outbox.send({})  # it has begun

        def save(learner):
            learner.save(last)
            outbox.send({})

        try:
            learner = Learner(args, task)
            if last.exists():
                learner.load_state_dict(load_checkpoint(last), folder / "episodes")
            learner.pretrain(save)
        except UserError as error:
            outbox.send_last({"failed": str(error)})
            return
        del learner  # the next one starts from last.pt
        learn(args, task, HubInbox(ray, hub, folder / "episodes"), outbox)
        outbox.send({})
