"""DPPO, Diffusion Policy Policy Optimization (Ren et al., arXiv 2409.00588), on a flow.

    python -m baselines.dppo --task lift                      # flags, presets, run folder: those of train_online.py
    python -m baselines.dppo --resume runs/lift-dppo-s0

On-policy. Sampling a chunk is itself a decision process of K steps: each Euler step gets Gaussian noise of a fixed
deviation, and PPO is applied to every single step, with the advantage of the chunk that came out and a ratio for each
step. Earlier, noisier steps count less and are clipped tighter. The policy that is evaluated is the flow without noise.

Other than in the authors' code (github.com/irom-princeton/dppo), besides what ppo.py lists: a flow with --noise-std in
every step instead of a diffusion model with a schedule and a floor; all K steps are trained (theirs: the last 10 of
20, a frozen copy does the first); no cloning term. Not here: the rollouts, GAE, the clipped loss (ppo.py).

Shapes: B batch, K flow steps, H chunk, A action, D observation.
"""
import math
from dataclasses import dataclass

import torch

import train_online
from logbook import cli
from train_offline import Acting
from train_online import adam, minimise
from . import ppo


@dataclass
class Args(ppo.Args):
    noise_std: float = 0.1            # of the noise added in every flow step
    denoising_discount: float = 0.99  # the advantage counts this much less for each step before the last
    clip_first: float = 0.1           # the first step's share of --ratio-clip; it grows exponentially to the last step


class DPPO:
    name = "dppo"
    stats = ("value", "returns", "surrogate", "clip_frac", "kl")
    modes = ("policy",)
    check = staticmethod(ppo.check)

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock, self.device = args, policy, clock, policy.obs_mean.device
        self.value = ppo.Value(policy, args.value_hidden, args.value_layers)
        self.actor_optimizer = adam(policy.head_parameters(), args, args.policy_learning_rate)
        self.value_optimizer = adam(self.value.parameters(), args)
        self.kl = 0.0
        steps = torch.arange(policy.flow_steps, device=self.device)
        self.weights = args.denoising_discount ** (len(steps) - 1 - steps)                   # (K,)
        growth = torch.expm1(3 * steps / max(len(steps) - 1, 1)) / math.expm1(3)             # (K,) from 0 to 1
        self.clips = args.ratio_clip * (args.clip_first + (1 - args.clip_first) * growth)

    def log_std(self, context, t):
        """The same for every state and step; broadcasts to (B, n, H, A)."""
        return torch.full((1, 1, 1, 1), math.log(self.args.noise_std), device=self.device)

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
            new = ppo.log_likelihood(batch.chain, mean, log_std, batch.valid)                # (B, K)
            old = ppo.log_likelihood(batch.chain, batch.mean, batch.log_std, batch.valid)
            advantage = ppo.standardised(batch.advantage).unsqueeze(1) * self.weights        # (B, K)
            loss, clipped = ppo.clipped_loss(new - old, advantage, self.clips)               # DPPO, Eq. 4.3
            minimise(loss, self.actor_optimizer)
            kl = ppo.chain_kl(batch.mean, batch.log_std, mean.detach(), log_std.detach())
        self.kl = float(kl)
        return stats | {"surrogate": loss.detach(), "clip_frac": clipped, "kl": kl}

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "value", "actor_optimizer", "value_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def main(argv=None):
    train_online.main(argv, Args, DPPO, world_class=ppo.Rollouts)


if __name__ == "__main__":
    cli(main)
