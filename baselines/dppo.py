"""DPPO, Diffusion Policy Policy Optimization (Ren et al., arXiv 2409.00588), on a flow.

    python -m baselines.dppo --task lift          # flags, presets, run folder: train_online.py's
    python -m baselines.dppo --resume runs/lift-dppo-s0

On-policy. Sampling a chunk is itself a decision process of K steps. Each Euler step gets Gaussian
noise of a fixed deviation, and PPO is applied to every single step, with the advantage of the chunk
that came out and a ratio for each step. Earlier, noisier steps count less and are clipped tighter.
The policy that is evaluated is the flow without noise.

Differences from the authors' code (github.com/irom-princeton/dppo), besides what ppo.py lists. A
flow with --noise-std in every step instead of a diffusion model with a schedule and a floor. All K
steps are trained (theirs: the last 10 of 20, a frozen copy does the first). No cloning term.
Not here: the rollouts, GAE, the clipped loss (ppo.py).

Shapes: B batch, K flow steps, H chunk, A action.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import train_online
from logbook import Clock, cli
from logbook.options import Fraction, Positive
from train_offline import Acting, adam, minimise

from . import ppo


@dataclass
class Args(ppo.Args):
    """What DPPO can be asked."""

    noise_std: Positive = 0.1  # of the noise added in every flow step
    denoising_discount: Fraction = 0.99  # the advantage counts this much less per earlier step
    clip_first: Fraction = 0.1  # the first step's share of --ratio-clip; it grows exponentially


class DPPO(ppo.OnPolicy):
    name = "dppo"
    stats = ("value", "returns", "surrogate", "clip_frac", "kl")
    modes = ("policy",)
    saved = ("policy", "value", "actor_optimizer", "value_optimizer")

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.policy = policy
        self.clock = clock
        self.device = policy.device
        self.value = ppo.Value(policy, args.value_hidden, args.value_layers)
        self.actor_optimizer = adam(policy.head_parameters(), args.policy_learning_rate)
        self.value_optimizer = adam(self.value.parameters(), args.critic_learning_rate)
        self.kl = 0.0
        steps = torch.arange(policy.flow_steps, device=self.device)
        last = len(steps) - 1
        self.weights = args.denoising_discount ** (last - steps)  # (K,)
        growth = torch.expm1(3 * steps / max(last, 1)) / math.expm1(3)  # (K,) from 0 to 1
        self.clips = args.ratio_clip * (args.clip_first + (1 - args.clip_first) * growth)

    def log_std(self, context: Any, t: Tensor) -> Tensor:
        """Return the same deviation for every state and step; broadcasts to (B, n, H, A)."""
        return torch.full((1, 1, 1, 1), math.log(self.args.noise_std), device=self.device)

    def acting(self, mode: str) -> Acting:
        return Acting(self.policy)

    def update(self, batch: ppo.Chains, warmup: bool) -> dict[str, Tensor]:
        """Learn from a minibatch of chains; during warm-up only V. Returns stats."""
        with self.clock("critic"):
            stats = ppo.update_value(self.value, self.value_optimizer, batch)
        if warmup:
            return stats
        with self.clock("m_step"):
            mean, log_std = ppo.all_steps(self.policy, self.log_std, batch.obs, batch.chain)
            new = ppo.log_likelihood(batch.chain, mean, log_std, batch.valid)  # (B, K)
            old = ppo.log_likelihood(batch.chain, batch.mean, batch.log_std, batch.valid)
            advantage = ppo.standardised(batch.advantage).unsqueeze(1) * self.weights  # (B, K)
            loss, clipped = ppo.clipped_loss(new - old, advantage, self.clips)  # DPPO, Eq. 4.3
            minimise(loss, self.actor_optimizer)
            kl = ppo.chain_kl(batch.mean, batch.log_std, mean.detach(), log_std.detach())
        self.kl = float(kl)
        return stats | {"surrogate": loss.detach(), "clip_frac": clipped, "kl": kl}


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, DPPO, world_class=ppo.Rollouts)


if __name__ == "__main__":
    cli(main)
