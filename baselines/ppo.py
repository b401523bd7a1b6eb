"""What DPPO and ReinFlow share: a noisy flow, GAE over chunks, PPO's clipped loss, V(s), rollouts.

    python -m baselines.dppo --task lift          # or reinflow; about 2 minutes on two cores

The flow's Euler steps with Gaussian noise added are a chain x_0 ... x_K whose likelihood is known,
so PPO can raise the probability of chains that led to more than V expected. One iteration:
--num-envs environments execute --rollout-chunks chunks each, then --epochs passes over them, then
the chunks are thrown away. The rollouts that began before --warmup-steps train V only. A step of
any environment counts as one environment step, as in the other methods. The environments are
stepped one after the other in this process, which keeps resuming exact; the policy is called once
for all of them. --heads, --pessimism, --tau, --policy-tau, --capacity, --demo-share,
--updates-per-step and --online-learning-rate are not used. It runs in float32.

Differences from the authors' code (github.com/irom-princeton/dppo, github.com/ReinFlow/ReinFlow).
Success ends an episode. A time-out bootstraps from the value of its own last observation, and no
trace runs on into the next episode (theirs took the next episode's first observation and went on).
gamma counts environment steps, not chunks. Rewards are POCO's, summed with discount inside a chunk
and not scaled (theirs: divided by a running deviation). Steps of a chunk that an episode's end cut
off are masked in the likelihood. A minibatch holds whole chains. The likelihoods are not clamped.
The chain is not clipped before its end, and what it gives the environment is, so without noise it
is the flow. --target-kl is in nats of the whole chain, exact, not of a mean over its cells.

What to expect. The authors collect 60,000 steps for each iteration on Lift, millions in all. On two
sets of 3,000 steps of one cloned policy (Lift, seed 11, --noise-std 0.1) the policy's gradients had
cosines from -0.2 to 0.1 with every V, lambda and flow step tried, as with random advantages. So the
15,000 steps of the cpu preset are too few to climb, and its settings are careful: a first rollout
moves the chain by 0.15 nats. Its V is one layer of 64, which explained 0.14 to 0.35 of the variance
of the other set's returns; 3x256 explained -0.09 to 0.21, with LayerNorm below zero.
Not here: the two methods (dppo.py, reinflow.py).

Shapes: B batch, T chunks of a rollout, E environments, K flow steps, H chunk, A action,
D observation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import envs
from baselines import Agent
from baselines.rlpd import hidden_layers
from logbook import Clock, Interrupt, UserError
from logbook.options import Count, Positive, Share, Width
from train_offline import EVAL_SEED, Simulation, minimise
from train_online import LoopArgs


@dataclass
class Args(LoopArgs):
    """What both on-policy methods can be asked."""

    num_envs: Count = 20  # environments side by side
    rollout_chunks: Count = 100  # chunks that each of them executes in an iteration (ours)
    epochs: Count = 10  # passes over an iteration's chunks, --batch-size at a time
    policy_learning_rate: Positive = 1e-5  # Adam (ours); V has --critic-learning-rate
    value_hidden: Width = 256  # width of V's hidden layers
    value_layers: Width = 3  # hidden layers of V
    gae_lambda: Share = 0.95  # per chunk
    ratio_clip: Positive = 0.01  # the ratio, a mean over cells in its exponent, stays in 1 -+ this
    target_kl: Positive = 1.0  # an iteration stops when its chain has moved this far, in nats

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {"num_envs": 5, "rollout_chunks": 60, "value_hidden": 64, "value_layers": 1}
    }


class OnPolicy(Agent):
    """What the two agents share: they refuse --rollouts and act from the bare flow."""

    @staticmethod
    def check(args: Args) -> None:
        if args.rollouts:
            raise UserError(
                "on-policy methods play with exactly the policy they update: "
                "they take no --rollouts"
            )


# ---- the noisy flow ------------------------------------------------------------------------------

LogStd = Callable[[Any, Tensor], Tensor]  # (context, t) -> anything that broadcasts to x


def chain_steps(
    policy: nn.Module, log_std: LogStd, obs: Tensor, x: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and log-deviation of the step from x (B, n, H, A) at the flow's times (n,).

    log_std sees the same t = k/K here, in sampling and in learning.
    """
    context = policy.encode(obs)
    t = times.to(x).expand(x.shape[:2])
    mean = x + policy.velocity(context, x, t) / policy.flow_steps
    return mean, log_std(context, t).expand(mean.shape)


