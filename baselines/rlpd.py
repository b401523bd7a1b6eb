"""RLPD, RL with prior data (Ball et al., arXiv 2302.02948), and its action-chunk form RLPD-AC.

    python -m baselines.rlpd --task lift                   # RLPD-AC: chunks of actions; 11 minutes
    python -m baselines.rlpd --task lift --variant rlpd    # single actions, as published

Soft actor-critic that never clones anything. Half of every batch comes from the demonstrations and
half from its own experience, and an ensemble of critics with LayerNorm keeps values from running
away. There is no stage I.

Differences from the authors' code (github.com/ikostrikov/rlpd), mostly shared with QC's RLPD
(github.com/ColinQiyangLi/qc). The target is the mean of all heads without an entropy bonus (RLPD:
the minimum of two random heads, with it: --subset 2 --entropy-backup). One update per environment
step (RLPD: 20 critic updates). SiLU networks of --hidden x --layers like the other methods here
(RLPD: 2x256 ReLU). Warm-up steps act from the untrained policy and train the critic (RLPD: uniform
actions, no update). The initial temperature fits POCO's reward scale (RLPD: 1). It does not use
--policy-tau and --pessimism, and it runs in float32.
Not here: the loop (train_online.py).

Shapes: B batch, H chunk, A action, F what the critic sees, M critic heads.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import train_online
from baselines import Agent
from chunk_critic import critic_loss, ema_update, td_target
from logbook import Clock, UserError, cli
from logbook.options import CountOrZero, Positive, Share, Width
from replay import Batch
from train_offline import adam, minimise
from train_online import LoopArgs, make_critic

from .fql import frozen


@dataclass
class Args(LoopArgs):
    """What RLPD can be asked."""

    variant: Literal["rlpd-ac", "rlpd"] = "rlpd-ac"  # rlpd: horizon 1
    heads: Width = 10  # critic heads
    demo_share: Share | None = 0.5  # half of every batch from the demonstrations
    subset: CountOrZero = 0  # the target is the minimum of so many random heads; 0: the mean of all
    entropy_backup: bool = False  # the target counts the next chunk's entropy
    init_temperature: Positive = 0.01  # alpha at the start (ours)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"heads": 10, "demo_share": 0.5},
        "cpu": {"heads": 10, "demo_share": 0.5},
    }

    def __post_init__(self):
        if self.variant == "rlpd":
            self.horizon = 1


def hidden_layers(inputs: int, hidden: int, layers: int) -> nn.Sequential:
    """Build `layers` linear layers of `hidden` units, each followed by SiLU."""
    parts = []
    for size in [inputs] + [hidden] * (layers - 1):
        parts += [nn.Linear(size, hidden), nn.SiLU()]
    return nn.Sequential(*parts)


class TanhGaussian(nn.Module):
    """A squashed Gaussian over chunks in (-1, 1), with the policy's view of an observation.

    obs (B, D), noise (B, H, A) -> chunk (B, H, A), log-density (B,).
    """

    def __init__(self, policy: nn.Module, hidden: int, layers: int):
        super().__init__()
        self.horizon = policy.horizon
        self.action_dim = policy.action_dim
        self.body = hidden_layers(len(policy.obs_mean), hidden, layers)
        self.out = nn.Linear(hidden, 2 * self.horizon * self.action_dim)
        self.register_buffer("obs_mean", policy.obs_mean.clone())
        self.register_buffer("obs_std", policy.obs_std.clone())
        self.to(policy.device)

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.body((obs - self.obs_mean) / self.obs_std)
        mean, log_std = self.out(h).chunk(2, -1)
        mean = mean.unflatten(-1, (self.horizon, self.action_dim))
        log_std = log_std.clamp(-20, 2).unflatten(-1, (self.horizon, self.action_dim))
        if noise is None:
            noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        # log N(u), less log(1 - tanh(u)^2) in a form that does not round to log 0
        log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_density = log_density - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), log_density.sum((-2, -1))


class Temperature(nn.Module):
    """alpha > 0, the price of entropy."""

    def __init__(self, initial: float):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        return self.log_alpha.exp()


class Gaussian(nn.Module):
    """Act with a draw from the squashed Gaussian: obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy: TanhGaussian):
        super().__init__()
        self.policy = policy

    @torch.no_grad()
    def forward(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        policy = self.policy
        device = policy.obs_mean.device
        shape = (1, policy.horizon, policy.action_dim)
        noise = torch.as_tensor(rng.standard_normal(shape, dtype=np.float32), device=device)
        chunk, _ = policy(torch.as_tensor(obs, device=device), noise)
        return chunk[0].cpu().numpy()


class RLPD(Agent):
    name = "rlpd-ac"
    stats = ("q_actor", "entropy", "alpha", "critic", "q_data", "target")
    modes = ("policy",)
    collects = "policy"
    cloned = False
    saved = ("actor", "temperature", "critic", "target", "actor_optimizer", "critic_optimizer")

    @staticmethod
    def check(args: Args) -> None:
        if args.checkpoint:
            raise UserError(f"{args.variant} begins untrained: leave out --checkpoint")

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.name = args.variant
        self.policy = policy  # only its view of an observation
        self.clock = clock
        self.device = policy.device
        self.critic, self.target = make_critic(args, policy)
        self.actor = TanhGaussian(policy, args.hidden, args.layers)
        self.temperature = Temperature(args.init_temperature).to(self.device)
        self.target_entropy = -0.5 * args.horizon * policy.action_dim
        trained = [*self.actor.parameters(), *self.temperature.parameters()]
        self.actor_optimizer = adam(trained, args.online_learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_learning_rate)

    def acting(self, mode: str) -> Gaussian:
        return Gaussian(self.actor)

    def seen(self, obs: Tensor) -> Tensor:
        """Return what the critic sees of an observation."""
        return self.policy.critic_obs(self.policy.encode(obs))

    def update(self, batch: Batch, warmup: bool) -> dict[str, Tensor]:
        """Learn from half demonstrations, half experience; in warm-up only the critic."""
        with self.clock("critic"):
            stats = self.update_critic(batch)
        if warmup:
            return stats
        with self.clock("m_step"):
            return stats | self.update_actor(batch)

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        args = self.args
        with torch.no_grad():
            next_chunk, log_density = self.actor(batch.next_obs)
            next_q = self.target(self.seen(batch.next_obs), next_chunk.unsqueeze(1)).squeeze(-1)
            if args.subset:
                some = torch.randperm(args.heads, device=self.device)[: args.subset]
                next_q = next_q[some].amin(0)
            else:
                next_q = next_q.mean(0)  # (M, B) -> (B,)
            if args.entropy_backup:
                next_q = next_q - self.temperature() * log_density
        y = td_target(batch.returns, batch.bootstrap, next_q)  # RLPD, Alg. 1, target
        loss, stats = critic_loss(self.critic, self.seen(batch.obs), batch.chunk, y)
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, args.tau)
        return stats

    def update_actor(self, batch: Batch) -> dict[str, Tensor]:
        chunk, log_density = self.actor(batch.obs)
        with frozen(self.critic):
            q = self.critic(self.seen(batch.obs), chunk.unsqueeze(1)).mean()  # of all heads
        alpha = self.temperature()
        entropy = -log_density.mean()
        actor_loss = -alpha.detach() * entropy - q  # RLPD, Alg. 1, actor
        temperature_loss = alpha * (entropy.detach() - self.target_entropy)  # SAC, temperature
        minimise(actor_loss + temperature_loss, self.actor_optimizer)
        return {"q_actor": q.detach(), "entropy": entropy.detach(), "alpha": alpha.detach()}


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, RLPD)  # no stage I: only the observations' statistics


if __name__ == "__main__":
    cli(main)
