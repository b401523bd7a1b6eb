"""OGPO, Off-policy Generative Policy Optimization (arXiv 2605.03065), on a flow.

    python -m baselines.ogpo --task lift      # OGPO+CA, its authors' choice; 20 minutes
    python -m baselines.ogpo --task lift --variant ogpo       # or ogpo-plus

When each denoising step draws noise, making a chunk is a decision process of its own, whose last
step is paid the critic's value. A moving average of the policy imagines G chains for each of a few
replay states, and PPO raises those that do better than their group, without a gradient through the
critic or the integration. ogpo-plus also clones episodes that succeeded. ogpo-ca moreover trusts an
advantage only where all critic heads agree on its sign.

Noise has the form of the authors' code (github.com/simchowitzlabpublic/OGPO_public): standard
deviation s0 sqrt(1 - t) for a whole step. The drift along the score, scaled by 1/K, is K times too
small to keep the marginals, so chunks spread a little wider.
Other differences. Rewards are POCO's, whose values are 100 times smaller (theirs: r - 1, +5 on
success), so --bc-weight is too. Demonstrations are in the replay (theirs starts empty). The critic
warms up with a frozen policy. --prompts states of a batch with --group chains (theirs: all 256 with
32). Only the finished chunk is clipped to [-1, 1], where the critic sees it (theirs: also every
step's mean). tau and the critic's rate are those of the other methods here. Chunks are cut at an
episode's end and kept. --pessimism is not used.
Not here: learnt noise, a second TD step on successes, the chi2 regulariser, best-of-n collection,
cosine rates, weight decay.

Shapes: B batch, P prompts, G chains of each, K flow steps, H chunk, A action, M critic heads.
"""

import bisect
import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import envs
import train_online
from baselines import Agent
from chunk_critic import critic_loss, ema_update, td_target
from logbook import Clock, UserError, cli
from logbook.options import Count, Fraction, NonNegative, Positive, Width
from replay import Batch, ChunkReplay
from train_offline import Acting, adam, minimise
from train_online import LoopArgs, autocast, make_critic


@dataclass
class Args(LoopArgs):
    """What OGPO can be asked."""

    variant: Literal["ogpo-ca", "ogpo-plus", "ogpo"] = "ogpo-ca"  # ca, plus: clone successes
    heads: Width = 10  # critic heads
    policy_tau: Fraction = 0.005  # rate of the moving average that imagines the chains and acts
    policy_learning_rate: Positive = 1e-4  # Adam, policy (ours); --online-learning-rate is unused
    prompts: Count = 32  # P, states of the batch to imagine chains for (ours)
    group: Count = 16  # G, chains of each prompt (ours)
    noise: Positive = 0.2  # s0, noise of the first flow step (ours; theirs 0.05)
    ratio_clip: Positive = 0.01  # PPO's epsilon, on one ratio per chain
    bc_weight: NonNegative = 0.01  # of cloning successes against the policy gradient

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"heads": 10, "policy_tau": 0.005},
        "cpu": {"heads": 10, "policy_tau": 0.005},
    }


def step_mean(policy: nn.Module, context: Any, x: Tensor, t: Tensor, s0: float) -> Tensor:
    """Compute the mean of the next x: x (B, N, H, A) at t (B, N)."""
    v = policy.velocity(context, x, t)
    m = t[..., None, None]
    # The score of the straight path is (t v - x) / (1 - t).
    drift = v + 0.5 * s0**2 * (m * v - x)
    return x + drift / policy.flow_steps  # OGPO, stochastic sampler


@torch.no_grad()
def sample_chains(policy: nn.Module, context: Any, noise: Tensor, s0: float) -> Tensor:
    """Turn noise into chains, both (B, G, K+1, H, A): a start, then one perturbation per step.

    The last x of a chain is the chunk.
    """
    chains = [noise[:, :, 0]]
    steps = policy.flow_steps
    for k in range(steps):
        t = torch.full(noise.shape[:2], k / steps, device=noise.device)
        e = s0 * math.sqrt(1 - k / steps) * noise[:, :, k + 1].clamp(-3, 3)
        chains.append(step_mean(policy, context, chains[-1], t, s0) + e)
    return torch.stack(chains, 2)


