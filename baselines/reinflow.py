"""ReinFlow, fine-tuning flow policies with online RL (Zhang et al., arXiv 2505.22094).

    python -m baselines.reinflow --task lift      # flags, presets, run folder: train_online.py's
    python -m baselines.reinflow --resume runs/lift-reinflow-s0

On-policy. A second network learns how much Gaussian noise each Euler step of the flow gets, within
bounds, from the state and the step's time. PPO trains velocity and noise together with one ratio
for the whole chain and a bonus on the noise's entropy. At the end the noise network is thrown away:
the flow alone is evaluated.

Differences from the authors' code (github.com/ReinFlow/ReinFlow), besides what ppo.py lists. Both
passes use the times k/K (theirs: one of the samplers used another grid than the likelihood). The
noise is not truncated at three deviations. The density of x_0, which cancels, is left out. The
entropy is the exact one of the Gaussian steps, a mean over cells. The bounds of the noise and the
learning rates stay constant. --epochs is DPPO's 10 (theirs: 5). The noise network sees the time
itself, not an embedding. There is no distance to the cloned flow.
Not here: the rollouts, GAE, the clipped loss (ppo.py).

Shapes: B batch, K flow steps, n of them, H chunk, A action, D observation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import train_online
from logbook import Clock, UserError, cli
from logbook.options import NonNegative, Positive
from train_offline import Acting, adam, minimise

from . import ppo


@dataclass
class Args(ppo.Args):
    """What ReinFlow can be asked."""

    min_std: Positive = 0.08  # least deviation of the noise in every flow step
    max_std: Positive = 0.14  # largest
    entropy: NonNegative = 0.01  # weight of the noise's entropy


class NoiseNet(nn.Module):
    """Bounded log-deviation of every cell: context (B, D), t (B, n) -> (B, n, H, A)."""

    def __init__(self, policy: nn.Module, low: float, high: float, hidden: int = 128):
        super().__init__()
        self.shape = (policy.horizon, policy.action_dim)
        self.low = math.log(low)
        self.high = math.log(high)
        self.from_obs = nn.Linear(len(policy.obs_mean), hidden)
        self.from_time = nn.Linear(1, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, policy.horizon * policy.action_dim)
        self.to(policy.device)

    def forward(self, context: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.from_obs(context).unsqueeze(1) + self.from_time(t.unsqueeze(-1)))
        h = torch.tanh(self.hidden(h))
        share = (torch.tanh(self.out(h)).unflatten(-1, self.shape) + 1) / 2
        return self.low + (self.high - self.low) * share  # ReinFlow, App. D


class ReinFlow(ppo.OnPolicy):
    name = "reinflow"
    stats = ("value", "returns", "surrogate", "clip_frac", "kl", "entropy", "noise")
    modes = ("policy",)
    saved = ("policy", "log_std", "value", "actor_optimizer", "value_optimizer")

    @staticmethod
    def check(args: Args) -> None:
        ppo.OnPolicy.check(args)
        if args.min_std > args.max_std:
            raise UserError(
                f"--min-std must be at most --max-std, got {args.min_std} and {args.max_std}"
            )

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.policy = policy
        self.clock = clock
        self.device = policy.device
        self.log_std = NoiseNet(policy, args.min_std, args.max_std)
        self.value = ppo.Value(policy, args.value_hidden, args.value_layers)
        trained = [*policy.head_parameters(), *self.log_std.parameters()]
        self.actor_optimizer = adam(trained, args.policy_learning_rate)
        self.value_optimizer = adam(self.value.parameters(), args.critic_learning_rate)
        self.kl = 0.0

    def acting(self, mode: str) -> Acting:
        return Acting(self.policy)

    def update(self, batch: ppo.Chains, warmup: bool) -> dict[str, Tensor]:
        """Learn from a minibatch of chains; during warm-up only V. Returns stats."""
        args = self.args
        with self.clock("critic"):
            stats = ppo.update_value(self.value, self.value_optimizer, batch)
        if warmup:
            return stats
        with self.clock("m_step"):
            mean, log_std = ppo.all_steps(self.policy, self.log_std, batch.obs, batch.chain)
            new = ppo.log_likelihood(batch.chain, mean, log_std, batch.valid)
            old = ppo.log_likelihood(batch.chain, batch.mean, batch.log_std, batch.valid)
            log_ratio = new.mean(1) - old.mean(1)  # (B,)
            advantage = ppo.standardised(batch.advantage)
            surrogate, clipped = ppo.clipped_loss(log_ratio, advantage, args.ratio_clip)
            entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).mean()
            minimise(surrogate - args.entropy * entropy, self.actor_optimizer)  # ReinFlow, Eq. 11
            kl = ppo.chain_kl(batch.mean, batch.log_std, mean.detach(), log_std.detach())
        self.kl = float(kl)
        return stats | {
            "surrogate": surrogate.detach(),
            "clip_frac": clipped,
            "kl": kl,
            "entropy": entropy.detach(),
            "noise": log_std.detach().exp().mean(),
        }


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, ReinFlow, world_class=ppo.Rollouts)


if __name__ == "__main__":
    cli(main)
