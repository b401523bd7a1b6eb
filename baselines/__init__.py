"""The paper's baselines: one file per method, each an agent for train_online.py's loop (Sec. V).

    python -m baselines.qc --task lift        # or fql, rlpd, dsrl, ogpo, dppo, reinflow
    from baselines import Agent               # what the loop asks of a method

Not here: the loop, evaluation, checkpoints and resume (train_online.py), comparisons of methods
(benchmarks/compare.py).
"""

from typing import Any

import torch

from envs import Transition
from replay import ChunkReplay


class Agent:
    """What the loop asks of a method, where a method need do nothing of its own.

    A method also has name, stats, modes, collects, device, acting(mode) and update(batch, warmup).
    `saved` names its networks, optimisers and memories; `cloned` says that it begins from stage I.
    """

    saved: tuple[str, ...] = ()
    cloned = True

    @staticmethod
    def check(args: Any) -> None:
        """Refuse arguments that this method cannot work with, before anything runs."""

    def observe(self, move: Transition) -> None:
        """See each environment step."""

    def draw(self, replay: ChunkReplay, batch_size: int, generator: torch.Generator) -> Any:
        """Draw what `update` learns from."""
        return replay.sample(batch_size, generator)

    def state_dict(self) -> dict[str, Any]:
        return {name: vars(self)[name].state_dict() for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.saved:
            vars(self)[name].load_state_dict(state[name])