def log_density(policy: nn.Module, context: Any, chains: Tensor, s0: float) -> Tensor:
    """Compute the log-density of chains (B, G, K+1, H, A) -> (B, G).

    Divided by K + 1 and by the cells, as in the authors' code.
    """
    size, group = chains.shape[:2]
    steps = policy.flow_steps
    t = torch.arange(steps, device=chains.device) / steps
    x = chains[:, :, :-1].flatten(1, 2)  # (B, G*K, H, A)
    after = chains[:, :, 1:].flatten(1, 2)
    mean = step_mean(policy, context, x, t.repeat(size, group), s0)
    sigma = s0 * (1 - t).sqrt()[:, None, None]
    perturbation = (after - mean).unflatten(1, (group, steps)) / sigma
    z = torch.cat([chains[:, :, :1], perturbation], 2)  # (B, G, K+1, H, A)
    gaussian = -0.5 * (z.square() + math.log(2 * math.pi)).mean((2, 3, 4))
    return gaussian - sigma.log().sum() / (steps + 1)


def advantages(q: Tensor, conservative: bool) -> Tensor:
    """Compare chains with their group: q (M, B, G) -> (B, G).

    The mean over the heads; conservative: the value nearest to 0, and 0 where signs disagree.
    """
    a = q - q.mean(-1, keepdim=True)  # OGPO, group advantage
    if conservative:
        return a.amin(0).clamp(min=0) + a.amax(0).clamp(max=0)  # OGPO+CA
    return a.mean(0)


