"""QC, Q-chunking (Li, Zhou and Levine, "Reinforcement Learning with Action Chunking", arXiv 2507.07969).

    python -m baselines.qc --task lift                        # 12 minutes; flags and folders: train_online.py's
    python -m baselines.qc --resume runs/lift-qc-s0

The policy only clones the replay; reinforcement learning is a choice among its samples. To act, and to bootstrap, draw
N chunks from the flow and take the one that the critic likes best. "best" in eval.csv is that; "policy" is the bare
flow, which improves only because the replay fills with chosen chunks.

Where POCO distils the chosen chunk into the policy, QC keeps needing its critic to act. With N = 1 it is behaviour
cloning on the replay, bitwise POCO with guidance 0.

Other than in the authors' code (github.com/ColinQiyangLi/qc): no offline phase for the critic, it starts with POCO's
warm-up and a frozen policy; rewards are POCO's (authors: r - 1); a chunk that meets its episode's end is cut there and
kept (authors drop it from the critic); SiLU (authors: GELU); one optimiser for each network; with --policy-tau < 1
the policy that acts is a moving average. Not here: QC-FQL (fql.py).

Shapes: B batch, N candidates, H chunk, A action, D observation.
"""
import copy
from dataclasses import dataclass

import numpy as np
import torch

import train_online
from chunk_critic import aggregate, critic_loss, ema_update, td_target
from logbook import cli
from replay import ChunkReplay
from train_offline import Acting
from train_online import LoopArgs, adam, autocast, make_critic, minimise


@dataclass
class Args(LoopArgs):
    num_candidates: int = 32          # N, chunks drawn to take the best of


@torch.no_grad()
def best_of_n(policy, critic, obs, n, pessimism=0.0, noise=None):
    """The best of n chunks under the critic's aggregated heads: obs (B, D) -> (B, 1, H, A); noise (B, n, H, A)."""
    chunks = policy.sample(policy.encode(obs), n, noise)                                     # (B, n, H, A)
    best = aggregate(critic(obs, chunks), pessimism).argmax(1)                               # (B,)
    return chunks[torch.arange(len(obs), device=obs.device), best].unsqueeze(1)              # (B, 1, H, A)


class BestOfN(torch.nn.Module):
    """Acts with the best of n: obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy, critic, n, pessimism=0.0):
        super().__init__()
        self.policy, self.critic, self.n, self.pessimism = policy, critic, n, pessimism

    def forward(self, obs, rng):
        policy, device = self.policy, self.policy.obs_mean.device
        noise = rng.standard_normal((1, self.n, policy.horizon, policy.action_dim), dtype=np.float32)
        obs, noise = torch.as_tensor(obs, device=device), torch.as_tensor(noise, device=device)
        return best_of_n(policy, self.critic, obs, self.n, self.pessimism, noise)[0, 0].cpu().numpy()


class QC:
    name = "qc"
    stats = ("bc", "critic", "q_data", "target")
    modes, collects = ("best", "policy"), "best"
    draw = staticmethod(ChunkReplay.sample)

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock, self.device = args, policy, clock, policy.obs_mean.device
        self.critic, self.target = make_critic(args, policy)
        self.actor = copy.deepcopy(policy).requires_grad_(False)
        self.actor_optimizer = adam(policy.head_parameters(), args)
        self.critic_optimizer = adam(self.critic.parameters(), args)

    def acting(self, mode):
        """"policy": a draw from the flow. "best": the best of N under the online critic."""
        if mode == "policy":
            return Acting(self.actor)
        return BestOfN(self.actor, self.critic, self.args.num_candidates, self.args.pessimism)

    def update(self, batch, warmup):
        """One update on a batch of replay chunks; during warm-up the actor is frozen. Returns stats."""
        args, policy = self.args, self.policy
        with self.clock("critic"):
            with autocast(args, self.device):
                # the online critic chooses, the target critic rates: the maximum is over-estimated less
                next_chunk = best_of_n(policy, self.critic, batch.next_obs, args.num_candidates, args.pessimism)
            next_q = aggregate(self.target(batch.next_obs, next_chunk), args.pessimism)[:, 0]
            y = td_target(batch.returns, batch.bootstrap, next_q)                            # QC, L(theta)
            loss, stats = critic_loss(self.critic, batch.obs, batch.chunk, y)
            minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats
        with self.clock("m_step"):
            with autocast(args, self.device):
                bc = policy.cfm_loss(policy.encode(batch.obs), batch.chunk.unsqueeze(1), batch.valid).mean()
            minimise(bc, self.actor_optimizer)                                               # QC, L(xi)
            ema_update(self.actor, policy, args.policy_tau)
        return stats | {"bc": bc.detach()}

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "actor", "critic", "target", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def main(argv=None):
    train_online.main(argv, Args, QC)


if __name__ == "__main__":
    cli(main)
