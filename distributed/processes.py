"""Rollout workers as processes of this machine.

    crew = Processes(count, networks)
    crew.start(job)                          # worker.Job
    crew.publish(flat(networks))             # newer weights
    for slot, attempt, item in crew.take(0.5): ...
    crew.close()

Weights lie in shared memory. Episodes come through one pipe per worker, and a thread reads each, so
the learner never waits for a worker that stops in the middle of a message.
Not here: what they play (worker.py), when they are replaced (rollouts.py).
"""

import contextlib
import pickle
import queue
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, multiprocessing, nn

from arms.pipe import SharedWeights, flat

from .worker import Job, play


class Processes:
    """Starts, feeds and ends the workers. `taken` counts the steps taken from each slot.

    An item of `take` is an episode, the text of an error, or None for a worker that has died.
    """

    start_limit = 600.0  # seconds that a worker may take until it first asks for weights

    def __init__(self, count: int, networks: Sequence[nn.Module]):
        self.context = multiprocessing.get_context("spawn")  # fork copies torch's locked threads
        self.weights = SharedWeights(networks, self.context)
        self.publish(flat(networks))
        self.taken = torch.zeros(count, dtype=torch.long).share_memory_()
        self.pulls = torch.zeros(count, dtype=torch.long).share_memory_()
        self.workers: list[Any] = [None] * count
        self.arrivals: queue.SimpleQueue = queue.SimpleQueue()

    def start(self, job: Job) -> None:
        """Start a worker in its slot; one that is there is killed."""
        self._kill(job.slot)
        self.pulls[job.slot] = 0
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=serve,
            daemon=True,
            name=f"rollout-{job.slot}",
            args=(theirs, packed(job), job.slot, self.weights, self.taken, self.pulls),
        )
        process.start()
        theirs.close()  # so that the process's death is the end of the pipe
        self.workers[job.slot] = process
        listener = threading.Thread(
            target=listen, args=(ours, job.slot, job.attempt, self.arrivals), daemon=True
        )
        listener.start()

    def publish(self, vector: Tensor) -> None:
        self.weights.publish(vector)

    def take(self, seconds: float) -> list[tuple[int, int, Any]]:
        """Return (slot, attempt, item) of all that has arrived, waiting at most this long."""
        found = []
        with contextlib.suppress(queue.Empty):
            if seconds > 0:
                found.append(self.arrivals.get(timeout=seconds))
            while True:
                found.append(self.arrivals.get_nowait())
        return found

    def signs_of_life(self) -> list[int]:
        """Return how often each worker has asked for weights since it was started."""
        return self.pulls.tolist()

    def close(self) -> None:
        for slot in range(len(self.workers)):
            self._kill(slot)

    def _kill(self, slot: int) -> None:
        process = self.workers[slot]
        if process is not None:
            process.kill()  # also ends one that is stopped
            process.join(5)


def packed(job: Job) -> Tensor:
    """Pickle a job into shared memory.

    Through the pipe that starts a process, its megabytes would make us wait until it reads them.
    """
    return torch.frombuffer(bytearray(pickle.dumps(job)), dtype=torch.uint8).share_memory_()


def listen(connection: Any, slot: int, attempt: int, arrivals: queue.SimpleQueue) -> None:
    """Hand on what a worker sends, and None at its end. Runs in a thread."""
    with connection:
        try:
            while True:
                arrivals.put((slot, attempt, connection.recv()))
        except (EOFError, OSError):
            arrivals.put((slot, attempt, None))


def serve(
    connection: Any,
    payload: Tensor,
    slot: int,
    weights: SharedWeights,
    taken: Tensor,
    pulls: Tensor,
) -> None:
    """Run a worker's process. It ends with its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent handles these, and kills us
    parent = multiprocessing.parent_process()

    def pull(known: int) -> tuple[int, np.ndarray | None, int]:
        if not parent.is_alive():
            raise EOFError
        pulls[slot] += 1
        version, vector = weights.pull(known)
        return version, None if vector is None else vector.numpy(), int(taken[slot])

    try:
        play(pickle.loads(payload.numpy().tobytes()), pull, connection.send)  # from our own parent
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
