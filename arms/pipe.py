"""What passes between an acting and a learning process: weights and short messages.

    from arms.pipe import Inbox, Outbox, SharedWeights, fingerprint, flat, unflatten
    weights = SharedWeights([actor, critic], context)     # both processes hold it
    outbox = Outbox(connection, weights)                  # the learner's end of a Pipe()
    outbox.publish(flat([actor, critic]), {"updates": 40})        # returns at once
    version, vector = weights.pull(known)                 # the other process; never waits
    unflatten(vector, [actor, critic])

Needs torch only.
Not here: what the messages say (learner.py), the same between machines (distributed/arm.py).
"""

import hashlib
import os
import select
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def flat(networks: Sequence[nn.Module]) -> Tensor:
    """Concatenate all numbers of these networks, statistics included: one vector on the CPU."""
    values = [value for network in networks for value in network.state_dict().values()]
    return torch.cat([value.detach().cpu().flatten() for value in values])


def unflatten(vector: Tensor, networks: Sequence[nn.Module]) -> None:
    """Write a vector made by `flat` into these networks."""
    values = [value for network in networks for value in network.state_dict().values()]
    parts = vector.split([value.numel() for value in values])
    for value, part in zip(values, parts):
        value.copy_(part.view_as(value))


def fingerprint(networks: Sequence[nn.Module]) -> str:
    """Compute eight digits that two programs share only if they act with the same weights."""
    return hashlib.sha256(flat(networks).numpy().tobytes()).hexdigest()[:8]


class SharedWeights:
    """The newest numbers of some networks, in memory that one writer and its readers share.

    There is no lock, because a process that dies would keep it. The count is odd while the writer
    is writing; a reader that meets this, or sees the count change, takes the numbers later.
    Versions count the publications and never fall; 0 means that nothing was published yet.
    """

    def __init__(self, networks: Sequence[nn.Module], context: Any):
        self.vector = flat(networks).share_memory_()
        self.count = context.Value("l", 0, lock=False)

    def publish(self, vector: Tensor) -> None:
        """Write newer numbers. One process only may do this."""
        self.count.value += 1
        self.vector.copy_(vector)
        self.count.value += 1

    def pull(self, known: int) -> tuple[int, Tensor | None]:
        """Return (version, numbers), or (known, None) where none that are newer can be read now."""
        before = self.count.value
        if before == 2 * known or before % 2:
            return known, None
        vector = self.vector.clone()
        if self.count.value != before:
            return known, None
        return before // 2, vector


class Outbox:
    """The learner's way to the arm: weights, and dicts of numbers, without ever waiting for it.

    The arm reads its messages once an episode, and its operator may take a break. A full pipe must
    not stop the learning, so what does not fit waits here: of every key the newest value.
    """

    def __init__(self, connection: Connection, weights: SharedWeights):
        self.connection = connection
        self.weights = weights
        self.waiting: dict[str, Any] = {}

    def publish(self, vector: Tensor, message: dict[str, Any]) -> None:
        """Publish weights and send what is known about them."""
        self.weights.publish(vector)
        self.send(message)

    def send(self, message: dict[str, Any]) -> None:
        """Send this as soon as there is room. OSError if the reader is gone."""
        self.waiting |= message
        self.flush()

    def flush(self) -> None:
        """Send what waits, if there is room now."""
        # A pipe is writable if most of it is free, far more than a dict of numbers needs.
        if self.waiting and select.select([], [self.connection], [], 0)[1]:
            self.send_last({})

    def send_last(self, message: dict[str, Any]) -> None:
        """Send the last message, which nobody could send later; it fits in any case."""
        self.connection.send(self.waiting | message)
        self.waiting = {}


class Inbox:
    """The way back: the paths of finished episodes. An empty one asks the learner to end."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def get(self, seconds: float) -> Path | None:
        """Return the next path, None if none comes in so many seconds. EOFError at the end."""
        if not self.connection.poll(seconds):
            return None
        name = self.connection.recv_bytes()
        if not name:
            raise EOFError
        return Path(os.fsdecode(name))