class Chains(nn.Module):
    """Act with the end of a noisy chain: obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy: nn.Module, s0: float):
        super().__init__()
        self.policy = policy
        self.s0 = s0

    @torch.no_grad()
    def forward(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        policy = self.policy
        shape = (1, 1, policy.flow_steps + 1, policy.horizon, policy.action_dim)
        noise = torch.as_tensor(rng.standard_normal(shape, np.float32), device=policy.device)
        context = policy.encode(torch.as_tensor(obs, device=policy.device))
        chunks = sample_chains(policy, context, noise, self.s0)[:, :, -1]
        return chunks[0, 0].clamp(-1, 1).cpu().numpy()


class Successes:
    """Numbers the online steps, still in the replay's ring, whose episodes ended in success."""

    def __init__(self, ring: int):
        self.ring = ring
        self.steps = 0
        self.open = 0  # steps of the episode being played
        self.good: list[int] = []

    def add(self, move: envs.Transition) -> None:
        self.steps += 1
        self.open += 1
        if move.terminated or move.truncated:
            if move.success:
                self.good += range(self.steps - self.open, self.steps)
            self.open = 0

    def sample(
        self, replay: ChunkReplay, batch_size: int, generator: torch.Generator
    ) -> Batch | None:
        """Draw chunks of successful episodes; None while they have fewer steps than a batch."""
        oldest = max(self.steps - self.ring, 0)
        del self.good[: bisect.bisect_left(self.good, oldest)]  # overwritten by now
        if len(self.good) < batch_size:
            return None
        pick = torch.randint(
            len(self.good), (batch_size,), generator=generator, device=replay.device
        )
        rows = [replay.demos + self.good[i] - oldest for i in pick.tolist()]
        return replay.chunks(torch.tensor(rows, device=replay.device))

    def state_dict(self) -> dict[str, Any]:
        good = torch.tensor(self.good, dtype=torch.long)
        return {"steps": self.steps, "open": self.open, "good": good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.open = state["open"]
        self.good = state["good"].tolist()


class OGPO(Agent):
    name = "ogpo-ca"
    stats = ("q_spread", "agree", "ratio", "bc", "clip_frac", "critic", "q_data", "target")
    modes = ("policy", "chain")
    collects = "chain"
    saved = (
        "policy",
        "actor",
        "critic",
        "target",
        "successes",
        "actor_optimizer",
        "critic_optimizer",
    )

    @staticmethod
    def check(args: Args) -> None:
        if args.group < 2:  # a chain alone is its own group's mean: every advantage would be 0
            raise UserError("--group is compared with its own mean: it needs at least 2 chains")

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.name = args.variant
        self.policy = policy
        self.clock = clock
        self.device = policy.device
        self.critic, self.target = make_critic(args, policy)
        self.actor = copy.deepcopy(policy).requires_grad_(False)
        self.successes = Successes(args.capacity)
        self.actor_optimizer = adam(policy.head_parameters(), args.policy_learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_learning_rate)

    def acting(self, mode: str) -> Acting | Chains:
        """Return what acts: "policy" draws from the flow without noise in its steps, "chain" with.

        The chain is what collects.
        """
        if mode == "policy":
            return Acting(self.actor)
        return Chains(self.actor, self.args.noise)

    def observe(self, move: envs.Transition) -> None:
        self.successes.add(move)

    def draw(
        self, replay: ChunkReplay, batch_size: int, generator: torch.Generator
    ) -> tuple[Batch, Batch]:
        """Draw a batch, and what to clone: successes once there are enough, else the batch."""
        batch = replay.sample(batch_size, generator)
        successes = self.successes.sample(replay, batch_size, generator)
        return batch, batch if successes is None else successes

    def imagine(self, context: Any, count: int, n: int) -> tuple[Tensor, Tensor]:
        """Draw n chains of the averaged actor for `count` states, and their chunks.

        Returns (B, n, K+1, H, A) and (B, n, H, A).
        """
        actor = self.actor
        shape = (count, n, actor.flow_steps + 1, actor.horizon, actor.action_dim)
        noise = torch.randn(shape, device=self.device)
        with autocast(self.args, self.device):
            chains = sample_chains(actor, context, noise, self.args.noise)
        return chains, chains[:, :, -1].clamp(-1, 1)

    def update(self, batches: tuple[Batch, Batch], warmup: bool) -> dict[str, Tensor]:
        """Learn from a replay batch and a batch to clone; in warm-up only the critic."""
        batch, cloned = batches
        args = self.args
        policy = self.policy
        with self.clock("critic"):
            next_context = policy.encode(batch.next_obs)
            _, next_chunk = self.imagine(next_context, len(batch.next_obs), 1)
            next_q = self.target(policy.critic_obs(next_context), next_chunk).mean((0, 2))
            y = td_target(batch.returns, batch.bootstrap, next_q)  # OGPO, Eq. 4.1
            seen = policy.critic_obs(policy.encode(batch.obs))
            loss, stats = critic_loss(self.critic, seen, batch.chunk, y)
            minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats
        with self.clock("e_step"):
            context = policy.encode(batch.obs[: args.prompts])
            chains, chunks = self.imagine(context, len(batch.obs[: args.prompts]), args.group)
            with autocast(args, self.device):
                q = self.target(policy.critic_obs(context), chunks)  # (M, P, G)
        with self.clock("m_step"):
            return stats | self.update_actor(context, chains, q, cloned)

    def update_actor(
        self, context: Any, chains: Tensor, q: Tensor, cloned: Batch
    ) -> dict[str, Tensor]:
        """Take one gradient step.

        The average that imagined the chains lags behind, so the clip acts on this first ratio.
        """
        args = self.args
        policy = self.policy
        new = log_density(policy, context, chains, args.noise)  # the only way for the gradient
        with torch.no_grad():
            old = log_density(self.actor, context, chains, args.noise)  # float32 like `new`
            advantage = advantages(q, args.variant == "ogpo-ca")
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - args.ratio_clip, 1 + args.ratio_clip)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()  # OGPO, PPO objective
        with autocast(args, self.device):
            cloned_context = policy.encode(cloned.obs)
            bc = policy.cfm_loss(cloned_context, cloned.chunk[:, None], cloned.valid).mean()
        if args.variant != "ogpo":
            loss = loss + args.bc_weight * bc  # OGPO+
        minimise(loss, self.actor_optimizer)
        ema_update(self.actor, policy, args.policy_tau)
        return {
            "q_spread": q.mean(0).std(-1, correction=0).mean(),
            "agree": (advantage != 0).float().mean(),
            "ratio": (ratio.detach() - 1).abs().mean(),
            "bc": bc.detach(),
            "clip_frac": (clipped * advantage < ratio * advantage).float().mean(),
        }


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, OGPO)


if __name__ == "__main__":
    cli(main)
