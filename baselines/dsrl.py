"""DSRL, diffusion steering via RL (Wagenmaker et al., arXiv 2506.15799), on a flow.

    python -m baselines.dsrl --task lift                     # DSRL-NA, its authors' choice; 12 min
    python -m baselines.dsrl --task lift --variant dsrl-sac  # soft actor-critic on noise alone

The cloned flow F(s, w) stays as it is. A squashed Gaussian learns which noise w in [-b, b] to feed
it, by soft actor-critic. DSRL-NA keeps two critics. Q^A(s, a) of chunks learns from everything in
the replay, demonstrations included. Q^W(s, w) is regressed on Q^A(s, F(s, w)), and the actor climbs
it, so nothing is ever differentiated through the flow. DSRL-SAC learns Q(s, w) from executed pairs
(s, w) only, one for each chunk.

Differences from the authors' code (github.com/ajwagen/dsrl; we had its settings, not its updates).
A flow instead of a diffusion model. gamma counts environment steps, not chunks. Rewards are POCO's.
Demonstrations stay in the replay of NA (authors: no offline data). One update per environment step,
in which Q^W meets --num-noises noises of each state once (authors: about 1.5 updates with 10 Q^W
steps each). Two heads averaged (authors: minimum), and no entropy bonus in the target. SiLU
networks of --hidden x --layers like the other methods here (authors: 3x2048 tanh). The initial
temperature fits POCO's reward scale. --policy-tau is not used. Warm-up acts with standard noise, as
the authors do.
Not here: the squashed Gaussian and its temperature (rlpd.py).

Shapes: B batch, N noises, H chunk, A action, F what the critic sees. Noise has a chunk's shape.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import envs
import train_online
from baselines import Agent
from chunk_critic import aggregate, critic_loss, ema_update, td_target
from logbook import Clock, UserError, cli
from logbook.options import Count, Finite, Positive
from replay import Batch, ChunkReplay
from train_offline import adam, minimise
from train_online import LoopArgs, autocast, make_critic

from .fql import frozen
from .rlpd import TanhGaussian, Temperature


@dataclass
class Args(LoopArgs):
    """What DSRL can be asked."""

    variant: Literal["dsrl-na", "dsrl-sac"] = "dsrl-na"  # two critics, or one of noise alone
    noise_bound: Positive = 1.5  # b, the noise actor's range in every cell
    num_noises: Count = 8  # noises per state in each update of Q^W (ours)
    init_temperature: Positive = 0.01  # alpha at the start (ours)
    target_entropy: Finite = 0.0  # of the squashed noise before it is scaled by b


class Steered(nn.Module):
    """Act through the flow, from chosen noise once `ready`: obs (1, D), rng -> chunk (H, A).

    It remembers the noise of its last chunk.
    """

    def __init__(self, flow: nn.Module, actor: TanhGaussian, bound: float, clip: bool):
        super().__init__()
        self.flow = flow
        self.actor = actor
        self.bound = bound
        self.clip = clip
        self.register_buffer("ready", torch.zeros(()))
        self.register_buffer("noise", torch.zeros(flow.horizon, flow.action_dim))

    @torch.no_grad()
    def forward(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flow = self.flow
        obs = torch.as_tensor(obs, device=flow.device)
        draw = rng.standard_normal((1, *self.noise.shape), dtype=np.float32)
        w = self.choose(obs, torch.as_tensor(draw, device=flow.device))
        self.noise.copy_(w[0])
        return flow.sample(flow.encode(obs), 1, w.unsqueeze(1))[0, 0].cpu().numpy()

    def choose(self, obs: Tensor, draw: Tensor) -> Tensor:
        """Turn standard noise (B, H, A) into noise for the flow; before `ready` it is just that."""
        if self.ready:
            return self.bound * self.actor(obs, draw)[0]
        if self.clip:
            return draw.clamp(-self.bound, self.bound)
        return draw


class ChunkMemory:
    """What DSRL-SAC learns from: one (s, w, discounted rewards, s') for each executed chunk."""

    def __init__(self, args: Args, policy: nn.Module):
        self.args = args
        self.shape = (args.horizon, policy.action_dim)
        cells = args.horizon * policy.action_dim
        capacity = args.capacity // args.horizon + 1
        discount = args.discount**args.horizon
        self.replay = ChunkReplay(capacity, policy.obs_dim, cells + 1, 1, discount, policy.device)
        self.obs = np.zeros(policy.obs_dim, np.float32)
        self.reward = 0.0
        self.steps = 0

    def add(self, move: envs.Transition, noise: Tensor) -> None:
        """Store one environment step of the chunk that began with `noise` (H, A)."""
        args = self.args
        if self.steps == 0:
            self.obs = move.obs
            self.reward = 0.0
        self.reward += args.discount**self.steps * (move.reward + args.reward_offset)
        self.steps += 1
        ended = move.terminated or move.truncated
        if ended or self.steps == args.horizon:
            longer = args.discount ** (self.steps - args.horizon)  # fewer steps to bootstrap over
            self.replay.add(
                self.obs,
                np.append(noise.cpu(), longer),
                self.reward,
                move.next_obs,
                move.terminated,
                move.truncated,
            )
            self.steps = 0

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch | None:
        """Draw a batch whose chunk is noise (B, H, A); None before the first chunk is complete."""
        if len(self.replay) == 0:
            return None
        batch = self.replay.sample(batch_size, generator)
        noise = batch.chunk[:, 0, :-1].reshape(-1, *self.shape)
        longer = batch.chunk[:, 0, -1]
        return batch._replace(chunk=noise, bootstrap=batch.bootstrap * longer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "replay": self.replay.state_dict(),
            "obs": torch.as_tensor(self.obs),
            "reward": float(self.reward),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.replay.load_state_dict(state["replay"])
        self.obs = state["obs"].cpu().numpy()
        self.reward = state["reward"]
        self.steps = state["steps"]


class DSRL(Agent):
    name = "dsrl-na"
    stats = ("q_actor", "entropy", "alpha", "noise_critic", "critic", "q_data", "target")
    modes = ("policy",)
    collects = "policy"

    @staticmethod
    def check(args: Args) -> None:
        if args.setting == "online":
            raise UserError(
                "dsrl steers a cloned policy and never changes it: it needs stage I, "
                "leave out --setting online"
            )
        if args.rollouts and args.variant == "dsrl-sac":
            raise UserError(
                "dsrl-sac learns from the noise it acted with, which --rollouts do not report"
            )

    def __init__(self, args: Args, policy: nn.Module, clock: Clock):
        self.args = args
        self.name = args.variant
        self.policy = policy.requires_grad_(False)
        self.clock = clock
        self.device = policy.device
        self.aliasing = args.variant == "dsrl-na"
        self.critic, self.target = make_critic(args, policy)  # Q^A of chunks, or Q of noise
        self.noise_critic = make_critic(args, policy)[0] if self.aliasing else self.critic  # Q^W
        self.actor = TanhGaussian(policy, args.hidden, args.layers)
        self.temperature = Temperature(args.init_temperature).to(self.device)
        self.steered = Steered(policy, self.actor, args.noise_bound, clip=not self.aliasing)
        self.steered.to(self.device)
        trained = [*self.actor.parameters(), *self.temperature.parameters()]
        self.actor_optimizer = adam(trained, args.online_learning_rate)
        self.critic_optimizer = adam(self.critic.parameters(), args.critic_learning_rate)
        # `steered` holds the flow and the actor.
        self.saved = (
            "steered",
            "temperature",
            "critic",
            "target",
            "actor_optimizer",
            "critic_optimizer",
        )
        if self.aliasing:
            parameters = self.noise_critic.parameters()
            self.noise_optimizer = adam(parameters, args.critic_learning_rate)
            self.saved += ("noise_critic", "noise_optimizer")
        else:
            self.memory = ChunkMemory(args, policy)
            self.saved += ("memory",)

    def acting(self, mode: str) -> Steered:
        return self.steered

    def observe(self, move: envs.Transition) -> None:
        if not self.aliasing:
            self.memory.add(move, self.steered.noise)

    def draw(self, replay: ChunkReplay, batch_size: int, generator: torch.Generator) -> Any:
        source = replay if self.aliasing else self.memory
        return source.sample(batch_size, generator)

    def seen(self, obs: Tensor) -> Tensor:
        """Return what a critic sees of an observation."""
        return self.policy.critic_obs(self.policy.encode(obs))

    def execute(self, obs: Tensor, noises: Tensor) -> Tensor:
        """Run F(s, w): obs (B, D), noises (B, N, H, A) -> chunks (B, N, H, A), no gradient."""
        with autocast(self.args, self.device):
            return self.policy.sample(self.policy.encode(obs), noises.shape[1], noises)

    def update(self, batch: Batch | None, warmup: bool) -> dict[str, Tensor]:
        """Learn from a batch; during warm-up only the critics. Returns stats."""
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

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            shape = (len(batch.obs), *self.steered.noise.shape)
            draw = torch.randn(shape, device=self.device)
            w = self.steered.choose(batch.next_obs, draw).unsqueeze(1)  # (B, 1, H, A)
            rated = self.execute(batch.next_obs, w) if self.aliasing else w
            next_q = self.target(self.seen(batch.next_obs), rated)
            next_q = aggregate(next_q, self.args.pessimism)[:, 0]
        y = td_target(batch.returns, batch.bootstrap, next_q)
        loss, stats = critic_loss(  # DSRL-NA, Q^A
            self.critic, self.seen(batch.obs), batch.chunk, y
        )
        minimise(loss, self.critic_optimizer)
        ema_update(self.target, self.critic, self.args.tau)
        return stats

    def update_noise_critic(self, obs: Tensor) -> dict[str, Tensor]:
        shape = (len(obs), self.args.num_noises, *self.steered.noise.shape)
        w = torch.randn(shape, device=self.device)
        seen = self.seen(obs)
        with autocast(self.args, self.device):
            with torch.no_grad():
                q = aggregate(self.critic(seen, self.execute(obs, w)), self.args.pessimism)
            loss = (self.noise_critic(seen, w) - q).square().mean()  # DSRL-NA, Q^W
        minimise(loss, self.noise_optimizer)
        return {"noise_critic": loss.detach()}

    def update_actor(self, obs: Tensor) -> dict[str, Tensor]:
        args = self.args
        w, log_density = self.actor(obs)
        with frozen(self.noise_critic):
            q = self.noise_critic(self.seen(obs), args.noise_bound * w.unsqueeze(1)).mean()
        alpha = self.temperature()
        entropy = -log_density.mean()
        actor_loss = -alpha.detach() * entropy - q  # DSRL-NA, actor
        temperature_loss = alpha * (entropy.detach() - args.target_entropy)
        minimise(actor_loss + temperature_loss, self.actor_optimizer)
        self.steered.ready.fill_(1)
        return {"q_actor": q.detach(), "entropy": entropy.detach(), "alpha": alpha.detach()}


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, Args, DSRL)


if __name__ == "__main__":
    cli(main)
