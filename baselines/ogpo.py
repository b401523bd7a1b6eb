"""OGPO, Off-policy Generative Policy Optimization ("Sample Efficient Full-Finetuning ...", arXiv 2605.03065).

    python -m baselines.ogpo --task lift     # 20 min; --variant ogpo, ogpo-plus or ogpo-ca, which its authors recommend

Once each denoising step draws noise, making a chunk is a decision process of its own, whose last step is paid the
critic's value. A moving average of the policy imagines G chains for each of a few replay states, and PPO raises those
that do better than their group, without a gradient through critic or integration. ogpo-plus also clones episodes that
succeeded; ogpo-ca moreover trusts an advantage only where all critic heads agree on its sign.

Noise has the form of the authors' code (github.com/simchowitzlabpublic/OGPO_public): std s0 sqrt(1 - t) for a whole
step; the drift along the score, scaled by 1/K, is K times too small to keep the marginals, so chunks spread a little
wider. Other than there: rewards are POCO's, whose values are 100 times smaller (theirs: r - 1, +5 on success), so
--bc-weight is too; demonstrations are in the replay (it starts empty); the critic warms up with a frozen policy;
--prompts states of a batch with --group chains (all 256 with 32); only the finished chunk is clipped to [-1, 1] (also
every step's mean), where the critic sees it; tau and the critic's rate are those of the other methods here; chunks
are cut at an episode's end and kept; with --chi2 ogpo-ca still asks every head (theirs: the heads' mean); --pessimism
is not used. Not here: learnt noise, a second TD step on successes, chi2's ceiling and part in the target, cosine rates,
weight decay.
Shapes: B batch, P prompts, G chains of each, K flow steps, H chunk, A action, D observation, M critic heads.
"""
import bisect
import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import train_online
from chunk_critic import critic_loss, ema_update, td_target
from logbook import UserError, cli
from train_offline import Acting
from train_online import LoopArgs, adam, autocast, make_critic, minimise


@dataclass
class Args(LoopArgs):
    variant: Literal["ogpo-ca", "ogpo-plus", "ogpo"] = "ogpo-ca"  # ca, plus: clone successes; ca: critics must agree
    heads: int = 10                   # critic heads
    policy_tau: float = 0.005         # rate of the moving average that imagines the chains and acts
    actor_learning_rate: float = 1e-4  # Adam, policy (ours)
    prompts: int = 32                 # P, states of the batch to imagine chains for (ours)
    group: int = 16                   # G, chains of each prompt (ours)
    noise: float = 0.2                # s0, noise of the first flow step; it falls with sqrt(1 - t) (ours; theirs 0.05)
    ratio_clip: float = 0.01          # PPO's epsilon, on one ratio per chain
    bc_weight: float = 0.01           # of cloning successes (plus, ca) against the policy gradient
    q_samples: int = 1                # next chunks averaged in the critic's target (Q-variance reduction)
    chi2: float = 0.0                 # b0, weight of the chi2 regulariser against a slowly moving policy; 0: none
    chi2_tau: float = 0.0005          # rate of the slowly moving policy
    best_of: int = 1                  # chains drawn to execute the best of while collecting (ours; theirs 8)


def step_mean(policy, context, x, t, s0):
    """Mean of the next x: x (B, N, H, A) at t (B, N). The score of the straight path is (t v - x) / (1 - t)."""
    v, t = policy.velocity(context, x, t), t[..., None, None]
    return x + (v + 0.5 * s0 ** 2 * (t * v - x)) / policy.flow_steps                 # OGPO, stochastic sampler


@torch.no_grad()
def sample_chains(policy, context, noise, s0):
    """Noise (B, G, K+1, H, A), a chain's start and what perturbs its steps -> all its x; the last is the chunk."""
    chains, steps = [noise[:, :, 0]], policy.flow_steps
    for k in range(steps):
        t = torch.full(noise.shape[:2], k / steps, device=noise.device)
        e = s0 * math.sqrt(1 - k / steps) * noise[:, :, k + 1].clamp(-3, 3)
        chains.append(step_mean(policy, context, chains[-1], t, s0) + e)
    return torch.stack(chains, 2)


