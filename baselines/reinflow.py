"""ReinFlow, fine-tuning flow policies with online RL (Zhang et al., arXiv 2505.22094).

    python -m baselines.reinflow --task lift                  # flags, presets, run folder: those of train_online.py
    python -m baselines.reinflow --resume runs/lift-reinflow-s0

On-policy. A second network learns how much Gaussian noise each Euler step of the flow gets, within bounds, from the
state and the step's time; velocity and noise are trained together by PPO with one ratio for the whole chain, and a
bonus on the noise's entropy. At the end the noise network is thrown away: the flow alone is evaluated.

Other than in the authors' code (github.com/ReinFlow/ReinFlow), besides what ppo.py lists: both passes use the times
k/K (theirs: one of the samplers used another grid than the likelihood); the noise is not truncated at three
deviations; x_0's density, which cancels, is left out; the entropy is the exact one of the Gaussian steps, a mean over
cells; the bounds of the noise and the learning rates stay constant; --epochs is DPPO's 10 (theirs: 5); the noise
network sees the time itself, not an embedding; no distance to the cloned flow. Not here: the rollouts, GAE, the clipped
loss (ppo.py).

Shapes: B batch, K flow steps, n of them, H chunk, A action, D observation.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

import train_online
from logbook import cli
from train_offline import Acting
from train_online import adam, minimise
from . import ppo


@dataclass
class Args(ppo.Args):
    min_std: float = 0.08             # bounds of the noise in every flow step
    max_std: float = 0.14
    entropy: float = 0.01             # weight of the noise's entropy


class NoiseNet(nn.Module):
    """Log-deviation of every cell, in bounds: context (B, D), t (B, n) -> (B, n, H, A)."""

    def __init__(self, policy, low, high, hidden=128):
        super().__init__()
        self.shape, self.low, self.high = (policy.horizon, policy.action_dim), math.log(low), math.log(high)
        self.from_obs, self.from_time = nn.Linear(len(policy.obs_mean), hidden), nn.Linear(1, hidden)
        self.hidden, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, policy.horizon * policy.action_dim)
        self.to(policy.obs_mean.device)

    def forward(self, context, t):
        h = torch.tanh(self.from_obs(context).unsqueeze(1) + self.from_time(t.unsqueeze(-1)))
        h = torch.tanh(self.out(torch.tanh(self.hidden(h)))).unflatten(-1, self.shape)
        return self.low + (self.high - self.low) * (h + 1) / 2                               # ReinFlow, App. D


class ReinFlow:
    name = "reinflow"
    stats = ("value", "returns", "surrogate", "clip_frac", "kl", "entropy", "noise")
    modes = ("policy",)
    check = staticmethod(ppo.check)

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock, self.device = args, policy, clock, policy.obs_mean.device
        self.log_std = NoiseNet(policy, args.min_std, args.max_std)
        self.value = ppo.Value(policy, args.value_hidden, args.value_layers)
        trained = [*policy.head_parameters(), *self.log_std.parameters()]
        self.actor_optimizer = adam(trained, args, args.policy_learning_rate)
        self.value_optimizer = adam(self.value.parameters(), args)
        self.kl = 0.0

    def acting(self, mode):
        return Acting(self.policy)

    def update(self, batch, warmup):
        """One update on a minibatch of ppo.Chains; during warm-up the actor is frozen. Returns stats."""
        with self.clock("critic"):
            stats = ppo.update_value(self.value, self.value_optimizer, batch)
        if warmup:
            return stats
        with self.clock("m_step"):
            mean, log_std = ppo.all_steps(self.policy, self.log_std, batch.obs, batch.chain)
            new = ppo.log_likelihood(batch.chain, mean, log_std, batch.valid).mean(1)        # (B,)
            old = ppo.log_likelihood(batch.chain, batch.mean, batch.log_std, batch.valid).mean(1)
            surrogate, clipped = ppo.clipped_loss(new - old, ppo.standardised(batch.advantage), self.args.ratio_clip)
            entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).mean()
            minimise(surrogate - self.args.entropy * entropy, self.actor_optimizer)          # ReinFlow, Eq. 11
            kl = ppo.chain_kl(batch.mean, batch.log_std, mean.detach(), log_std.detach())
        self.kl = float(kl)
        return stats | {"surrogate": surrogate.detach(), "clip_frac": clipped, "kl": kl, "entropy": entropy.detach(),
                        "noise": log_std.detach().exp().mean()}

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "log_std", "value", "actor_optimizer", "value_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def main(argv=None):
    train_online.main(argv, Args, ReinFlow, world_class=ppo.Rollouts)


if __name__ == "__main__":
    cli(main)
