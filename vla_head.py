"""POCO on a vision-language-action policy: a flow action head on a frozen vision-language model (Sec. V-F, Table V).

    python vla_head.py --task lift --preset cpu                # tiny random backbone: 14 minutes, beside another run
    python vla_head.py --task lift --preset paper --backbone DIR      # Table V on real SmolVLM or PaliGemma weights
    from vla_head import Backbone, Learner, VLAFlowHead, INSTRUCTIONS               # the arm takes the head

The backbone runs once per state, without gradient; its hidden states, flat beside the proprioception, are the
observation in the replay. The head is a small diffusion transformer (AdaLN) over the chunk's H actions which
cross-attends to the backbone's hidden states. N candidates are folded into the query axis against keys and values that
are projected once per `sample` and never expanded, so N x K head steps share one prefix. `VLAFlowHead` inherits the
sampler and the loss of flow_policy.FlowPolicy: poco.e_step and poco.m_step_loss see no difference. The critic is
chunk_critic.ChunkCritic on pooled features (paper: a ResNet's) and proprioception. `transformers` is imported late.
Not here: pi0.5, SmolVLA and GR00T with their own heads (arms/adapters/), tuning the backbone, a real arm (robot.py).

Shapes: B batch, V views, S image side, L tokens, W their width, P proprioception, N candidates, H chunk, A action,
C channels of the head, K flow steps, F features of the critic.
"""
import argparse
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demos
import envs
from arms.adapters.backbone import INSTRUCTIONS, Backbone, fingerprint, tiny_backbone
from arms.adapters.cost import cost
from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target
from demos.views import Seeing, View, see_demonstrations
from flow_policy import FlowPolicy
from logbook import (Clock, Interrupt, Logbook, Progress, Report, UserError, check_end, check_kept, check_numbers, cli,
                     curve, fitting, keep_rate, load_checkpoint, noise_state, plainly, read_args, refuse_nonfinite,
                     restore_noise, usable_device)
from poco import e_step, m_step_loss
from replay import ChunkReplay


# ---- the trainable head ----------------------------------------------------------------------------------------------

@dataclass
class Context:
    """What the head knows of B states; with `projected`, the keys and values of every layer."""

    hidden: Tensor                    # (B, L, W) standardised
    state: Tensor                     # (B, P) standardised
    projected: list | None = None     # per layer (key, value), each (B, heads, L, C / heads)

    def __len__(self):
        return len(self.state)

    device = property(lambda self: self.state.device)
    dtype = property(lambda self: self.state.dtype)


