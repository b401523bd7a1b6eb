"""What DPPO and ReinFlow share: a noisy flow, GAE over chunks, PPO's clipped loss, V(s), parallel environments.

    python -m baselines.dppo --task lift          # or reinflow; on Lift about 2 minutes on two idle cores

The flow's Euler steps with Gaussian noise added are a chain x_0 ... x_K whose likelihood is known, so PPO can raise the
probability of chains that led to more than V expected. An iteration: --num-envs environments execute --rollout-chunks
chunks each, then --epochs passes over them, then the chunks are thrown away. The first rollouts, those that began
before --warmup-steps, train V only. An environment step of any environment counts as one, as in the other methods.
The environments are stepped one after the other in this process, which keeps resuming exact; the policy is called
once for all of them. Of train_online.py's flags --heads, --pessimism, --tau, --policy-tau, --capacity, --demo-share and
--updates-per-step are not used; they run in float32.

Other than in the authors' code (github.com/irom-princeton/dppo, github.com/ReinFlow/ReinFlow): success ends an episode;
a time-out bootstraps from the value of its own last observation and no trace runs on into the next episode (theirs took
the next episode's first observation and went on); gamma counts environment steps, not chunks; rewards are POCO's,
summed with discount inside a chunk, and not scaled (theirs: divided by a running deviation); steps of a chunk that an
episode's end cut off are masked in the likelihood; a minibatch is of whole chains; the likelihoods are not clamped; the
chain is not clipped before its end, and what it gives the environment is, so that without noise it is the flow;
--target-kl is in nats of the whole chain, exact, not of a mean over its cells.

What to expect: the authors collect 60,000 steps for each iteration on Lift, millions in all. On two sets of 3,000 steps
of one cloned policy (Lift, seed 11, --noise-std 0.1) the policy's gradients had cosines from -0.2 to 0.1 with every V,
lambda and flow step tried, as with random advantages. So the 15,000 steps of the cpu preset are too few to climb by,
and its settings are careful: a first rollout moves the chain by 0.15 nats. Its V is one layer of 64, which explained
0.14 to 0.35 of the variance of the other set's returns; 3x256 explained -0.09 to 0.21, with LayerNorm below zero.

Shapes: B batch, T chunks of a rollout, E environments, K flow steps, H chunk, A action, D observation.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import envs
from logbook import UserError
from train_offline import EVAL_SEED, environment
from train_online import LoopArgs, minimise


@dataclass
class Args(LoopArgs):
    num_envs: int = 20                # environments side by side
    rollout_chunks: int = 100         # chunks that each of them executes in an iteration (ours)
    epochs: int = 10                  # passes over an iteration's chunks, --batch-size at a time
    policy_learning_rate: float = 1e-5  # Adam (ours); V has --online-learning-rate
    value_hidden: int = 256           # width of V's hidden layers
    value_layers: int = 3             # hidden layers of V
    gae_lambda: float = 0.95          # per chunk
    ratio_clip: float = 0.01          # the ratio, a mean over cells in its exponent, counts within 1 -+ this
    target_kl: float = 1.0            # an iteration stops when its chain has moved this far, in nats


# ---- the noisy flow --------------------------------------------------------------------------------------------------

def chain_steps(policy, log_std, obs, x, times):
    """Mean and log-deviation (B, n, H, A) of the step from x (B, n, H, A) at the given times (n,) of the flow.

    log_std(context, t) gives anything that broadcasts to x; it sees the same t = k/K here, in both passes.
    """
    context, t = policy.encode(obs), times.to(x).expand(x.shape[:2])
    mean = x + policy.velocity(context, x, t) / policy.flow_steps
    return mean, log_std(context, t).expand(mean.shape)


@torch.no_grad()
def sample_chain(policy, log_std, obs, noise):
    """x_0 ... x_K from standard noise, both (B, K + 1, H, A): x_0 is noise, a step is Euler's plus noise."""
    chain = [noise[:, :1]]
    for k in range(policy.flow_steps):
        mean, log_deviation = chain_steps(policy, log_std, obs, chain[-1], torch.tensor([k / policy.flow_steps]))
        chain.append(mean + log_deviation.exp() * noise[:, k + 1:k + 2])
    return torch.cat(chain, 1)


def all_steps(policy, log_std, obs, chain):
    """Mean and log-deviation (B, K, H, A) of every step of chains (B, K + 1, H, A)."""
    return chain_steps(policy, log_std, obs, chain[:, :-1], torch.arange(policy.flow_steps) / policy.flow_steps)


def log_likelihood(chain, mean, log_std, valid):
    """Log-density (B, K) of each step, a mean over its executed cells; valid (B, H)."""
    z = (chain[:, 1:] - mean) / log_std.exp()
    cells = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)                        # (B, K, H, A)
    return (cells.mean(-1) * valid[:, None]).sum(-1) / valid.sum(1, keepdim=True)


