"""FQL, Flow Q-learning (Park, Li and Levine, arXiv 2502.02538), and QC-FQL, its action-chunk form (arXiv 2507.07969).

    python -m baselines.fql --task lift                        # QC-FQL: chunks of H actions; 5 minutes
    python -m baselines.fql --task lift --variant fql          # FQL: single actions (horizon 1, its own stage I)

Two policies. The flow clones the replay and never meets the critic. The one-step policy mu(s, z) maps noise to a chunk
at once; it is pulled to the flow's output for the same noise and pushed up the critic's gradient. It acts, and it
bootstraps. No gradient passes through the flow's integration.

    L_flow    = flow matching on the replay
    L_onestep = alpha |mu(s, z) - flow(s, z)|^2 - Q(s, clip(mu(s, z)))

Other than in the authors' code (github.com/seohongpark/fql, github.com/ColinQiyangLi/qc): instead of the offline RL
phase, the one-step policy is distilled from the cloned flow during POCO's critic warm-up, while the flow collects; mu
starts as the flow's own single Euler step, z + v(s, z, 0); rewards are POCO's, whose values are far smaller than the
authors' (r - 1 at every step) but on the cubes, and alpha is 10, on the cubes 300 (authors: 10 to 1000, cube-double
300; with 0.5 the actor left the data and success on Lift fell from 35 to 8 % in 3,000 steps, with 10 that of FQL on
cube-double from 57 to 15, benchmarks/baselines/cube-double-fql-alpha-10); chunks are cut at an episode's end and kept;
SiLU (authors: GELU); a moving average acts with --policy-tau < 1.

Shapes: B batch, H chunk, A action, D observation.
"""
import contextlib
import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import envs
import train_online
from chunk_critic import aggregate, critic_loss, ema_update, td_target
from logbook import cli
from replay import ChunkReplay
from train_online import LoopArgs, adam, autocast, make_critic, minimise


@dataclass
class Args(LoopArgs):
    variant: Literal["qc-fql", "fql"] = "qc-fql"  # fql: horizon 1
    alpha: float | None = None        # weight of distillation against Q; None: 10, on the cubes 300

    def __post_init__(self):
        if self.variant == "fql":
            self.horizon = 1
        if self.alpha is None:                # where every step costs, Q is some thirty times larger
            task = envs.TASKS.get(self.task)
            self.alpha = 300.0 if task and task.counts else 10.0


@contextlib.contextmanager
def frozen(network):
    """Gradients pass through the network to its inputs, none is kept for its weights."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def one_step(network, context, z):
    """mu(s, z): context of B states, z (B, N, H, A) -> (B, N, H, A), not clipped; the network is a velocity field."""
    return z + network.velocity(context, z, torch.zeros(z.shape[:2], device=z.device))


class OneStep(torch.nn.Module):
    """Acts with the one-step policy, with the flow while `ready` is 0: obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy):
        super().__init__()
        self.flow, self.one_step = copy.deepcopy(policy), copy.deepcopy(policy)
        self.register_buffer("ready", torch.zeros(()))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, obs, rng):
        context = self.flow.encode(torch.as_tensor(obs, device=self.ready.device))
        z = rng.standard_normal((1, 1, self.flow.horizon, self.flow.action_dim), dtype=np.float32)
        z = torch.as_tensor(z, device=self.ready.device)
        chunk = one_step(self.one_step, context, z) if self.ready else self.flow.sample(context, 1, z)
        return chunk[0, 0].clamp(-1, 1).cpu().numpy()


class FQL:
    name = "qc-fql"
    stats = ("bc", "distill", "q_actor", "critic", "q_data", "target")
    modes, collects = ("policy",), "policy"
    draw = staticmethod(ChunkReplay.sample)

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock, self.device = args, policy, clock, policy.obs_mean.device
        self.name, self.one_step = args.variant, copy.deepcopy(policy)
        self.critic, self.target = make_critic(args, policy)
        self.actor = OneStep(policy)
        self.actor_optimizer = adam([*policy.head_parameters(), *self.one_step.parameters()], args)
        self.critic_optimizer = adam(self.critic.parameters(), args)

    def acting(self, mode):
        return self.actor

    def noise(self, obs):
        return torch.randn(len(obs), 1, self.args.horizon, self.policy.action_dim, device=obs.device)

    def distillation(self, context, z):
        """One-step chunks (B, 1, H, A), not clipped, and their mean squared distance to the flow's; z (B, 1, H, A)."""
        taught = self.policy.sample(context, 1, z)                     # carries no gradient
        chunk = one_step(self.one_step, context, z)
        return chunk, (chunk - taught).square().mean()                                       # FQL, L_distill

    def update(self, batch, warmup):
        """One update; during warm-up the flow is frozen and the one-step policy only distilled. Returns stats."""
        with self.clock("critic"):
            stats = self.update_critic(batch)
        with self.clock("m_step"):
            return stats | self.update_actor(batch, warmup)

    def update_critic(self, batch):
        with torch.no_grad(), autocast(self.args, self.device):
            context = self.policy.encode(batch.next_obs)
            next_chunk = one_step(self.one_step, context, self.noise(batch.next_obs)).float().clamp(-1, 1)
        next_q = aggregate(self.target(batch.next_obs, next_chunk), self.args.pessimism)[:, 0]
        y = td_target(batch.returns, batch.bootstrap, next_q)
        loss, stats = critic_loss(self.critic, batch.obs, batch.chunk, y)                    # FQL, L_Q
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, self.args.tau)
        return stats

    def update_actor(self, batch, warmup):
        args, context = self.args, self.policy.encode(batch.obs)
        with autocast(args, self.device):
            chunk, distill = self.distillation(context, self.noise(batch.obs))
            if warmup:
                minimise(distill, self.actor_optimizer)
                ema_update(self.actor.one_step, self.one_step, args.policy_tau)
                return {"distill": distill.detach()}
            bc = self.policy.cfm_loss(context, batch.chunk.unsqueeze(1), batch.valid).mean()     # FQL, L_flow
            with frozen(self.critic):
                q = self.critic(batch.obs, chunk.clamp(-1, 1)).mean()
        minimise(bc + args.alpha * distill - q, self.actor_optimizer)                        # FQL, L_onestep
        self.actor.ready.fill_(1)
        ema_update(self.actor.one_step, self.one_step, args.policy_tau)
        return {"bc": bc.detach(), "distill": distill.detach(), "q_actor": q.detach()}

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "one_step", "actor", "critic", "target", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def main(argv=None):
    train_online.main(argv, Args, FQL)


if __name__ == "__main__":
    cli(main)