@torch.no_grad()
def sample_chain(policy: nn.Module, log_std: LogStd, obs: Tensor, noise: Tensor) -> Tensor:
    """Draw x_0 ... x_K from standard noise, both (B, K + 1, H, A).

    x_0 is noise; a step is Euler's plus noise.
    """
    chain = [noise[:, :1]]
    for k in range(policy.flow_steps):
        time = torch.tensor([k / policy.flow_steps])
        mean, log_deviation = chain_steps(policy, log_std, obs, chain[-1], time)
        chain.append(mean + log_deviation.exp() * noise[:, k + 1 : k + 2])
    return torch.cat(chain, 1)


def all_steps(
    policy: nn.Module, log_std: LogStd, obs: Tensor, chain: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and log-deviation (B, K, H, A) of every step of chains (B, K + 1, H, A)."""
    times = torch.arange(policy.flow_steps) / policy.flow_steps
    return chain_steps(policy, log_std, obs, chain[:, :-1], times)


def log_likelihood(chain: Tensor, mean: Tensor, log_std: Tensor, valid: Tensor) -> Tensor:
    """Compute the log-density (B, K) of each step, a mean over its executed cells; valid (B, H)."""
    z = (chain[:, 1:] - mean) / log_std.exp()
    cells = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)  # (B, K, H, A)
    return (cells.mean(-1) * valid[:, None]).sum(-1) / valid.sum(1, keepdim=True)


def chain_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Compute KL(old || new) in nats of a chain, averaged over the batch.

    Both are Gaussians at the states that the old one visited.
    """
    moved = old_log_std.exp().square() + (mean - old_mean).square()
    kl = log_std - old_log_std + moved / (2 * (2 * log_std).exp()) - 0.5
    return kl.sum((1, 2, 3)).mean()


# ---- PPO -----------------------------------------------------------------------------------------


def gae(
    reward: Tensor,
    discount: Tensor,
    terminated: Tensor,
    ended: Tensor,
    value: Tensor,
    next_value: Tensor,
    trace: float,
) -> Tensor:
    """Compute advantages (T, E) over chunks; all tensors (T, E), trace is lambda.

    discount is gamma^k of the k steps that the chunk had. next_value is V of its own last
    observation, which counts unless the episode terminated there. A trace ends with its episode, or
    with the rollout.
    """
    error = reward + discount * (1 - terminated) * next_value - value  # PPO, Eq. 12
    advantage = torch.zeros_like(error)
    last = torch.zeros_like(error[0])
    for t in reversed(range(len(error))):
        last = error[t] + discount[t] * trace * (1 - ended[t]) * last  # PPO, Eq. 11
        advantage[t] = last
    return advantage


def clipped_loss(
    log_ratio: Tensor, advantage: Tensor, clip: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Average -min(A rho, A clip(rho, 1 - clip, 1 + clip)); return loss and the clipped share."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(advantage * ratio, advantage * clipped)  # PPO, Eq. 7
    return loss.mean(), ((ratio - 1).abs() > clip).float().mean()


def standardised(advantage: Tensor) -> Tensor:
    return (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)


class Value(nn.Module):
    """V(s): obs (B, D) -> (B,), with the policy's observation statistics."""

    def __init__(self, policy: nn.Module, hidden: int, layers: int):
        super().__init__()
        body = hidden_layers(len(policy.obs_mean), hidden, layers)
        self.body = nn.Sequential(*body, nn.Linear(hidden, 1))
        self.register_buffer("obs_mean", policy.obs_mean.clone())
        self.register_buffer("obs_std", policy.obs_std.clone())
        self.to(policy.device)

    def forward(self, obs: Tensor) -> Tensor:
        standard = (obs - self.obs_mean) / self.obs_std
        return self.body(standard.clamp(-5, 5)).squeeze(-1)


def update_value(
    value: Value, optimizer: torch.optim.Optimizer, batch: "Chains"
) -> dict[str, Tensor]:
    loss = (value(batch.obs) - batch.returns).square().mean()  # PPO, Eq. 9, L^VF
    minimise(loss, optimizer)
    return {"value": loss.detach(), "returns": batch.returns.mean()}


# ---- the world -----------------------------------------------------------------------------------


class Chains(NamedTuple):
    """What an update learns from; mean and log_std are those of the policy that drew the chains."""

    obs: Tensor  # (B, D)
    chain: Tensor  # (B, K + 1, H, A)
    valid: Tensor  # (B, H) 1 for executed steps
    mean: Tensor  # (B, K, H, A)
    log_std: Tensor  # (B, K, H, A)
    advantage: Tensor  # (B,)
    returns: Tensor  # (B,) what V should say


class Rollouts:
    """Stands in for train_online's Interaction: E environments, whose chunks are learnt from once.

    A step is one step of one environment. They take turns, a chunk each; then the policy decides
    for all of them.
    """

    counters = ("steps", "episodes", "recent", "began", "row", "turn", "done")

    def __init__(
        self,
        args: Args,
        agent: Any,
        clock: Clock,
        simulation: Simulation,
        demo_steps: int,
        interrupt: Interrupt,
    ):
        self.args = args
        self.agent = agent
        self.clock = clock
        obs = (simulation.obs_dim,)
        cells = (args.horizon, simulation.action_dim)
        shapes = {
            "obs": obs,
            "next_obs": obs,
            "chain": (agent.policy.flow_steps + 1, *cells),
            "valid": (args.horizon,),
            "reward": (),
            "discount": (),
            "terminated": (),
            "ended": (),
        }
        size = (args.rollout_chunks, args.num_envs)
        self.data = {
            name: torch.zeros(*size, *shape, device=agent.device) for name, shape in shapes.items()
        }  # (T, E, ...)
        self.episode_rng = np.random.default_rng([args.seed, 2])
        self.noise_rng = torch.Generator().manual_seed(args.seed + 1)
        self.batch_rng = torch.Generator().manual_seed(args.seed + 2)
        self.runners = [
            envs.ChunkRunner(simulation.make_env(), self._chunk) for _ in range(args.num_envs)
        ]
        self.steps = 0
        self.episodes = 0
        self.recent: list[float] = []  # successes of the last 20 episodes
        self.began = 0  # the step at which this rollout began
        self.row = 0  # its chunk
        self.turn = 0  # the environment whose turn it is
        self.done = 0  # steps of its chunk

    def start(self, demonstrations: dict[str, np.ndarray]) -> None:
        """Begin the first episode of every environment; demonstrations are not learnt from."""
        for runner in self.runners:
            runner.reset(self._episode_seed())

    def warmup(self) -> bool:
        """A rollout is learnt from as a whole, so its beginning decides."""
        return self.began < self.args.warmup_steps

    def step(self) -> bool:
        """Take one step of the environment whose turn it is."""
        if self.turn == 0 and self.done == 0:
            self._decide()
        with self.clock("env"):
            move = self.runners[self.turn].step()
            self.steps += 1
            self._store(move)
            if move.terminated or move.truncated:
                self.episodes += 1
                self.recent = [*self.recent[-19:], float(move.success)]
        return True

    def _store(self, move: envs.Transition) -> None:
        """Add a step to its chunk; where the chunk is over it is the next environment's turn."""
        args = self.args
        place = (self.row, self.turn)
        runner = self.runners[self.turn]
        reward = move.reward + args.reward_offset
        self.data["reward"][place] += args.discount**self.done * reward
        self.data["valid"][place][self.done] = 1
        self.done += 1
        ended = move.terminated or move.truncated
        if ended or self.done == args.horizon:
            self.data["next_obs"][place] = torch.as_tensor(move.next_obs)
            self.data["discount"][place] = args.discount**self.done
            self.data["terminated"][place] = float(move.terminated)
            self.data["ended"][place] = float(ended)
            self.done = 0
            self.turn = (self.turn + 1) % args.num_envs
            if self.turn == 0:
                self.row += 1
        if ended:
            runner.reset(self._episode_seed())

    def _decide(self) -> None:
        """Draw the next chain of every environment in one call of the policy."""
        with self.clock("act"):
            agent = self.agent
            chains = self.data["chain"][self.row]
            obs = np.stack([runner.obs for runner in self.runners])
            self.data["obs"][self.row] = torch.as_tensor(obs)
            noise = torch.randn(chains.shape, generator=self.noise_rng).to(agent.device)
            drawn = sample_chain(agent.policy, agent.log_std, self.data["obs"][self.row], noise)
            chains.copy_(drawn)

    def _chunk(self, _) -> np.ndarray:
        return self.data["chain"][self.row, self.turn, -1].clamp(-1, 1).cpu().numpy()

    def batches(self) -> Iterator[Chains]:
        """Yield minibatches of all epochs once the rollout is complete, before that none."""
        if self.row < self.args.rollout_chunks:
            return
        chains = self._chains()
        warmup = self.warmup()
        for index in self._minibatches(len(chains.obs)):
            yield Chains(*(value[index] for value in chains))
            if not warmup and self.agent.kl > self.args.target_kl:
                break
        for value in self.data.values():
            value.zero_()
        self.began = self.steps
        self.row = 0

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        parts = max(round(count / self.args.batch_size), 1)
        for _ in range(self.args.epochs):
            order = torch.randperm(count, generator=self.batch_rng).to(self.agent.device)
            yield from order.chunk(parts)

    @torch.no_grad()
    def _chains(self) -> Chains:
        agent = self.agent
        data = self.data
        obs = data["obs"].flatten(0, 1)
        chain = data["chain"].flatten(0, 1)
        mean, log_std = all_steps(agent.policy, agent.log_std, obs, chain)
        value = agent.value(obs).view_as(data["reward"])  # (T, E)
        next_value = agent.value(data["next_obs"].flatten(0, 1)).view_as(value)
        advantage = gae(
            data["reward"],
            data["discount"],
            data["terminated"],
            data["ended"],
            value,
            next_value,
            self.args.gae_lambda,
        )
        return Chains(
            obs,
            chain,
            data["valid"].flatten(0, 1),
            mean,
            log_std,
            advantage.flatten(),
            (advantage + value).flatten(),
        )

    def success(self) -> float | None:
        """Return the share of the last 20 episodes, None before the first has ended."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def _episode_seed(self) -> int:
        return int(self.episode_rng.integers(EVAL_SEED))

    def state_dict(self) -> dict[str, Any]:
        filled = {name: value[: self.row + 1].cpu().clone() for name, value in self.data.items()}
        return {name: vars(self)[name] for name in self.counters} | {
            "data": filled,
            "runners": [runner.state_dict() for runner in self.runners],
            "episode_rng": self.episode_rng.bit_generator.state,
            "noise_rng": self.noise_rng.get_state(),
            "batch_rng": self.batch_rng.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["runners"]) != self.args.num_envs:
            raise UserError(f"a run goes on as it began: --num-envs {len(state['runners'])}")
        for name in self.counters:
            vars(self)[name] = state[name]
        for name, value in state["data"].items():
            self.data[name][: len(value)] = value
        for runner, saved in zip(self.runners, state["runners"]):
            runner.load_state_dict(saved)
        if any(runner.ended for runner in self.runners):
            raise UserError(
                f"an episode being played is longer than --episode-limit {self.args.episode_limit}"
            )
        self.episode_rng.bit_generator.state = state["episode_rng"]
        self.noise_rng.set_state(state["noise_rng"])
        self.batch_rng.set_state(state["batch_rng"])

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