def chain_kl(old_mean, old_log_std, mean, log_std):
    """KL(old || new) in nats of a chain, averaged over the batch: Gaussians at the states that the old one visited."""
    moved = (old_log_std.exp().square() + (mean - old_mean).square()) / (2 * (2 * log_std).exp())
    return (log_std - old_log_std + moved - 0.5).sum((1, 2, 3)).mean()


# ---- PPO -------------------------------------------------------------------------------------------------------------

def gae(reward, discount, terminated, ended, value, next_value, trace):
    """Advantages (T, E) over chunks, all arguments (T, E), trace is lambda.

    discount is gamma^k of the k steps that the chunk had; next_value is V of its own last observation, which counts
    unless the episode terminated there; a trace ends with its episode, or with the rollout.
    """
    error = reward + discount * (1 - terminated) * next_value - value                        # PPO, Eq. 12
    advantage, last = torch.zeros_like(error), torch.zeros_like(error[0])
    for t in reversed(range(len(error))):
        advantage[t] = last = error[t] + discount[t] * trace * (1 - ended[t]) * last         # PPO, Eq. 11
    return advantage


def clipped_loss(log_ratio, advantage, clip):
    """-min(A rho, A clip(rho, 1 - clip, 1 + clip)), broadcast and averaged; returns loss, share that is clipped."""
    ratio = log_ratio.exp()
    loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))    # PPO, Eq. 7
    return loss.mean(), ((ratio - 1).abs() > clip).float().mean()


def standardised(advantage):
    return (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)


class Value(nn.Module):
    """V(s): obs (B, D) -> (B,), with the policy's observation statistics."""

    def __init__(self, policy, hidden, layers):
        super().__init__()
        sizes = [len(policy.obs_mean)] + [hidden] * layers
        parts = [part for pair in zip(sizes, sizes[1:]) for part in (nn.Linear(*pair), nn.SiLU())]
        self.body = nn.Sequential(*parts, nn.Linear(hidden, 1))
        self.register_buffer("obs_mean", policy.obs_mean.clone())
        self.register_buffer("obs_std", policy.obs_std.clone())
        self.to(policy.obs_mean.device)

    def forward(self, obs):
        return self.body(((obs - self.obs_mean) / self.obs_std).clamp(-5, 5)).squeeze(-1)


def update_value(value, optimizer, batch):
    loss = (value(batch.obs) - batch.returns).square().mean()                                # PPO, Eq. 9, L^VF
    minimise(loss, optimizer)
    return {"value": loss.detach(), "returns": batch.returns.mean()}


# ---- the world -------------------------------------------------------------------------------------------------------

class Chains(NamedTuple):
    """What an update learns from; mean and log_std are those of the policy that drew the chains."""

    obs: Tensor        # (B, D)
    chain: Tensor      # (B, K + 1, H, A)
    valid: Tensor      # (B, H) 1 for executed steps
    mean: Tensor       # (B, K, H, A)
    log_std: Tensor    # (B, K, H, A)
    advantage: Tensor  # (B,)
    returns: Tensor    # (B,) what V should say


def check(args):
    """Refuses, before anything runs, what the methods built on this file cannot do."""
    if args.rollouts:
        raise UserError("on-policy methods play with exactly the policy they update: they take no --rollouts")