class Block(nn.Module):
    """Attention among a chunk's actions, attention to the context, MLP; each scaled, shifted and gated by AdaLN."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(channels, 9 * channels)
        self.self_in, self.self_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.query, self.cross_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Context tokens (B, L, C) -> key and value, each (B, heads, L, C / heads)."""
        return self._split(self.key_value(tokens), 2)

    def forward(self, x: Tensor, condition: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """x (B, N, H, C), condition (B, N, 1, C) -> (B, N, H, C)."""
        shape = x.shape
        shift, scale, gate = self.modulation(F.silu(condition)).unflatten(-1, (3, 3, -1)).unbind(-3)   # (B, N, 1, 3, C)
        norm = [lambda h, i=i: F.layer_norm(h, h.shape[-1:]) * (1 + scale[..., i, :]) + shift[..., i, :]
                for i in range(3)]
        q, k, v = self._split(self.self_in(norm[0](x)).flatten(0, 1), 3)             # (B*N, heads, H, C / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)
        x = x + (1 + gate[..., 0, :]) * self.self_out(h)
        q, = self._split(self.query(norm[1](x)).flatten(1, 2), 1)                    # (B, heads, N*H, C / heads)
        h = F.scaled_dot_product_attention(q, key, value).transpose(1, 2).reshape(shape)
        x = x + (1 + gate[..., 1, :]) * self.cross_out(h)
        return x + (1 + gate[..., 2, :]) * self.narrow(F.silu(self.wide(norm[2](x))))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(rows, T, parts * C) -> parts x (rows, heads, T, C / heads)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class VLAFlowHead(FlowPolicy):
    """FlowPolicy's sampler and loss around an AdaLN transformer on a frozen backbone's hidden states.

    `state_dict` holds the head alone, with the statistics that `fit` takes from the demonstrations; deepcopy shares the
    backbone. length, width: of the hidden states, L and W. An observation is [proprioception P, hidden states L*W].
    """

    def __init__(self, backbone: Backbone | None, length: int, width: int, state_dim: int, action_dim: int,
                 horizon: int, channels: int = 64, layers: int = 2, heads: int = 4, flow_steps: int = 10,
                 features: int = 64):
        nn.Module.__init__(self)                                 # of FlowPolicy only the methods
        self.backbone, self.length, self.width, self.state_dim = backbone, length, width, state_dim
        self.action_dim, self.horizon, self.flow_steps = action_dim, horizon, flow_steps
        self.from_hidden, self.from_state = nn.Linear(width, channels), nn.Linear(state_dim, channels)
        self.from_action, self.out = nn.Linear(action_dim, channels), nn.Linear(channels, action_dim)
        self.from_time = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.token_place = nn.Parameter(torch.randn(length, channels) / 2)
        self.step_place = nn.Parameter(torch.randn(horizon, channels) / 2)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.last = nn.Linear(channels, 2 * channels)            # AdaLN of the output
        self.register_buffer("waves", torch.exp(torch.linspace(0, math.log(1000), channels // 2)), persistent=False)
        for name, shape in (("hidden", (length, width)), ("state", (state_dim,)), ("obs", (state_dim + features,))):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_std", torch.ones(shape))
        self.register_buffer("pool", torch.randn(length * width, features) / math.sqrt(length * width))

    @torch.no_grad()
    def fit(self, obs: Tensor, least: Tensor | float = 1e-3) -> None:
        """Statistics of obs (rows, P + L*W), deviations of P at least `least`: standardise, pool by components."""
        state, hidden = self._parts(obs)
        self.state_mean.copy_(state.mean(0)), self.state_std.copy_(state.std(0).clamp(min=least))
        spread = hidden.std(0)
        self.hidden_mean.copy_(hidden.mean(0)), self.hidden_std.copy_(spread.clamp(min=0.2 * spread.mean() + 1e-6))
        some = self.encode(obs[torch.linspace(0, len(obs) - 1, min(len(obs), 1024)).long()]).hidden.flatten(1)
        count = min(self.pool.shape[1], len(some) - 1)
        self.pool.zero_()[:, :count].copy_(torch.linalg.svd(some, full_matrices=False)[2][:count].T)
        features = torch.cat([self.critic_obs(self.encode(part)) for part in obs.split(256)])
        self.obs_mean.copy_(features.mean(0)), self.obs_std.copy_(features.std(0).clamp(min=1e-3))
        self.obs_std[:self.state_dim] = 1                        # standardised already, and `least` holds here too

    def observe(self, images: Tensor, state: Tensor) -> Tensor:
        """images (B, V, S, S, 3) uint8 and proprioception (B, P) -> observation (B, P + L*W), one backbone call."""
        return torch.cat([state.to(self.device), self.backbone(images).flatten(1).to(self.device, state.dtype)], dim=1)

    def encode(self, obs: Tensor | dict) -> Context:
        """An observation (B, P + L*W), or {"images", "state"} to observe now -> context, once per state."""
        if isinstance(obs, dict):
            obs = self.observe(obs["images"], obs["state"])
        state, hidden = self._parts(obs)
        hidden = ((hidden - self.hidden_mean) / self.hidden_std).clamp(-10, 10)
        return Context(hidden, ((state - self.state_mean) / self.state_std).clamp(-10, 10))

    def critic_obs(self, context: Context) -> Tensor:
        """Context -> what the critic sees of it (B, F): proprioception and pooled features."""
        return torch.cat([context.state, context.hidden.flatten(1) @ self.pool], dim=1)

    def prepare(self, context: Context) -> Context:
        """Project every layer's keys and values, once for all candidates and flow steps."""
        tokens = self.from_hidden(context.hidden) + self.token_place
        tokens = F.layer_norm(tokens, tokens.shape[-1:])                             # (B, L, C)
        return dataclasses.replace(context, projected=[block.project(tokens) for block in self.blocks])

    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t | context): x (B, N, H, A), t (B, N) in [0, 1] -> (B, N, H, A)."""
        projected = context.projected or self.prepare(context).projected
        angle = t.unsqueeze(-1) * self.waves
        condition = self.from_time(torch.cat([angle.sin(), angle.cos()], -1)) + self.from_state(context.state)[:, None]
        condition = condition.unsqueeze(2)                                           # (B, N, 1, C)
        h = self.from_action(x) + self.step_place + self.from_state(context.state)[:, None, None]
        for block, (key, value) in zip(self.blocks, projected):
            h = block(h, condition, key, value)
        shift, scale = self.last(F.silu(condition)).chunk(2, -1)
        return self.out(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)

    @torch.no_grad()
    def sample(self, context: Context, n: int, noise: Tensor | None = None, steps: int | None = None) -> Tensor:
        """Draw n chunks per state, as FlowPolicy does: (B, n, H, A) in [-1, 1], without gradient."""
        return super().sample(self.prepare(context), n, noise, steps)

    @property
    def device(self):
        return self.obs_mean.device

    def _parts(self, obs):
        state, hidden = obs[:, :self.state_dim], obs[:, self.state_dim:]
        return state, hidden.unflatten(1, (self.length, self.width))


# ---- POCO on it: what the loop below drives --------------------------------------------------------------------------

class Learner:
    """Head, critic, and one update of each. `args` needs the fields of `Args` below from learning_rate to clip.

    The actor, a moving average of the head, is what acts and what is delivered. Optimisers, averages and `state_dict`
    hold no weight of the backbone.
    """

    stats = ("q_mean", "q_min", "q_max", "q_spread", "ess", "kl", "clip_frac", "alive_mass", "bc", "surrogate",
             "critic", "q_data", "target")

    def __init__(self, args, policy: VLAFlowHead, clock: Clock | None = None):
        self.args, self.policy, self.clock = args, policy, clock or Clock()
        self.critic = ChunkCritic(len(policy.obs_mean), policy.action_dim, policy.horizon, args.critic_hidden,
                                  args.critic_layers, args.critic_heads).to(policy.device)
        self.critic.set_normalizer(policy.obs_mean, policy.obs_std)
        self.target, self.actor = copy.deepcopy(self.critic), copy.deepcopy(policy)     # the backbone is shared
        for frozen in (self.target, self.actor):
            frozen.requires_grad_(False)
        self.cloning, self.actor_optimizer, self.critic_optimizer = (
            keep_rate(torch.optim.Adam(parameters, lr=rate)) for parameters, rate in (
                (policy.head_parameters(), args.learning_rate), (policy.head_parameters(), args.actor_learning_rate),
                (self.critic.parameters(), args.critic_learning_rate)))

    def clone(self, batch) -> dict:
        """One step of behaviour cloning; load the actor with the policy when it is done."""
        context = self.policy.encode(batch.obs)
        loss, stats = m_step_loss(self.policy, context, batch.chunk, batch.valid, None, None, 0, 0)
        self._minimise(loss, self.cloning)
        return stats

    def update(self, batch, warmup: bool) -> dict:
        """One update on replay chunks (replay.Batch); during warm-up only the critic learns. Returns stats."""
        args, policy = self.args, self.policy
        with torch.no_grad():
            context, after = policy.encode(batch.obs), policy.encode(batch.next_obs)
            seen, seen_after = policy.critic_obs(context), policy.critic_obs(after)
        with self.clock("critic"):
            next_q = aggregate(self.target(seen_after, policy.sample(after, 1)), args.pessimism)[:, 0]
            loss, stats = critic_loss(self.critic, seen, batch.chunk, td_target(batch.returns, batch.bootstrap, next_q))
            self._minimise(loss, self.critic_optimizer)
            ema_update(self.target, self.critic, args.tau)
        if warmup:
            return stats
        candidates, weights, e_stats = None, None, {}
        if args.guidance > 0:
            with self.clock("e_step"):
                candidates, weights, e_stats = e_step(
                    policy, lambda _, chunks: aggregate(self.target(seen, chunks), args.pessimism), context,
                    args.num_candidates, args.temperature)
        with self.clock("m_step"):
            loss, m_stats = m_step_loss(policy, context, batch.chunk, batch.valid, candidates, weights, args.guidance,
                                        args.clip)
            self._minimise(loss, self.actor_optimizer)
            ema_update(self.actor, policy, args.policy_tau)
        return stats | e_stats | m_stats

    @torch.no_grad()
    def act(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A chunk of the actor's: obs (1, P + L*W) of `observe` -> (H, A); its noise comes from rng."""
        noise = rng.standard_normal((1, 1, self.actor.horizon, self.actor.action_dim), dtype=np.float32)
        context = self.actor.encode(torch.as_tensor(obs, device=self.actor.device))
        return self.actor.sample(context, 1, torch.as_tensor(noise, device=context.device))[0, 0].cpu().numpy()

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in
                ("policy", "actor", "critic", "target", "cloning", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError for a checkpoint of other sizes, naming a weight that does not fit."""
        for name, value in state.items():
            with fitting(f"the checkpoint's {name}", "use the same --backbone and sizes"):
                getattr(self, name).load_state_dict(value)

    @staticmethod
    def _minimise(loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


# ---- python vla_head.py: image-and-instruction Lift ------------------------------------------------------------------

@dataclass
class Args:
    task: str = "lift"                # lift, can or square
    preset: Literal["cpu", "paper"] = "cpu"  # paper: Table V, needs --backbone; cpu: minutes on a laptop
    backbone: str | None = None       # folder of a SmolVLM or PaliGemma; None: a tiny random one
    instruction: str | None = None    # what the model is told; default: the task's own
    view: Literal["auto", "rendered", "drawn"] = "auto"  # pictures by OpenGL, by software, or by what works
    seed: int = 0                     # of demonstrations, networks, batches and training episodes
    data: str | None = None           # robomimic HDF5 with 'states'; default: scripted ones, made when missing
    demo_episodes: int = 50           # demonstrations
    episode_limit: int = 200          # steps (Table V)
    horizon: int = 10                 # H (Table V)
    channels: int = 256               # width of the head (ours)
    layers: int = 6                   # blocks of the head (ours)
    heads: int = 8                    # attention heads of the head (ours)
    flow_steps: int = 10              # K
    sft_steps: int = 20_000           # behaviour cloning before reinforcement learning (ours)
    batch_size: int = 64              # (Table V)
    learning_rate: float = 1e-4       # Adam, cloning (ours)
    actor_learning_rate: float = 5e-5  # Adam, POCO (Table V)
    critic_learning_rate: float = 3e-4  # Adam (Table V)
    critic_hidden: int = 512          # width of the critic
    critic_layers: int = 4            # hidden layers of the critic
    critic_heads: int = 2             # critics
    pessimism: float = 0.0            # deviations over the critics taken off their mean
    discount: float = 0.99            # gamma, per environment step (Table V)
    tau: float = 0.005                # rate of the target critic's moving average
    policy_tau: float = 1.0           # rate of the actor's moving average; 1: the newest weights
    num_candidates: int = 16          # N (Table V)
    temperature: float = 0.001        # eta (Table V)
    guidance: float = 1.0             # beta (digests of the paper)
    clip: float = 0.01                # zeta (digests of the paper)
    reward_offset: float = 0.0        # added to every reward
    warmup_steps: int = 2000          # first environment steps: only the critic learns (Table V)
    online_steps: int = 15_000        # environment steps, warm-up included (Table VI)
    steps_per_update: int = 1         # environment steps per gradient update
    capacity: int = 20_000            # online transitions kept
    eval_every: int = 3000            # environment steps
    eval_episodes: int = 50           # of every evaluation, always the same seeds
    log_every: int = 250              # environment steps
    save_every: int = 2500            # environment steps
    device: str = "auto"              # cpu, cuda; auto takes the best one
    threads: int = 0                  # CPU threads for torch; 0 leaves torch's own choice
    run_dir: str | None = None        # default runs/<task>-vla-s<seed>
    overwrite: bool = False           # replace a run that is already in run_dir
    resume: str | None = None         # continue this run folder exactly where it stopped
    eval: str | None = None           # only evaluate this run folder's checkpoint


CPU = dict(demo_episodes=20, episode_limit=100, horizon=5, channels=64, layers=2, heads=2, flow_steps=5, sft_steps=1500,
           batch_size=32, learning_rate=1e-3, actor_learning_rate=1e-3, critic_learning_rate=1e-3, critic_hidden=256,
           critic_layers=3, policy_tau=0.005, num_candidates=8, temperature=0.01, clip=0.6, reward_offset=-0.01,
           warmup_steps=1000, online_steps=5000, steps_per_update=2, capacity=5000, eval_every=2500, threads=1)
LEAST = dict(temperature=1e-6) | dict.fromkeys(("seed", "clip", "guidance", "pessimism", "sft_steps", "warmup_steps",
                                                "online_steps", "threads"), 0)
KEPT = ("task", "preset", "seed", "demo_episodes", "reward_offset", "view")             # by a resumed run
PHASES = ("env", "critic", "e_step", "m_step", "eval")
COLUMNS = ["warmup", "success", "episodes", "updates", "env_steps_per_s", "updates_per_s", *Learner.stats,
           *(f"time/{phase}" for phase in PHASES)]
EVAL_SEED, VIEWS, STATE = 1_000_000, 2, 9     # the object, behind the first 9 numbers of an observation, is hidden


def parse(argv=None) -> Args:
    """The command line; --preset, --resume and --eval are looked at first, so that --help shows their values."""
    import tyro
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--resume", "--eval"):
        first.add_argument(name)
    known, _ = first.parse_known_args(argv)
    if known.resume and known.eval:
        raise UserError("--resume goes on with a run, --eval tests one: give one of them")
    stored, fresh = known.resume or known.eval, CPU if known.preset in (None, "cpu") else {"preset": "paper"}
    values = read_args(stored, method="vla") | {"overwrite": False} if stored else fresh
    default = Args(**{name: value for name, value in values.items() if name in Args.__dataclass_fields__})
    args = tyro.cli(Args, args=argv, description=__doc__, default=default)
    check_kept(stored, args, default, KEPT if known.resume else KEPT[:1] if known.eval else ())
    if args.preset == "paper" and args.backbone is None:
        raise UserError("--preset paper needs --backbone DIR, a SmolVLM or PaliGemma in from_pretrained's format; "
                        "--preset cpu makes a tiny random one")
    check_numbers(args, LEAST)
    if args.channels % math.lcm(args.heads, 2):
        raise UserError(f"--heads, and 2, must divide --channels, got {args.heads} and {args.channels}")
    return args


def make_policy(args, folder: Path) -> VLAFlowHead:
    """The backbone, loaded from a folder whether tiny or real, and a fresh head on it."""
    device = usable_device(args.device, mps=False)
    own = folder / "backbone"
    there = (args.resume or args.eval) and (own / "config.json").is_file()
    source = args.backbone or (own if there else tiny_backbone(own))
    text = args.instruction or INSTRUCTIONS[args.task]
    backbone = Backbone.load(source, text, VIEWS, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return VLAFlowHead(backbone, backbone.length, backbone.width, STATE, envs.TASKS[args.task].action_dim, args.horizon,
                       args.channels, args.layers, args.heads, args.flow_steps).to(device)


def demonstrations(args, view: View, policy: VLAFlowHead) -> dict:
    """Transitions whose observations are what `Seeing` gives; every state is encoded once."""
    with plainly():
        path = demos.obtain(args.task, "cpu", args.data, args.demo_episodes, args.seed, 1)
        data = see_demonstrations(view, path, args.demo_episodes, policy.observe, STATE)
    return data | {"reward": data["reward"] + args.reward_offset}


def price(args, learner: Learner, rows: int) -> str:
    """What this run will take, measured; rows: of the replay."""
    policy, backbone = learner.policy, learner.policy.backbone
    image = torch.full((1, VIEWS, backbone.size, backbone.size, 3), 100, dtype=torch.uint8)
    obs = policy.observe(image, torch.zeros(1, policy.state_dim))
    return cost(policy, lambda: backbone(image), policy.encode(obs.expand(args.batch_size, -1)), args.num_candidates,
                args.online_steps // args.steps_per_update, learner.critic, backbone.model, 8 * obs.shape[1] * rows)


class Run:
    """Replay, environment and generators: all that a resumed run needs besides the learner."""

    def __init__(self, args, learner, view, demo_steps):
        policy = learner.policy
        self.args, self.learner, self.view = args, learner, view
        self.replay = ChunkReplay(demo_steps + args.capacity, policy.state_dim + policy.length * policy.width,
                                  policy.action_dim, args.horizon, args.discount, policy.device)
        self.act_rng, self.episode_rng = (np.random.default_rng([args.seed, stream]) for stream in (1, 2))
        self.batch_rng = torch.Generator(policy.device).manual_seed(args.seed)
        self.runner = envs.ChunkRunner(self.environment(), lambda obs: learner.act(obs[None], self.act_rng))
        self.cloned, self.steps, self.episodes, self.recent = 0, 0, 0, []

    def environment(self, every=1):
        env = envs.make_env(self.args.task, episode_limit=self.args.episode_limit, env_args=self.view.env_args)
        return Seeing(env, self.view, self.learner.policy.observe, STATE, every)

    def supervised(self, save) -> bool:
        """SFT: behaviour cloning of the demonstrations, before anything else is in the replay. False if interrupted."""
        total, start, stop = self.args.sft_steps, time.time(), False
        with Interrupt() as interrupt:
            while self.cloned < total and not stop:
                stats = self.learner.clone(self.batch())
                self.cloned, stop = self.cloned + 1, interrupt.stop              # read once: a signal may come later
                if self.cloned % max(total // 5, 1) == 0 or self.cloned == total or stop:
                    self.learner.actor.load_state_dict(self.learner.policy.state_dict())
                    save()
                    print(f"SFT {self.cloned}/{total}: loss {stats['bc']:.3f}, {time.time() - start:.0f} s", flush=True)
        return not interrupt.stop and self.cloned >= total

    def batch(self):
        return self.replay.sample(self.args.batch_size, self.batch_rng)

    def reset(self):
        self.runner.reset(int(self.episode_rng.integers(EVAL_SEED)))

    def step(self):
        """One environment step into the replay; a new episode when the old one has ended."""
        move = self.runner.step()
        self.replay.add(move.obs, move.action, move.reward + self.args.reward_offset, *move[3:6])
        self.steps += 1
        if self.runner.ended:
            self.episodes, self.recent = self.episodes + 1, [*self.recent[-19:], float(move.success)]
            self.reset()

    def evaluate(self, book, step) -> None:
        """Success of the actor over fixed episodes, in this process; pictures only where a chunk begins."""
        args = self.args
        env = self.environment(args.horizon)
        try:
            rows = [envs.run_episode(self.learner.act, env, EVAL_SEED + i) for i in range(args.eval_episodes)]
        except ValueError as error:                                              # a non-finite action
            raise UserError(f"evaluation at step {step}: {error}") from error
        env.close()
        if book is not None:
            book.evaluation(step, "policy", [dict(zip(("seed", "success", "length", "return"), row)) for row in rows])
        print(f"step {step}: success {envs.EvalResult(*(np.array(column) for column in zip(*rows)))}", flush=True)

    def state_dict(self) -> dict:
        numbers = {name: getattr(self, name) for name in ("cloned", "steps", "episodes", "recent")}
        return numbers | {"replay": self.replay.state_dict(), "runner": self.runner.state_dict(),
                          "act_rng": self.act_rng.bit_generator.state, "torch_rng": noise_state(self.replay.device),
                          "episode_rng": self.episode_rng.bit_generator.state, "batch_rng": self.batch_rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("cloned", "steps", "episodes", "recent"):
            setattr(self, name, state[name])
        for name in ("replay", "runner"):
            getattr(self, name).load_state_dict(state[name])
        if self.runner.ended and self.runner.seed is not None:
            raise UserError(f"--episode-limit {self.args.episode_limit} has passed in the episode being played")
        for name in ("act_rng", "episode_rng"):
            getattr(self, name).bit_generator.state = state[name]
        self.batch_rng.set_state(state["batch_rng"])
        restore_noise(state["torch_rng"], self.replay.device)


def train(args, run: Run, book, report) -> bool:
    """Critic warm-up, then POCO. False if the user interrupted; what is saved continues exactly."""
    clock = run.learner.clock
    with Interrupt() as interrupt, \
            Progress("POCO", args.online_steps, args.log_every, run.steps, report.updates) as bar:
        while run.steps < args.online_steps:
            warmup = run.steps < args.warmup_steps
            try:
                with clock("env"):
                    run.step()
                if run.steps % args.steps_per_update == 0:
                    report.add(run.learner.update(run.batch(), warmup))
            except ValueError as error:                                          # a non-finite action, reward or Q
                raise UserError(f"stopped at step {run.steps}: {error}. {book.last_good()}") from error
            last, success = run.steps == args.online_steps, sum(run.recent) / len(run.recent) if run.recent else None
            bar.update(run.steps, report.updates, success)
            if (run.steps % args.eval_every == 0 and not warmup) or last:
                with clock("eval"):
                    run.evaluate(book, run.steps)
            if run.steps % args.log_every == 0 or last:
                report.write(run.steps, warmup=int(warmup), success=success, episodes=run.episodes)
            if (stop := interrupt.stop) or run.steps % args.save_every == 0 or last:
                save(book, run, report)
            if stop and not last:
                bar.write(f"saved at step {run.steps}; continue with --resume {book.folder}")
                return False
    return True


def save(book, run, report) -> None:
    refuse_nonfinite(state := run.learner.state_dict(), "learner", f"before step {run.steps}; {book.last_good()}")
    book.save("last.pt", {"step": run.steps, "learner": state, "run": run.state_dict(), "report": report.state_dict()})


def main(argv=None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    fresh = not (args.eval or args.resume)
    with plainly():                                                              # in the world of the file named
        view = View(args.view, args.task, env_args=demos.env_args(args.data) if args.data else None)
    args.view = view.kind                                                        # a resumed run sees the same pictures
    folder = Path(args.eval or args.resume or args.run_dir or f"runs/{args.task}-vla-s{args.seed}")
    book = state = data = None
    if fresh:
        Logbook.refuse_existing(folder, args.overwrite)
    elif args.resume:
        book = Logbook.resume(folder, COLUMNS, task=args.task, method="vla")
        check_end(folder, (state := book.load("last.pt"))["step"], args)
        book.rewind(state["step"])
    else:
        state = load_checkpoint(folder)
    policy = make_policy(args, folder)
    digits = fingerprint(policy.backbone)
    if args.resume and book.args.get("fingerprint", digits) != digits:
        raise UserError(f"{folder} was begun with another --backbone or --instruction")
    print(f"task {args.task}: '{args.instruction or INSTRUCTIONS[args.task]}', preset {args.preset}, "
          f"{policy.device.type}, {VIEWS} views {view.kind}, seed {args.seed}", flush=True)
    if fresh:
        data = demonstrations(args, view, policy)
        policy.fit(data["obs"].to(policy.device))
        stored = dataclasses.asdict(args) | {"method": "vla", "fingerprint": digits}
        book = Logbook.create(folder, stored, COLUMNS, overwrite=args.overwrite)
    learner, demo_steps = Learner(args, policy), len(data["obs"]) if fresh else state["run"]["replay"]["demos"]
    run, report = Run(args, learner, view, demo_steps), Report(book, learner.clock, PHASES)
    if fresh:
        print(price(args, learner, run.replay.capacity), flush=True)
        run.replay.extend(data)
    else:
        learner.load_state_dict(state["learner"])
        if args.eval:
            return run.evaluate(None, state["step"])
        with fitting(folder):
            run.load_state_dict(state["run"])
            report.load_state_dict(state["report"], run.steps)
        book.amend(dataclasses.asdict(args))
    if run.runner.seed is None:                                                  # the first episode is still to come
        if not run.supervised(lambda: save(book, run, report)):
            return print(f"saved at step {run.cloned} of SFT; continue with --resume {book.folder}")
        run.reset()
        run.evaluate(book, 0)                                                    # killed in here, SFT's rows still come
        save(book, run, report)
    if train(args, run, book, report):
        print(f"done: {curve(book.folder)}")
    book.close()


if __name__ == "__main__":
    cli(main)
