"""DSRL, diffusion steering via RL (Wagenmaker et al., "Steering your diffusion policy", arXiv 2506.15799).

    python -m baselines.dsrl --task lift                       # DSRL-NA, the authors' choice; 12 minutes
    python -m baselines.dsrl --task lift --variant dsrl-sac    # soft actor-critic on noise alone

The cloned flow F(s, w) stays as it is. A squashed Gaussian learns which noise w in [-b, b] to feed it, by soft
actor-critic. DSRL-NA keeps two critics: Q^A(s, a) of chunks learns from everything in the replay, demonstrations
included; Q^W(s, w) is regressed on Q^A(s, F(s, w)) and is what the actor climbs, so nothing is ever differentiated
through the flow. DSRL-SAC learns Q(s, w) from executed pairs (s, w) only, one for each chunk.

Other than in the authors' code (github.com/ajwagen/dsrl; we had its settings but not its updates): a flow instead of a
diffusion model; gamma counts environment steps, not chunks; rewards are POCO's; demonstrations stay in the replay of NA
(authors: no offline data); one update per environment step, in which Q^W meets --num-noises noises of each state once
(authors: about 1.5 updates with 10 Q^W steps each); two heads averaged (authors: minimum), no entropy bonus in the
target; --hidden x --layers SiLU networks like the other methods here (authors: 3x2048 tanh); the initial temperature
fits POCO's reward scale; --policy-tau is not used. Warm-up acts with standard noise, as the authors do.

Shapes: B batch, N noises, H chunk, A action, D observation. Noise has a chunk's shape (H, A).
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import envs
import train_online
from chunk_critic import aggregate, critic_loss, ema_update, td_target
from logbook import UserError, cli
from replay import ChunkReplay
from train_online import LoopArgs, adam, autocast, make_critic, minimise
from .fql import frozen
from .rlpd import TanhGaussian, Temperature


@dataclass
class Args(LoopArgs):
    variant: Literal["dsrl-na", "dsrl-sac"] = "dsrl-na"  # two critics, or one of noise alone
    noise_bound: float = 1.5          # b, the noise actor's range in every cell
    num_noises: int = 8               # noises per state in each update of Q^W (ours)
    init_temperature: float = 0.01    # alpha at the start (ours)
    target_entropy: float = 0.0       # of the squashed noise before it is scaled by b


class Steered(torch.nn.Module):
    """Acts through the flow, from chosen noise once `ready`: obs (1, D), rng -> chunk (H, A). Remembers the noise."""

    def __init__(self, flow, actor, bound, clip):
        super().__init__()
        self.flow, self.actor, self.bound, self.clip = flow, actor, bound, clip
        self.register_buffer("ready", torch.zeros(()))
        self.register_buffer("noise", torch.zeros(flow.horizon, flow.action_dim))

    @torch.no_grad()
    def forward(self, obs, rng):
        obs = torch.as_tensor(obs, device=self.ready.device)
        draw = rng.standard_normal((1, *self.noise.shape), dtype=np.float32)
        w = self.choose(obs, torch.as_tensor(draw, device=obs.device))
        self.noise.copy_(w[0])
        return self.flow.sample(self.flow.encode(obs), 1, w.unsqueeze(1))[0, 0].cpu().numpy()

    def choose(self, obs, draw):
        """Noise (B, H, A) for the flow from standard noise (B, H, A): chosen, or before `ready` just that."""
        if self.ready:
            return self.bound * self.actor(obs, draw)[0]
        return draw.clamp(-self.bound, self.bound) if self.clip else draw


class ChunkMemory:
    """What DSRL-SAC learns from: one (s, w, discounted rewards, s') for each executed chunk."""

    def __init__(self, args, policy):
        task, cells = envs.TASKS[args.task], args.horizon * policy.action_dim
        self.args, self.shape = args, (args.horizon, policy.action_dim)
        self.replay = ChunkReplay(args.capacity // args.horizon + 1, task.obs_dim, cells + 1, 1,
                                  args.discount ** args.horizon, policy.obs_mean.device)
        self.obs, self.reward, self.steps = np.zeros(task.obs_dim, np.float32), 0.0, 0

    def add(self, move, noise):
        """One environment step of the chunk that began with `noise` (H, A)."""
        args, ended = self.args, move.terminated or move.truncated
        if self.steps == 0:
            self.obs, self.reward = move.obs, 0.0
        self.reward += args.discount ** self.steps * (move.reward + args.reward_offset)
        self.steps += 1
        if ended or self.steps == args.horizon:
            longer = args.discount ** (self.steps - args.horizon)          # fewer steps to bootstrap over
            self.replay.add(self.obs, np.append(noise.cpu(), longer), self.reward, move.next_obs, move.terminated,
                            move.truncated)
            self.steps = 0

    def sample(self, batch_size, generator):
        """Batch whose chunk is noise (B, H, A); None before the first chunk is complete."""
        if len(self.replay) == 0:
            return None
        batch = self.replay.sample(batch_size, generator)
        noise, longer = batch.chunk[:, 0, :-1], batch.chunk[:, 0, -1]
        return batch._replace(chunk=noise.reshape(-1, *self.shape), bootstrap=batch.bootstrap * longer)

    def state_dict(self):
        return {"replay": self.replay.state_dict(), "obs": torch.as_tensor(self.obs), "reward": float(self.reward),
                "steps": self.steps}

    def load_state_dict(self, state):
        self.replay.load_state_dict(state["replay"])
        self.obs, self.reward, self.steps = state["obs"].cpu().numpy(), state["reward"], state["steps"]


class DSRL:
    name = "dsrl-na"
    stats = ("q_actor", "entropy", "alpha", "noise_critic", "critic", "q_data", "target")
    modes, collects = ("policy",), "policy"

    @staticmethod
    def check(args):
        if args.setting == "online":
            raise UserError("dsrl steers a cloned policy and never changes it: it needs stage I, no --setting online")
        if args.rollouts and args.variant == "dsrl-sac":
            raise UserError("dsrl-sac learns from the noise it acted with, which --rollouts do not report")

    def __init__(self, args, policy, clock):
        self.args, self.policy, self.clock, self.device = args, policy, clock, policy.obs_mean.device
        self.policy.requires_grad_(False)
        self.name, self.aliasing = args.variant, args.variant == "dsrl-na"
        self.critic, self.target = make_critic(args, policy)           # Q^A of chunks, or Q of noise
        self.noise_critic = make_critic(args, policy)[0] if self.aliasing else self.critic              # Q^W
        self.actor = TanhGaussian(policy, args.hidden, args.layers)
        self.temperature = Temperature(args.init_temperature).to(self.device)
        self.steered = Steered(policy, self.actor, args.noise_bound, not self.aliasing).to(self.device)
        self.memory = None if self.aliasing else ChunkMemory(args, policy)
        self.actor_optimizer = adam([*self.actor.parameters(), *self.temperature.parameters()], args)
        self.critic_optimizer = adam(self.critic.parameters(), args)
        self.noise_optimizer = adam(self.noise_critic.parameters(), args) if self.aliasing else None

    def acting(self, mode):
        return self.steered

    def observe(self, move):
        if self.memory is not None:
            self.memory.add(move, self.steered.noise)

    def draw(self, replay, batch_size, generator):
        return (self.memory or replay).sample(batch_size, generator)

    def execute(self, obs, noises):
        """F(s, w): obs (B, D), noises (B, N, H, A) -> chunks (B, N, H, A), without gradient."""
        with autocast(self.args, self.device):
            return self.policy.sample(self.policy.encode(obs), noises.shape[1], noises)

    def update(self, batch, warmup):
        """One update; during warm-up the actor is frozen. Returns stats."""
        if batch is None:
            return {}
        with self.clock("critic"):
            stats = self.update_critic(batch)
            if self.aliasing:
                stats |= self.update_noise_critic(batch.obs)
        if warmup:
            return stats
        with self.clock("m_step"):
            return stats | self.update_actor(batch.obs)

    def update_critic(self, batch):
        with torch.no_grad():
            draw = torch.randn(len(batch.obs), *self.steered.noise.shape, device=self.device)
            w = self.steered.choose(batch.next_obs, draw).unsqueeze(1)                       # (B, 1, H, A)
            next_q = self.target(batch.next_obs, self.execute(batch.next_obs, w) if self.aliasing else w)
            next_q = aggregate(next_q, self.args.pessimism)[:, 0]
        y = td_target(batch.returns, batch.bootstrap, next_q)
        loss, stats = critic_loss(self.critic, batch.obs, batch.chunk, y)                    # DSRL-NA, Q^A
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, self.args.tau)
        return stats

    def update_noise_critic(self, obs):
        w = torch.randn(len(obs), self.args.num_noises, *self.steered.noise.shape, device=self.device)
        with autocast(self.args, self.device):
            with torch.no_grad():
                q = aggregate(self.critic(obs, self.execute(obs, w)), self.args.pessimism)   # (B, N)
            loss = (self.noise_critic(obs, w) - q).square().mean()                           # DSRL-NA, Q^W
        minimise(loss, self.noise_optimizer)
        return {"noise_critic": loss.detach()}

    def update_actor(self, obs):
        w, log_density = self.actor(obs)
        with frozen(self.noise_critic):
            q = self.noise_critic(obs, self.args.noise_bound * w.unsqueeze(1)).mean()
        alpha, entropy = self.temperature(), -log_density.mean()
        loss = -alpha.detach() * entropy - q                                                 # DSRL-NA, actor
        minimise(loss + alpha * (entropy.detach() - self.args.target_entropy), self.actor_optimizer)
        self.steered.ready.fill_(1)
        return {"q_actor": q.detach(), "entropy": entropy.detach(), "alpha": alpha.detach()}

    def parts(self):
        """`steered` holds the flow and the actor."""
        names = ("steered", "temperature", "critic", "target", "actor_optimizer", "critic_optimizer")
        return names + (("noise_critic", "noise_optimizer") if self.aliasing else ("memory",))

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in self.parts()}

    def load_state_dict(self, state):
        for name in self.parts():
            getattr(self, name).load_state_dict(state[name])


def main(argv=None):
    train_online.main(argv, Args, DSRL)


if __name__ == "__main__":
    cli(main)