class Rollouts:
    """Stands in for train_online.py's Interaction: E environments, whose chunks are learnt from once and forgotten.

    A step is one step of one environment. They take turns, a chunk each; then the policy decides for all.
    """

    counters = ("steps", "episodes", "recent", "began", "row", "turn", "done")

    def __init__(self, args, agent, clock, demo_steps):
        self.args, self.agent, self.clock = args, agent, clock
        obs_dim, horizon, flow = (envs.TASKS[args.task].obs_dim,), (args.horizon,), agent.policy.flow_steps
        shapes = {"obs": obs_dim, "next_obs": obs_dim, "chain": (flow + 1, *horizon, agent.policy.action_dim),
                  "valid": horizon, "reward": (), "discount": (), "terminated": (), "ended": ()}
        self.data = {name: torch.zeros(args.rollout_chunks, args.num_envs, *shape, device=agent.device)
                     for name, shape in shapes.items()}                                      # (T, E, ...)
        self.episode_rng = np.random.default_rng([args.seed, 2])
        self.noise_rng = torch.Generator().manual_seed(args.seed + 1)
        self.batch_rng = torch.Generator().manual_seed(args.seed + 2)
        self.runners = [envs.ChunkRunner(envs.make_env(args.task, **environment(args)), self._chunk)
                        for _ in range(args.num_envs)]
        self.steps, self.episodes, self.recent = 0, 0, []
        self.began, self.row, self.turn, self.done = 0, 0, 0, 0      # step, chunk, environment, steps of its chunk

    def start(self, demonstrations):
        for runner in self.runners:
            runner.reset(self._episode_seed())

    def warmup(self):
        """A rollout is learnt from as a whole, so its beginning decides."""
        return self.began < self.args.warmup_steps

    def step(self):
        """One environment step of the environment whose turn it is; a new episode when the old one has ended."""
        if self.turn == self.done == 0:
            self._decide()
        with self.clock("env"):
            runner, place, args = self.runners[self.turn], (self.row, self.turn), self.args
            move = runner.step()
            self.data["reward"][place] += args.discount ** self.done * (move.reward + args.reward_offset)
            self.data["valid"][place][self.done] = 1
            self.steps, self.done, ended = self.steps + 1, self.done + 1, move.terminated or move.truncated
            if ended or self.done == args.horizon:
                outcome = {"next_obs": move.next_obs, "discount": args.discount ** self.done,
                           "terminated": move.terminated, "ended": ended}
                for name, value in outcome.items():
                    self.data[name][place] = torch.as_tensor(value)
                self.turn, self.done = (self.turn + 1) % args.num_envs, 0
                self.row += self.turn == 0
            if ended:
                self.episodes += 1
                self.recent = [*self.recent[-19:], float(move.success)]
                runner.reset(self._episode_seed())

    def _decide(self):
        with self.clock("act"):
            chains, device = self.data["chain"][self.row], self.agent.device
            self.data["obs"][self.row] = torch.as_tensor(np.stack([runner.obs for runner in self.runners]))
            noise = torch.randn(chains.shape, generator=self.noise_rng).to(device)
            chains.copy_(sample_chain(self.agent.policy, self.agent.log_std, self.data["obs"][self.row], noise))

    def _chunk(self, _):
        return self.data["chain"][self.row, self.turn, -1].clamp(-1, 1).cpu().numpy()

    def batches(self):
        """Minibatches for all epochs once the rollout is complete, before that none."""
        if self.row < self.args.rollout_chunks:
            return
        chains, warmup = self._chains(), self.warmup()
        parts = max(round(len(chains.obs) / self.args.batch_size), 1)
        for index in (index for _ in range(self.args.epochs) for index in self._order(len(chains.obs)).chunk(parts)):
            yield Chains(*(value[index] for value in chains))
            if not warmup and self.agent.kl > self.args.target_kl:
                break
        for value in self.data.values():
            value.zero_()
        self.began, self.row = self.steps, 0

    def _order(self, count):
        return torch.randperm(count, generator=self.batch_rng).to(self.agent.device)

    @torch.no_grad()
    def _chains(self):
        obs, next_obs, chain, valid = (self.data[name].flatten(0, 1) for name in ("obs", "next_obs", "chain", "valid"))
        mean, log_std = all_steps(self.agent.policy, self.agent.log_std, obs, chain)
        outcome = [self.data[name] for name in ("reward", "discount", "terminated", "ended")]            # (T, E) each
        value, next_value = (self.agent.value(x).view_as(outcome[0]) for x in (obs, next_obs))
        advantage = gae(*outcome, value, next_value, self.args.gae_lambda)
        return Chains(obs, chain, valid, mean, log_std, advantage.flatten(), (advantage + value).flatten())

    def success(self):
        """Share of the last 20 episodes, None before the first has ended."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def _episode_seed(self):
        return int(self.episode_rng.integers(EVAL_SEED))

    def state_dict(self):
        return {name: getattr(self, name) for name in self.counters} | {
            "data": {name: value[:self.row + 1].cpu().clone() for name, value in self.data.items()},
            "runners": [runner.state_dict() for runner in self.runners],
            "episode_rng": self.episode_rng.bit_generator.state, "noise_rng": self.noise_rng.get_state(),
            "batch_rng": self.batch_rng.get_state()}

    def load_state_dict(self, state):
        if len(state["runners"]) != self.args.num_envs:
            raise UserError(f"a run goes on as it began: with --num-envs {len(state['runners'])}")
        for name in self.counters:
            setattr(self, name, state[name])
        for name, value in state["data"].items():
            self.data[name][:len(value)] = value
        for runner, saved in zip(self.runners, state["runners"]):
            runner.load_state_dict(saved)
        if any(runner.ended for runner in self.runners):
            raise UserError(f"--episode-limit {self.args.episode_limit} has passed in an episode being played")
        self.episode_rng.bit_generator.state = state["episode_rng"]
        self.noise_rng.set_state(state["noise_rng"])
        self.batch_rng.set_state(state["batch_rng"])

    def close(self):
        for runner in self.runners:
            runner.env.close()
