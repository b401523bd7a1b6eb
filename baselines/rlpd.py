"""RLPD, RL with prior data (Ball, Smith, Kostrikov and Levine, arXiv 2302.02948), and its action-chunk form RLPD-AC.

    python -m baselines.rlpd --task lift                       # RLPD-AC: chunks of H actions; 11 minutes
    python -m baselines.rlpd --task lift --variant rlpd        # single actions, as published

Soft actor-critic that never clones anything: half of every batch comes from the demonstrations and half from its own
experience, and an ensemble of critics with LayerNorm keeps values from running away. No stage I.

Other than in the authors' code (github.com/ikostrikov/rlpd), mostly as in QC's RLPD (github.com/ColinQiyangLi/qc): the
target is the mean of all heads without an entropy bonus (RLPD: the minimum of two random heads, with it; --subset 2
--entropy-backup); one update per environment step (RLPD: 20 critic updates); --hidden x --layers SiLU networks like the
other methods here (RLPD: 2x256 ReLU); warm-up steps act from the untrained policy and train the critic (RLPD: uniform
actions, no update); the initial temperature fits POCO's reward scale (RLPD: 1); --policy-tau and
--pessimism are not used; it runs in float32.

Shapes: B batch, H chunk, A action, D observation, M critic heads.
"""
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import train_online
from chunk_critic import critic_loss, ema_update, td_target
from logbook import UserError, cli
from replay import ChunkReplay
from train_offline import make_policy
from train_online import LoopArgs, adam, make_critic, minimise
from .fql import frozen


@dataclass
class Args(LoopArgs):
    variant: Literal["rlpd-ac", "rlpd"] = "rlpd-ac"  # rlpd: horizon 1
    heads: int = 10                   # critic heads
    demo_share: float | None = 0.5    # half of every batch from the demonstrations
    subset: int = 0                   # the target is the minimum of this many random heads; 0: the mean of all
    entropy_backup: bool = False      # the target counts the next chunk's entropy
    init_temperature: float = 0.01    # alpha at the start (ours)

    def __post_init__(self):
        if self.variant == "rlpd":
            self.horizon = 1


class TanhGaussian(nn.Module):
    """Squashed Gaussian over chunks in (-1, 1): obs (B, D), noise (B, H, A) -> chunk (B, H, A), log-density (B,)."""

    def __init__(self, policy, hidden, layers):
        super().__init__()
        obs_dim, self.horizon, self.action_dim = len(policy.obs_mean), policy.horizon, policy.action_dim
        sizes = [obs_dim] + [hidden] * layers
        self.body = nn.Sequential(*(part for pair in zip(sizes, sizes[1:]) for part in (nn.Linear(*pair), nn.SiLU())))
        self.out = nn.Linear(hidden, 2 * self.horizon * self.action_dim)
        self.register_buffer("obs_mean", policy.obs_mean.clone())
        self.register_buffer("obs_std", policy.obs_std.clone())
        self.to(policy.obs_mean.device)

    def forward(self, obs, noise=None):
        mean, log_std = self.out(self.body((obs - self.obs_mean) / self.obs_std)).chunk(2, -1)
        mean, log_std = (x.unflatten(-1, (self.horizon, self.action_dim)) for x in (mean, log_std.clamp(-20, 2)))
        noise = torch.randn_like(mean) if noise is None else noise
        u = mean + log_std.exp() * noise
        # log N(u), less log(1 - tanh(u)^2) in a form that does not round to log 0
        log_density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_density = log_density - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), log_density.sum((-2, -1))


class Temperature(nn.Module):
    """alpha > 0, the price of entropy."""

    def __init__(self, initial):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self):
        return self.log_alpha.exp()


class Gaussian(nn.Module):
    """Acts with a draw from the squashed Gaussian: obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    @torch.no_grad()
    def forward(self, obs, rng):
        policy = self.policy
        noise = rng.standard_normal((1, policy.horizon, policy.action_dim), dtype=np.float32)
        device = policy.obs_mean.device
        return policy(torch.as_tensor(obs, device=device), torch.as_tensor(noise, device=device))[0][0].cpu().numpy()


class RLPD:
    name = "rlpd-ac"
    stats = ("q_actor", "entropy", "alpha", "critic", "q_data", "target")
    modes, collects = ("policy",), "policy"
    draw = staticmethod(ChunkReplay.sample)       # half and half: RLPD, Sec. 4.1

    @staticmethod
    def check(args):
        if args.checkpoint:
            raise UserError(f"{args.variant} begins with an untrained policy: leave out --checkpoint")

    def __init__(self, args, policy, clock):
        self.name, self.args, self.clock, self.device = args.variant, args, clock, policy.obs_mean.device
        self.critic, self.target = make_critic(args, policy)
        self.actor = TanhGaussian(policy, args.hidden, args.layers)
        self.temperature = Temperature(args.init_temperature).to(self.device)
        self.target_entropy = -0.5 * args.horizon * policy.action_dim
        self.actor_optimizer = adam([*self.actor.parameters(), *self.temperature.parameters()], args)
        self.critic_optimizer = adam(self.critic.parameters(), args)

    def acting(self, mode):
        return Gaussian(self.actor)

    def update(self, batch, warmup):
        """One update on half demonstrations, half experience; during warm-up the actor is frozen. Returns stats."""
        with self.clock("critic"):
            stats = self.update_critic(batch)
        if warmup:
            return stats
        with self.clock("m_step"):
            return stats | self.update_actor(batch)

    def update_critic(self, batch):
        args = self.args
        with torch.no_grad():
            next_chunk, log_density = self.actor(batch.next_obs)
            next_q = self.target(batch.next_obs, next_chunk.unsqueeze(1)).squeeze(-1)        # (M, B)
            if args.subset:
                next_q = next_q[torch.randperm(args.heads, device=self.device)[:args.subset]].amin(0)
            else:
                next_q = next_q.mean(0)                                                      # (B,)
            if args.entropy_backup:
                next_q = next_q - self.temperature() * log_density
        y = td_target(batch.returns, batch.bootstrap, next_q)                                # RLPD, Alg. 1, target
        loss, stats = critic_loss(self.critic, batch.obs, batch.chunk, y)
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, args.tau)
        return stats

    def update_actor(self, batch):
        chunk, log_density = self.actor(batch.obs)
        with frozen(self.critic):
            q = self.critic(batch.obs, chunk.unsqueeze(1)).mean()                            # of all heads
        alpha, entropy = self.temperature(), -log_density.mean()
        actor_loss = -alpha.detach() * entropy - q                                           # RLPD, Alg. 1, actor
        temperature_loss = alpha * (entropy.detach() - self.target_entropy)                  # SAC, temperature
        minimise(actor_loss + temperature_loss, self.actor_optimizer)
        return {"q_actor": q.detach(), "entropy": entropy.detach(), "alpha": alpha.detach()}

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("actor", "temperature", "critic", "target", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def main(argv=None):
    train_online.main(argv, Args, RLPD, make_policy)          # no stage I: only the observations' statistics


if __name__ == "__main__":
    cli(main)
