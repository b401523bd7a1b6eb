"""FQL, Flow Q-learning (Park, Li and Levine, arXiv 2502.02538), and its chunked form QC-FQL.

    python -m baselines.fql --task lift                  # QC-FQL (arXiv 2507.07969); 5 minutes
    python -m baselines.fql --task lift --variant fql    # FQL: single actions, its own stage I

Two policies. The flow clones the replay and never meets the critic. The one-step policy mu(s, z)
maps noise to a chunk at once. It is pulled to the flow's output for the same noise and pushed up
the critic's gradient. It acts, and it bootstraps. No gradient passes through the flow's
integration.

    L_flow    = flow matching on the replay
    L_onestep = alpha |mu(s, z) - flow(s, z)|^2 - Q(s, clip(mu(s, z)))

Differences from the authors' code (github.com/seohongpark/fql, github.com/ColinQiyangLi/qc). There
is no offline RL phase: the one-step policy is distilled from the cloned flow during POCO's critic
warm-up, while the flow collects. mu starts as the flow's own single Euler step, z + v(s, z, 0).
Rewards are POCO's, whose values are far smaller than the authors' (r - 1 at every step) except on
the cubes; alpha is 10, on the cubes 300 (authors: 10 to 1000, cube-double 300). With 0.5 the actor
left the data, and success on Lift fell from 35 to 8 % in 3,000 steps; with 10 FQL fell from 57 to
15 % on cube-double (benchmarks/results/baselines/cube-double-fql-alpha-10). Chunks are cut at an
episode's end and kept. SiLU (authors: GELU). A moving average acts with --policy-tau < 1.
Not here: QC (qc.py).

Shapes: B batch, N candidates, H chunk, A action.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import envs
import train_online
from baselines import Agent
from chunk_critic import aggregate, critic_loss, ema_update, td_target
from logbook import Clock, cli
from logbook.options import Positive
from replay import Batch
from train_offline import adam, minimise
from train_online import LoopArgs, autocast, make_critic


@dataclass
class Args(LoopArgs):
    """What FQL can be asked."""

    variant: Literal["qc-fql", "fql"] = "qc-fql"  # fql: horizon 1
    alpha: Positive | None = None  # weight of distillation against Q; None: 10, on the cubes 300

    def __post_init__(self):
        if self.variant == "fql":
            self.horizon = 1
        if self.alpha is None:  # where every step costs, Q is some thirty times larger
            task = envs.TASKS.get(self.task)
            self.alpha = 300.0 if task is not None and task.counts else 10.0


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through a network to its inputs, and keep none for its weights."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def one_step(network: nn.Module, context: Any, z: Tensor) -> Tensor:
    """Map noise z (B, N, H, A) to chunks mu(s, z), not clipped; the network is a velocity field."""
    return z + network.velocity(context, z, torch.zeros(z.shape[:2], device=z.device))


class OneStep(nn.Module):
    """Act with the one-step policy, with the flow while `ready` is 0: obs (1, D), rng -> (H, A)."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.flow = copy.deepcopy(policy)
        self.one_step = copy.deepcopy(policy)
        self.register_buffer("ready", torch.zeros(()))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flow = self.flow
        context = flow.encode(torch.as_tensor(obs, device=flow.device))
        shape = (1, 1, flow.horizon, flow.action_dim)
        z = torch.as_tensor(rng.standard_normal(shape, dtype=np.float32), device=flow.device)
        chunk = one_step(self.one_step, context, z) if self.ready else flow.sample(context, 1, z)
        return chunk[0, 0].clamp(-1, 1).cpu().numpy()


class FQL(Agent):
    name = "qc-fql"
    stats = ("bc", "distill", "q_actor", "critic", "q_data", "target")
    modes = ("policy",)
    collects = "policy"
    saved = (
        "policy",
        "one_step",
        "actor",
        "critic",
        "target",
        "actor_optimizer",
        "critic_optimizer",
    )

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.name = args.variant
        self.policy = policy
        self.clock = clock
        self.device = policy.device
        self.one_step = copy.deepcopy(policy)
        self.critic, self.target = make_critic(args, policy)
        self.actor = OneStep(policy)
        trained = [*policy.head_parameters(), *self.one_step.parameters()]
        self.actor_optimizer = adam(trained, args.online_learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_learning_rate)

    def acting(self, mode: str) -> OneStep:
        return self.actor

    def noise(self, obs: Tensor) -> Tensor:
        shape = (len(obs), 1, self.args.horizon, self.policy.action_dim)
        return torch.randn(shape, device=obs.device)

    def distillation(self, context: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return one-step chunks, not clipped, and their squared distance to the flow's.

        z and the chunks are (B, 1, H, A).
        """
        taught = self.policy.sample(context, 1, z)  # carries no gradient
        chunk = one_step(self.one_step, context, z)
        return chunk, (chunk - taught).square().mean()  # FQL, L_distill

    def update(self, batch: Batch, warmup: bool) -> dict[str, Tensor]:
        """Learn from a batch; during warm-up the flow is frozen and mu only distilled."""
        with self.clock("critic"):
            stats = self.update_critic(batch)
        with self.clock("m_step"):
            return stats | self.update_actor(batch, warmup)

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        args = self.args
        policy = self.policy
        context = policy.encode(batch.next_obs)
        with torch.no_grad(), autocast(args, self.device):
            next_chunk = one_step(self.one_step, context, self.noise(batch.next_obs))
            next_chunk = next_chunk.float().clamp(-1, 1)
        next_q = aggregate(self.target(policy.critic_obs(context), next_chunk), args.pessimism)
        y = td_target(batch.returns, batch.bootstrap, next_q[:, 0])
        seen = policy.critic_obs(policy.encode(batch.obs))
        loss, stats = critic_loss(self.critic, seen, batch.chunk, y)  # FQL, L_Q
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, args.tau)
        return stats

    def update_actor(self, batch: Batch, warmup: bool) -> dict[str, Tensor]:
        args = self.args
        policy = self.policy
        context = policy.encode(batch.obs)
        with autocast(args, self.device):
            chunk, distill = self.distillation(context, self.noise(batch.obs))
            if warmup:
                minimise(distill, self.actor_optimizer)
                ema_update(self.actor.one_step, self.one_step, args.policy_tau)
                return {"distill": distill.detach()}
            bc = policy.cfm_loss(context, batch.chunk.unsqueeze(1), batch.valid).mean()
            with frozen(self.critic):
                q = self.critic(policy.critic_obs(context), chunk.clamp(-1, 1)).mean()
        loss = bc + args.alpha * distill - q  # FQL, L_flow + L_onestep
        minimise(loss, self.actor_optimizer)
        self.actor.ready.fill_(1)
        ema_update(self.actor.one_step, self.one_step, args.policy_tau)
        return {"bc": bc.detach(), "distill": distill.detach(), "q_actor": q.detach()}


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, FQL)


if __name__ == "__main__":
    cli(main)