def log_density(policy, context, chains, s0):
    """Log-density of chains (B, G, K+1, H, A), divided by K+1 and the cells as in the authors' code -> (B, G)."""
    (size, group), steps = chains.shape[:2], policy.flow_steps
    t = torch.arange(steps, device=chains.device) / steps
    x, after = chains[:, :, :-1].flatten(1, 2), chains[:, :, 1:].flatten(1, 2)                # (B, G*K, H, A)
    mean = step_mean(policy, context, x, t.repeat(size, group), s0)
    sigma = s0 * (1 - t).sqrt()[:, None, None]
    z = torch.cat([chains[:, :, :1], (after - mean).unflatten(1, (group, steps)) / sigma], 2)  # (B, G, K+1, H, A)
    return -0.5 * (z.square() + math.log(2 * math.pi)).mean((2, 3, 4)) - sigma.log().sum() / (steps + 1)


def advantages(q, conservative):
    """q (M, B, G) -> (B, G): mean of the heads; conservative: the nearest to 0, and 0 where signs disagree."""
    a = q - q.mean(-1, keepdim=True)                                                 # OGPO, group advantage
    return a.amin(0).clamp(min=0) + a.amax(0).clamp(max=0) if conservative else a.mean(0)    # OGPO+CA


class Chains(torch.nn.Module):
    """Acts with a chain, or the best of n under the minimum of two heads. obs (1, D), rng -> chunk (H, A)."""

    def __init__(self, policy, critic, args):
        super().__init__()
        self.policy, self.critic, self.s0, self.n = policy, critic, args.noise, args.best_of

    @torch.no_grad()
    def forward(self, obs, rng):
        policy, device = self.policy, self.policy.obs_mean.device
        noise = rng.standard_normal((1, self.n, policy.flow_steps + 1, policy.horizon, policy.action_dim), np.float32)
        obs, noise = torch.as_tensor(obs, device=device), torch.as_tensor(noise, device=device)
        chunks = sample_chains(policy, policy.encode(obs), noise, self.s0)[:, :, -1].clamp(-1, 1)
        pick = self.critic(obs, chunks)[rng.permutation(self.critic.heads)[:2]].amin(0).argmax().item()
        return chunks[0, pick].cpu().numpy()


class Successes:
    """Numbers of the online steps, still in the replay's ring, whose episodes ended in success."""

    def __init__(self, ring):
        self.ring, self.steps, self.open, self.good = ring, 0, 0, []

    def add(self, move):
        self.steps, self.open = self.steps + 1, self.open + 1
        if move.terminated or move.truncated:
            self.good += range(self.steps - self.open, self.steps) if move.success else ()
            self.open = 0

    def sample(self, replay, batch_size, generator):
        """Chunks of successful episodes, uniform over their steps; None while they have fewer than batch_size steps."""
        oldest = max(self.steps - self.ring, 0)
        del self.good[:bisect.bisect_left(self.good, oldest)]    # overwritten
        if len(self.good) < batch_size:
            return None
        pick = torch.randint(len(self.good), (batch_size,), generator=generator, device=replay.device).tolist()
        return replay.chunks(torch.tensor([replay.demos + self.good[i] - oldest for i in pick], device=replay.device))

    def state_dict(self):
        return {"steps": self.steps, "open": self.open, "good": torch.tensor(self.good, dtype=torch.long)}

    def load_state_dict(self, state):
        self.steps, self.open, self.good = state["steps"], state["open"], state["good"].tolist()


