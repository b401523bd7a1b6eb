"""QC, Q-chunking (Li, Zhou and Levine, "RL with Action Chunking", arXiv 2507.07969).

    python -m baselines.qc --task lift                        # 12 minutes; train_online.py's flags
    python -m baselines.qc --resume runs/lift-qc-s0

The policy only clones the replay; reinforcement learning is a choice among its samples. To act, and
to bootstrap, QC draws N chunks from the flow and takes the one that the critic likes best. In
eval.csv "best" is that choice and "policy" the bare flow, which improves only because the replay
fills with chosen chunks.

POCO distils the chosen chunk into the policy; QC keeps needing its critic to act. With N = 1 it is
behaviour cloning on the replay, bitwise POCO with guidance 0.

Differences from the authors' code (github.com/ColinQiyangLi/qc). The critic has no offline phase:
it starts with POCO's warm-up and a frozen policy. Rewards are POCO's (authors: r - 1). A chunk that
meets its episode's end is cut there and kept (authors drop it from the critic). SiLU (authors:
GELU). Each network has its own optimiser. With --policy-tau < 1 a moving average acts.
Not here: QC-FQL (fql.py).

Shapes: B batch, N candidates, H chunk, A action, F what the critic sees.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import train_online
from baselines import Agent
from chunk_critic import aggregate, critic_loss, ema_update, td_target
from logbook import Clock, cli
from logbook.options import Count
from replay import Batch
from train_offline import Acting, adam, minimise
from train_online import LoopArgs, autocast, make_critic


@dataclass
class Args(LoopArgs):
    """What QC can be asked."""

    num_candidates: Count = 32  # N, chunks drawn to take the best of


@torch.no_grad()
def best_of_n(
    policy: nn.Module,
    critic: nn.Module,
    context: Any,
    n: int,
    pessimism: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Take the best of n chunks under the critic: context of B states -> (B, 1, H, A).

    noise (B, n, H, A) is where the flow starts.
    """
    chunks = policy.sample(context, n, noise)  # (B, n, H, A)
    q = aggregate(critic(policy.critic_obs(context), chunks), pessimism)
    best = q.argmax(1)  # (B,)
    row = torch.arange(len(best), device=best.device)
    return chunks[row, best].unsqueeze(1)  # (B, 1, H, A)


class BestOfN(nn.Module):
    """Act with the best of n: obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy: nn.Module, critic: nn.Module, n: int, pessimism: float = 0.0):
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.n = n
        self.pessimism = pessimism

    def forward(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        policy = self.policy
        shape = (1, self.n, policy.horizon, policy.action_dim)
        noise = torch.as_tensor(rng.standard_normal(shape, dtype=np.float32), device=policy.device)
        context = policy.encode(torch.as_tensor(obs, device=policy.device))
        chunk = best_of_n(policy, self.critic, context, self.n, self.pessimism, noise)
        return chunk[0, 0].cpu().numpy()


class QC(Agent):
    name = "qc"
    stats = ("bc", "critic", "q_data", "target")
    modes = ("best", "policy")
    collects = "best"
    saved = ("policy", "actor", "critic", "target", "actor_optimizer", "critic_optimizer")

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.policy = policy
        self.clock = clock
        self.device = policy.device
        self.critic, self.target = make_critic(args, policy)
        self.actor = copy.deepcopy(policy).requires_grad_(False)
        self.actor_optimizer = adam(policy.head_parameters(), args.online_learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_learning_rate)

    def acting(self, mode: str) -> Acting | BestOfN:
        """Return what acts: "policy" draws from the flow, "best" takes the online critic's best."""
        if mode == "policy":
            return Acting(self.actor)
        return BestOfN(self.actor, self.critic, self.args.num_candidates, self.args.pessimism)

    def update(self, batch: Batch, warmup: bool) -> dict[str, Tensor]:
        """Learn from a batch of replay chunks; during warm-up only the critic. Returns stats."""
        args = self.args
        policy = self.policy
        context = policy.encode(batch.obs)
        with self.clock("critic"):
            next_context = policy.encode(batch.next_obs)
            # The online critic chooses and the target critic rates: the maximum is less optimistic.
            with autocast(args, self.device):
                next_chunk = best_of_n(
                    policy, self.critic, next_context, args.num_candidates, args.pessimism
                )
            next_q = self.target(policy.critic_obs(next_context), next_chunk)
            next_q = aggregate(next_q, args.pessimism)[:, 0]
            y = td_target(batch.returns, batch.bootstrap, next_q)  # QC, L(theta)
            loss, stats = critic_loss(self.critic, policy.critic_obs(context), batch.chunk, y)
            minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats
        with self.clock("m_step"):
            with autocast(args, self.device):
                bc = policy.cfm_loss(context, batch.chunk.unsqueeze(1), batch.valid).mean()
            minimise(bc, self.actor_optimizer)  # QC, L(xi)
            ema_update(self.actor, policy, args.policy_tau)
        return stats | {"bc": bc.detach()}


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, QC)


if __name__ == "__main__":
    cli(main)
