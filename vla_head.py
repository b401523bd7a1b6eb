"""POCO on a vision-language-action policy: a flow action head on a frozen backbone (Sec. V-F).

    python vla_head.py --task lift --preset cpu   # a small backbone, 15 minutes on one core
    python vla_head.py --task lift --preset paper --backbone DIR  # Table V on SmolVLM or PaliGemma
    python vla_head.py --resume runs/lift-vla-s0  # continues an interrupted run exactly
    from vla_head import VLAFlowHead              # the head, for any backbone's hidden states

The backbone looks at each state once, without gradient. Its hidden states stand in the replay, flat
beside the proprioception. The head is a small diffusion transformer (AdaLN) over the H actions of a
chunk, and it cross-attends to the hidden states. N candidates are folded into the query axis, so
they share keys and values that are projected once per `sample`: N x K head steps, one prefix.
`VLAFlowHead` inherits the sampler and the loss of FlowPolicy, so POCO's update and its loop are
those of train_online.py. The critic sees pooled hidden states (paper: a ResNet's) and the
proprioception. Stage I writes runs/<task>-vla-bc-s<seed>/, stage II runs/<task>-vla-s<seed>/.
Not here: the backbone (arms/adapters/backbone.py), pi0.5, SmolVLA and GR00T with their own heads
(arms/adapters/), tuning a backbone, a real arm (robot.py).

Shapes: B batch, V views, S image side, L tokens, W their width, P proprioception, N candidates,
H chunk, A action, C channels of the head, K flow steps, F what the critic sees.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demos
import train_offline
import train_online
from arms.adapters import pretrained, tuning
from arms.adapters.backbone import (
    INSTRUCTIONS,
    fingerprint,
    open_backbone,
    resolve_backbone,
)
from demos.views import Seeing, View, see_demonstrations
from flow_policy import FlowPolicy
from logbook import UserError, cli, load_checkpoint, usable_device, user_errors
from logbook.options import Width, parse

# ---- the trainable head --------------------------------------------------------------------------


@dataclass
class Context:
    """What the head knows of B states; `projected` holds every block's keys and values."""

    hidden: Tensor  # (B, L, W), standardised
    state: Tensor  # (B, P), standardised
    projected: list[tuple[Tensor, Tensor]] | None = None  # each (B, heads, L, C / heads)

    def __len__(self) -> int:
        return len(self.state)

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype


