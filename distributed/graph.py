"""An update as one captured CUDA graph, so that a GPU never waits for Python.

    python train_online.py --task lift --graph
    from distributed.graph import CapturedPOCO
    agent = CapturedPOCO(args, policy, clock)         # in place of train_online.POCO

Kernel by kernel, launching an update of this size takes longer than computing it. A graph is
launched whole. Not yet run on a GPU: the tests record an update's operations and repeat them on a
CPU. Needs torch only.
Not here: what an update is (train_online.py), sampling the replay, which the GPU's work hides.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from logbook import Clock, UserError
from replay import Batch
from train_online import POCO


class CapturedPOCO(POCO):
    """POCO whose updates after the warm-up are three ordinary ones, then a graph that is replayed.

    A graph repeats the same kernels on the same memory. So batches are copied into the one that was
    captured, the next update overwrites the statistics returned, and nothing asks the GPU for a
    number: a non-finite Q is noticed by the next action or checkpoint, not by the E-step. All of a
    replayed update is charged to the M-step.
    """

    def __init__(self, args: Any, policy: nn.Module, clock: Clock):
        super().__init__(args, policy, clock)
        self.eager_updates = 3  # still to do before the capture: their memory is what it finds
        self.batch: Batch | None = None  # the graph reads its memory
        self.captured_stats: dict[str, Tensor] = {}  # and writes these
        self.run_graph: Callable[[], None] | None = None

    def update(self, batch: Batch, warmup: bool) -> dict[str, Tensor]:
        """Learn from a batch as POCO does; returns statistics that the next call overwrites."""
        if warmup:
            return beside(super().update, batch, warmup)
        if self.eager_updates > 0:
            self.eager_updates -= 1
            return beside(super().update, batch, warmup)
        if self.run_graph is None:
            self._capture(batch)
        for captured, value in zip(self.batch, batch):
            captured.copy_(value)
        with self.clock("m_step"):
            self.run_graph()
        return self.captured_stats

    def _capture(self, batch: Batch) -> None:
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["capturable"] = True  # its step counts are on the GPU already
        self.batch = batch
        try:
            self.run_graph, self.captured_stats = record(super().update, batch, False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no CUDA graph of this update here ({reason}): --no-graph goes on without"
            ) from error


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def beside(function: Callable, *arguments: Any) -> Any:
    """Call a function on another stream: what has run on the usual one cannot be captured."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(function: Callable, *arguments: Any) -> tuple[Callable[[], None], Any]:
    """Capture one call, which does not run.

    Returns what runs it, and the tensors in which it leaves its results.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*arguments)
    return graph.replay, results