class OGPO:
    name = "ogpo-ca"
    stats = ("q_spread", "agree", "ratio", "bc", "clip_frac", "critic", "q_data", "target")
    modes, collects = ("policy", "chain"), "chain"

    @staticmethod
    def check(args):
        if args.chi2 > 0 and args.heads < 2:
            raise UserError("--chi2 goes by how far the critics disagree: it needs --heads of at least 2")
        if args.group < 2:                # a chain alone is its own group's mean: every advantage would be 0
            raise UserError("--group is compared with its own mean: it needs at least 2 chains")

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock, self.device = args, policy, clock, policy.obs_mean.device
        self.name, (self.critic, self.target) = args.variant, make_critic(args, policy)
        self.actor, self.slow = (copy.deepcopy(policy).requires_grad_(False) for _ in range(2))   # slow: for chi2
        self.successes = Successes(args.capacity)
        self.observe = self.successes.add                                            # every environment step
        self.actor_optimizer = adam(policy.head_parameters(), args)
        self.actor_optimizer.param_groups[0]["lr"] = args.actor_learning_rate
        self.critic_optimizer = adam(self.critic.parameters(), args)

    def acting(self, mode):
        """"policy": a draw from the flow, its steps without noise. "chain": what collects, the best of --best-of."""
        return Acting(self.actor) if mode == "policy" else Chains(self.actor, self.target, self.args)

    def draw(self, replay, batch_size, generator):
        """A batch of the replay, and what to clone: successes once there are enough, until then that same batch."""
        batch = replay.sample(batch_size, generator)
        return batch, self.successes.sample(replay, batch_size, generator) or batch

    def imagine(self, obs, n):
        """n chains of the averaged actor for each state and their chunks: (B, n, K+1, H, A), (B, n, H, A)."""
        actor = self.actor
        noise = torch.randn(len(obs), n, actor.flow_steps + 1, actor.horizon, actor.action_dim, device=self.device)
        with autocast(self.args, self.device):
            chains = sample_chains(actor, actor.encode(obs), noise, self.args.noise)
        return chains, chains[:, :, -1].clamp(-1, 1)

    def update(self, batches, warmup):
        """One update on (replay batch, batch to clone); during warm-up the actor is frozen. Returns stats."""
        (batch, cloned), args = batches, self.args
        with self.clock("critic"):
            next_chunks = self.imagine(batch.next_obs, args.q_samples)[1]
            next_q = self.target(batch.next_obs, next_chunks).mean((0, 2))           # OGPO, Eq. 4.1, mean of samples
            y = td_target(batch.returns, batch.bootstrap, next_q)
            loss, stats = critic_loss(self.critic, batch.obs, batch.chunk, y)
            minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats
        with self.clock("e_step"):
            obs = batch.obs[:args.prompts]
            chains, chunks = self.imagine(obs, args.group)
            with autocast(args, self.device):
                q = self.target(obs, chunks)                                         # (M, P, G)
        with self.clock("m_step"):
            return stats | self.update_actor(self.policy.encode(obs), chains, q, cloned)

    def update_actor(self, context, chains, q, cloned):
        """One gradient step. The average that imagined the chains lags behind, so the clip acts on this first ratio."""
        args, policy = self.args, self.policy
        new = log_density(policy, context, chains, args.noise)                       # the only way for the gradient
        with torch.no_grad():
            old = log_density(self.actor, context, chains, args.noise)               # float32 like `new`: no rounding
            if args.chi2 > 0:
                r = (new - log_density(self.slow, context, chains, args.noise)).exp()         # (P, G)
                p, penalty = torch.sigmoid(5 * (r - 1)), args.chi2 * q.std(0, correction=0).mean() * r
                q = (1 - p) * q + p * q.amin(0) - penalty                            # OGPO, chi2 regularisation
            advantage = advantages(q, args.variant == "ogpo-ca")
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - args.ratio_clip, 1 + args.ratio_clip)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()         # OGPO, PPO objective
        with autocast(args, self.device):
            bc = policy.cfm_loss(policy.encode(cloned.obs), cloned.chunk[:, None], cloned.valid).mean()
        minimise(loss + (args.variant != "ogpo") * args.bc_weight * bc, self.actor_optimizer)    # OGPO+
        ema_update(self.actor, policy, args.policy_tau)
        ema_update(self.slow, policy, args.chi2_tau)
        return {"q_spread": q.mean(0).std(-1, correction=0).mean(), "agree": (advantage != 0).float().mean(),
                "ratio": (ratio.detach() - 1).abs().mean(), "bc": bc.detach(),
                "clip_frac": (clipped * advantage < ratio * advantage).float().mean()}

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "actor", "slow", "critic", "target", "successes", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def main(argv=None):
    train_online.main(argv, Args, OGPO)


if __name__ == "__main__":
    cli(main)
