"""An update as one captured CUDA graph: a GPU that waits for Python no more (train_online.py --graph).

    from distributed.graph import Captured
    update = Captured(agent)                          # in place of agent.update(batch, warmup)

Kernel by kernel, launching an update of this size takes longer than computing it. A graph is launched whole.
Not yet run on a GPU: its tests record and repeat an update's operations on the CPU.
Needs torch only. Not here: what an update is (train_online.py), sampling the replay, which the GPU's work hides.
"""
import functools

import torch

from logbook import UserError


class Captured:
    """agent.update(batch, warmup): three calls as they are, then captured and from there on replayed.

    A graph repeats the same kernels on the same memory: batches are copied into the one captured with, the next call
    overwrites the statistics returned, and nothing asks the GPU for a number. So it is an action or a checkpoint that
    a non-finite Q stops, not its E-step. Updates of the warm-up are left alone. All of a replay is charged to the
    M-step.
    """

    def __init__(self, agent):
        self.agent, self.update, self.eager_calls, self.replay = agent, agent.update, 3, None

    def __call__(self, batch, warmup):
        if warmup or self.eager_calls > 0:
            self.eager_calls -= not warmup
            return beside(self.update, batch, warmup)
        if self.replay is None:
            self.batch = batch                                            # whose memory the graph reads from now on
            for optimizer in (self.agent.actor_optimizer, self.agent.critic_optimizer):
                for group in optimizer.param_groups:
                    group["capturable"] = True                            # its step counts are on the GPU already
            try:
                self.replay, self.stats = record(self.update, self.batch, warmup)
            except RuntimeError as error:
                raise UserError(f"no CUDA graph of this update here ({str(error).splitlines()[0]}): "
                                "--no-graph goes on without") from error
        for static, value in zip(self.batch, batch):
            static.copy_(value)
        with self.agent.clock("m_step"):
            self.replay()
        return self.stats


@functools.cache
def side_stream():
    return torch.cuda.Stream()


def beside(function, *arguments):
    """Run on another stream: what has run on the usual one cannot be captured."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(function, *arguments):
    """Capture one call, which does not run: returns what runs it, and the tensors in which it leaves its results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*arguments)
    return graph.replay, results