def norm(x: Tensor) -> Tensor:
    """Normalise the last dimension. AdaLN supplies the gain and the offset."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attend among the chunk's actions, then to the context, then an MLP; all under AdaLN."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(channels, 9 * channels)
        self.self_in = nn.Linear(channels, 3 * channels)
        self.self_out = nn.Linear(channels, channels)
        self.query = nn.Linear(channels, channels)
        self.cross_out = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.wide = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project context tokens (B, L, C) to keys and values, each (B, heads, L, C / heads)."""
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, condition: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map x (B, N, H, C) under condition (B, N, 1, C) -> (B, N, H, C)."""
        shape = x.shape
        modulation = self.modulation(F.silu(condition)).chunk(9, dim=-1)  # each (B, N, 1, C)
        self_shift, self_scale, self_gate = modulation[:3]
        cross_shift, cross_scale, cross_gate = modulation[3:6]
        mlp_shift, mlp_scale, mlp_gate = modulation[6:]

        h = modulate(norm(x), self_shift, self_scale)
        q, k, v = self.self_in(h).flatten(0, 1).chunk(3, dim=-1)  # (B*N, H, C)
        h = F.scaled_dot_product_attention(self._split(q), self._split(k), self._split(v))
        x = x + (1 + self_gate) * self.self_out(self._join(h).reshape(shape))

        h = modulate(norm(x), cross_shift, cross_scale)
        q = self._split(self.query(h).flatten(1, 2))  # (B, heads, N*H, C / heads)
        h = F.scaled_dot_product_attention(q, key, value)
        x = x + (1 + cross_gate) * self.cross_out(self._join(h).reshape(shape))

        h = modulate(norm(x), mlp_shift, mlp_scale)
        return x + (1 + mlp_gate) * self.narrow(F.silu(self.wide(h)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (rows, heads, T, C / heads)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # (rows, T, C)


class VLAFlowHead(FlowPolicy):
    """Flow head over a frozen backbone's hidden states; sampler and loss are FlowPolicy's.

    An observation is [proprioception (P), hidden states (L * W)], flat: Backbone.observe makes it.
    `fit` takes the statistics that standardise both, and the pooling for the critic, from the
    demonstrations. They are saved with the weights; the backbone is not.
    """

    def __init__(
        self,
        length: int,
        width: int,
        state_dim: int,
        action_dim: int,
        horizon: int,
        channels: int = 64,
        blocks: int = 2,
        attention_heads: int = 4,
        flow_steps: int = 10,
        features: int = 64,
    ):
        nn.Module.__init__(self)  # of FlowPolicy only the methods
        self.length = length
        self.width = width
        self.state_dim = state_dim
        self.action_dim = action_dim
        self.horizon = horizon
        self.flow_steps = flow_steps
        self.from_hidden = nn.Linear(width, channels)
        self.from_state = nn.Linear(state_dim, channels)
        self.from_action = nn.Linear(action_dim, channels)
        self.out = nn.Linear(channels, action_dim)
        self.from_time = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        self.token_place = nn.Parameter(torch.randn(length, channels) / 2)
        self.step_place = nn.Parameter(torch.randn(horizon, channels) / 2)
        self.blocks = nn.ModuleList(Block(channels, attention_heads) for _ in range(blocks))
        self.last = nn.Linear(channels, 2 * channels)  # AdaLN of the output
        waves = torch.exp(torch.linspace(0, math.log(1000), channels // 2))
        self.register_buffer("waves", waves, persistent=False)
        self.register_buffer("hidden_mean", torch.zeros(length, width))
        self.register_buffer("hidden_std", torch.ones(length, width))
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        pool = torch.randn(length * width, features) / math.sqrt(length * width)
        self.register_buffer("pool", pool)
        self.register_buffer("pooled_mean", torch.zeros(features))
        self.register_buffer("pooled_std", torch.ones(features))

    def sizes(self) -> dict[str, int]:
        """Return the constructor's arguments: VLAFlowHead(**sizes) builds this head anew."""
        return {
            "length": self.length,
            "width": self.width,
            "state_dim": self.state_dim,
            "action_dim": self.action_dim,
            "horizon": self.horizon,
            "channels": self.out.in_features,
            "blocks": len(self.blocks),
            "attention_heads": self.blocks[0].heads,
            "flow_steps": self.flow_steps,
            "features": self.pool.shape[1],
        }

    @property
    def device(self) -> torch.device:
        return self.state_mean.device

    @torch.no_grad()
    def fit(self, obs: Tensor, least: Tensor | float = 1e-3) -> None:
        """Standardise by these observations (rows, P + L*W) and pool by principal components.

        least: the smallest deviation of the proprioception, a number or (P,). A joint that the
        demonstrations hardly turn may turn online.
        """
        obs = obs.to(self.device)
        state, hidden = self._parts(obs)
        self.state_mean.copy_(state.mean(0))
        self.state_std.copy_(state.std(0).clamp(min=least))
        spread = hidden.std(0)
        self.hidden_mean.copy_(hidden.mean(0))
        self.hidden_std.copy_(spread.clamp(min=0.2 * spread.mean() + 1e-6))
        rows = torch.linspace(0, len(obs) - 1, min(len(obs), 1024)).long()
        flat = self.encode(obs[rows]).hidden.flatten(1)
        components = torch.linalg.svd(flat, full_matrices=False)[2]
        count = min(self.pool.shape[1], len(flat) - 1)
        self.pool.zero_()
        self.pool[:, :count] = components[:count].T
        pooled = torch.cat([self._pooled(self.encode(part)) for part in obs.split(256)])
        self.pooled_mean.copy_(pooled.mean(0))
        self.pooled_std.copy_(pooled.std(0).clamp(min=1e-3))

    def encode(self, obs: Tensor) -> Context:
        """Standardise observations (B, P + L*W): the context, once per state."""
        state, hidden = self._parts(obs)
        hidden = ((hidden - self.hidden_mean) / self.hidden_std).clamp(-10, 10)
        state = ((state - self.state_mean) / self.state_std).clamp(-10, 10)
        return Context(hidden, state)

    @property
    def critic_dim(self) -> int:
        """F, the width of what the critic sees."""
        return self.state_dim + self.pool.shape[1]

    def critic_obs(self, context: Context) -> Tensor:
        """Return what the critic sees (B, F): proprioception and pooled hidden states."""
        pooled = (self._pooled(context) - self.pooled_mean) / self.pooled_std
        return torch.cat([context.state, pooled], dim=1)

    def prepare(self, context: Context) -> Context:
        """Project every block's keys and values, once for all candidates and flow steps."""
        tokens = norm(self.from_hidden(context.hidden) + self.token_place)  # (B, L, C)
        projected = [block.project(tokens) for block in self.blocks]
        return dataclasses.replace(context, projected=projected)

    def velocity(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v(x, t | context): x (B, N, H, A), t (B, N) in [0, 1] -> (B, N, H, A)."""
        if context.projected is None:
            context = self.prepare(context)
        state = self.from_state(context.state)[:, None]  # (B, 1, C)
        angle = t.unsqueeze(-1) * self.waves
        time = self.from_time(torch.cat([angle.sin(), angle.cos()], -1))
        condition = (time + state).unsqueeze(2)  # (B, N, 1, C)
        h = self.from_action(x) + self.step_place + state[:, None]
        for block, (key, value) in zip(self.blocks, context.projected):
            h = block(h, condition, key, value)
        shift, scale = self.last(F.silu(condition)).chunk(2, dim=-1)
        return self.out(modulate(norm(h), shift, scale))

    @torch.no_grad()
    def sample(
        self, context: Context, n: int, noise: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Draw n chunks per state as FlowPolicy does: (B, n, H, A) in [-1, 1], no gradient."""
        return super().sample(self.prepare(context), n, noise, steps)

    def _parts(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = obs[:, self.state_dim :].unflatten(1, (self.length, self.width))
        return obs[:, : self.state_dim], hidden

    def _pooled(self, context: Context) -> Tensor:
        return context.hidden.flatten(1) @ self.pool


# ---- python vla_head.py: Lift from pictures and an instruction -----------------------------------

PROPRIOCEPTION = 9  # first numbers of robomimic's observation; the object behind them is hidden
VIEWS = 2  # pictures: the scene, and from the hand
LARGEST_PICTURE = 224  # pixels of a side; a SmolVLM takes 512, and enlarges it


@dataclass
class Args(train_online.Args):
    """What this script can be asked: train_online's flags, the head's sizes, what it sees."""

    task: str = "lift"  # lift, can or square
    preset: Literal["cpu", "paper"] = "cpu"  # paper: Table V, needs --backbone; cpu: minutes
    policy: str | None = None  # lerobot:DIR: tune the head of this pi0.5 or SmolVLA instead
    backbone: str = "auto"  # folder of a SmolVLM or PaliGemma, mobilenet-minilm or tiny (random)
    instruction: str | None = None  # what the backbone is told; default: the task's own
    view: Literal["auto", "rendered", "drawn"] = "auto"  # pictures by OpenGL or by software
    hidden: Width = 512  # width of the critic's hidden layers
    layers: Width = 4  # hidden layers of the critic
    channels: Width = 256  # width of the head (ours)
    blocks: Width = 6  # transformer blocks of the head (ours)
    attention_heads: Width = 8  # of the head (ours)

    kept: ClassVar[tuple[str, ...]] = (*train_online.Args.kept, "view")
    cloning_settings: ClassVar[tuple[str, ...]] = (
        "data",
        "demo_episodes",
        "policy",
        "backbone",
        "instruction",
        "view",
        "horizon",
        "channels",
        "blocks",
        "attention_heads",
        "flow_steps",
        "batch_size",
        "learning_rate",
        "pretrain_steps",
        "seed",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Tables V and VI; demonstrations, stage I and what surrounds the update are ours.
        "paper": {
            "demo_episodes": 50,
            "episode_limit": 200,
            "horizon": 10,
            "pretrain_steps": 20_000,
            "batch_size": 64,
            "learning_rate": 1e-4,
            "online_learning_rate": 5e-5,
            "critic_learning_rate": 3e-4,
            "num_candidates": 16,
            "temperature": 0.001,
            "clip": 0.01,
            "warmup_steps": 2000,
            "online_steps": 15_000,
            "capacity": 20_000,
            "eval_every": 3000,
            "eval_episodes": 50,
            "log_every": 250,
            "save_every": 2500,
        },
        # The same method with less work: minutes on one core (ours).
        "cpu": {
            "demo_episodes": 20,
            "episode_limit": 100,
            "horizon": 5,
            "hidden": 256,
            "layers": 3,
            "channels": 64,
            "blocks": 2,
            "attention_heads": 2,
            "flow_steps": 5,
            "pretrain_steps": 1500,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "online_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "policy_tau": 0.005,
            "num_candidates": 8,
            "temperature": 0.01,
            "clip": 0.6,
            "reward_offset": -0.01,
            "warmup_steps": 1000,
            "online_steps": 5000,
            "updates_per_step": 0.5,
            "capacity": 5000,
            "eval_every": 2500,
            "eval_episodes": 50,
            "final_episodes": 50,
            "log_every": 250,
            "save_every": 2500,
            "threads": 1,
            "precision": "float32",  # faster than bfloat16 for a head this small
        },
    }

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        """Return the preset's values; it is cpu unless the user says otherwise."""
        return super().defaults(known | {"preset": known["preset"] or cls.preset})

    @classmethod
    def task_values(cls, task, preset: str, setting: str) -> dict[str, Any]:
        """The tables of the policies that see numbers do not apply here."""
        return {"workers": 1}


class SeenSimulation(train_offline.Simulation):
    """A task as a policy sees it: two pictures, an instruction, and the arm's proprioception."""

    stage_one = "vla-bc"
    method = "vla"
    others: tuple[str, ...] = ()  # further instructions that the backbone must know

    def __init__(self, args: Args):
        super().__init__(args)
        args.backbone = resolve_backbone(args.backbone)
        refuse_contradictions(args)
        text = args.instruction or INSTRUCTIONS.get(args.task, args.task)
        self.backbone = self.open(text, usable_device(args.device, mps=False))
        size = min(self.backbone.size, LARGEST_PICTURE)
        with user_errors():
            self.view = View(args.view, args.task, size=size, env_args=self.recorded_world)
        args.view = self.view.kind  # a resumed run sees the same pictures
        self.obs_dim = PROPRIOCEPTION + self.backbone.features
        seen_by = args.policy or args.backbone
        print(f"'{text}', {VIEWS} views {args.view}, seen by {seen_by}", flush=True)

    def open(self, text: str, device: torch.device) -> Any:
        """Load what looks at the pictures."""
        return open_backbone(self.args.backbone, text, VIEWS, device, self.others)

    def demonstrations(self) -> dict[str, np.ndarray]:
        """Read the demonstrations as train_offline does; every recorded state is seen once."""
        args = self.args
        with user_errors():
            # Their pictures need simulator states, which scripted demonstrations hold.
            path = demos.obtain(args.task, "cpu", args.data, args.demo_episodes, args.seed, 1)
            args.data = str(path)
            data = see_demonstrations(
                self.view, path, args.demo_episodes, self.backbone.observe, PROPRIOCEPTION
            )
        announce_replay(len(data["obs"]) + args.capacity, self.obs_dim)
        return data

    def make_policy(self, device: torch.device, data: dict | None = None) -> VLAFlowHead:
        """Build an untrained head that standardises by the demonstrations' statistics."""
        args = self.args
        head = VLAFlowHead(
            self.backbone.length,
            self.backbone.width,
            PROPRIOCEPTION,
            self.action_dim,
            args.horizon,
            args.channels,
            args.blocks,
            args.attention_heads,
            args.flow_steps,
        ).to(device)
        if data is not None:
            head.fit(torch.as_tensor(data["obs"]))
        return head

    def make_env(self, render_mode: str | None = None) -> gymnasium.Env:
        """Build the environment that collects; the replay wants every state seen."""
        env = super().make_env(render_mode)
        return Seeing(env, self.view, self.backbone.observe, PROPRIOCEPTION)

    def make_eval_env(self, render_mode: str | None = None) -> gymnasium.Env:
        """Build the environment that evaluates; it looks only where a chunk begins."""
        env = super().make_env(render_mode)
        observe = self.backbone.observe
        return Seeing(env, self.view, observe, PROPRIOCEPTION, every=self.args.horizon)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must find again: the backbone's weights and its prompt."""
        return {"backbone_and_instruction": fingerprint(self.backbone)}


def announce_replay(rows: int, obs_dim: int) -> None:
    """Print the size of a replay. UserError where this machine's memory cannot hold it."""
    size = 8 * obs_dim * rows  # each transition holds two observations
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"replay: {rows} transitions, {size / 1e6:.0f} MB", flush=True)
    if size > memory:
        raise UserError(
            f"the replay needs {size / 1e9:.0f} GB and this machine has {memory / 1e9:.0f} GB: "
            "lower --capacity, or take a --backbone with fewer tokens"
        )


class TunedSimulation(SeenSimulation):
    """The same for a LeRobot checkpoint, whose own head is tuned; its actions are normalised."""

    stage_one = "vla-tuned-bc"
    method = "vla-tuned"

    def open(self, text: str, device: torch.device) -> Any:
        """Load the checkpoint."""
        folder = self.args.policy.removeprefix("lerobot:")
        sizes = (VIEWS, PROPRIOCEPTION, self.action_dim, self.args.horizon)
        return tuning.Checkpoint(folder, text, *sizes, device)

    def demonstrations(self) -> dict[str, np.ndarray]:
        """Read the demonstrations with actions as the checkpoint normalises them."""
        data = super().demonstrations()
        actions = self.backbone.normalise(torch.as_tensor(data["action"]))
        return data | {"action": actions.numpy()}

    def make_policy(self, device: torch.device, data: dict | None = None) -> nn.Module:
        """Return the checkpoint's policy; its critic's view is standardised by the data."""
        if data is not None:
            self.backbone.fit(torch.as_tensor(data["obs"]))
        return self.backbone.policy

    def make_env(self, render_mode: str | None = None) -> gymnasium.Env:
        return Unnormalising(super().make_env(render_mode), self.backbone.unnormalise)

    def make_eval_env(self, render_mode: str | None = None) -> gymnasium.Env:
        return Unnormalising(super().make_eval_env(render_mode), self.backbone.unnormalise)

    def identity(self) -> dict[str, Any]:
        return {"checkpoint_and_instruction": self.backbone.fingerprint()}


class Unnormalising(gymnasium.Wrapper):
    """Take normalised actions, as a LeRobot policy makes them."""

    def __init__(self, env: gymnasium.Env, unnormalise: Callable[[Tensor], Tensor]):
        super().__init__(env)
        self.unnormalise = unnormalise

    def step(self, action: np.ndarray):
        action = self.unnormalise(torch.as_tensor(action, dtype=torch.float32)[None])
        return self.env.step(action[0].numpy())


def simulation_of(args: Args) -> SeenSimulation:
    """Build the simulation that --policy or --backbone asks for."""
    if args.policy is None:
        return SeenSimulation(args)
    return TunedSimulation(args)


def refuse_contradictions(args: Args) -> None:
    """Refuse what could only fail later."""
    if args.policy is not None and not args.policy.startswith("lerobot:"):
        raise UserError(f"--policy is lerobot:DIR, got {args.policy}")
    small = args.backbone in ("tiny", pretrained.NAME)
    if args.preset == "paper" and small and args.policy is None:
        raise UserError(
            "--preset paper needs --backbone DIR, a SmolVLM or PaliGemma in from_pretrained's "
            "format; --preset cpu does with a small one"
        )
    if args.channels % math.lcm(args.attention_heads, 2):
        raise UserError(
            f"--attention-heads, and 2, must divide --channels, got {args.attention_heads} and "
            f"{args.channels}"
        )
    if args.workers > 1 or args.rollouts:
        raise UserError("pictures are made in one process: --workers 1 --rollouts 0")
    if args.demo_episodes == 0:
        raise UserError("features are standardised by demonstrations: --demo-episodes at least 1")
    if args.obs_keys or args.filter_key or args.clip_actions:
        raise UserError(
            "pictures are made of recorded states: --obs-keys, --filter-key and --clip-actions do "
            "not apply"
        )


def main(argv: list[str] | None = None) -> None:
    """Run stage I if needed, then POCO; or resume or evaluate a run."""
    train_online.main(argv, Args, train_online.POCO, simulation_of)
    args = parse(Args, argv)
    if args.policy is not None and not args.eval:
        export(args)


def export(args: Args) -> None:
    """Write the tuned head back into a folder that LeRobot loads, if the run is complete."""
    name = f"runs/{args.task}-{TunedSimulation.method}-s{args.seed}"
    folder = Path(args.resume or args.run_dir or name)
    if not (folder / "last.pt").is_file():  # stage I was interrupted
        return
    state = load_checkpoint(folder)
    checkpoint = TunedSimulation(args).backbone
    print(checkpoint.export(folder / "lerobot", state["agent"]["actor"]))


if __name__ == "__main__":
    cli(main)
