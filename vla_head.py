"""POCO on a vision-language-action policy: a flow action head on a frozen vision-language model (Sec. V-F, Table V).

    python vla_head.py --task lift --preset cpu                # tiny random backbone, 12 min on two cores
    python vla_head.py --task lift --preset paper --backbone DIR      # Table V on real SmolVLM or PaliGemma weights
    from vla_head import Backbone, Learner, VLAFlowHead, INSTRUCTIONS               # as robot.py does

The backbone runs once per state, without gradient; what it says is kept, flat, beside the proprioception: that vector
is the observation in the replay. The head is a small diffusion transformer (AdaLN) over the chunk's H actions which
cross-attends to the backbone's hidden states. N candidates are folded into the query axis against keys and values that
are projected once per `sample` and never expanded, so N x K head steps share one prefix. `VLAFlowHead` inherits the
sampler and the loss of flow_policy.FlowPolicy: poco.e_step and poco.m_step_loss see no difference. The critic is
chunk_critic.ChunkCritic on pooled features and proprioception. `transformers` is imported only when a backbone is made.
Not here: pi0.5, SmolVLA and GR00T with heads of their own (adapters/), tuning of the backbone, the real arm (robot.py).

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
from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target
from demos.views import View, demo_images
from flow_policy import FlowPolicy
from logbook import (Clock, Interrupt, Logbook, Progress, UserError, cli, curve, load_checkpoint, read_args,
                     refuse_nonfinite)
from poco import e_step, m_step_loss
from replay import ChunkReplay

INSTRUCTIONS = {"lift": "lift the red cube", "can": "put the can into its bin", "square": "put the nut on the peg",
                "pick-pen": "pick up the pen and put it into the holder",
                "hang-keychain": "hang the keychain on the hook"}
# What surrounds image and instruction in the prompt, by the family of the model.
PROMPTS = {"smolvlm": ("<|im_start|>User:", "<fake_token_around_image><global-img>{}<fake_token_around_image>",
                       "{}<end_of_utterance>\nAssistant:"),
           "paligemma": ("", "{}", "<bos>{}\n")}
PROMPTS["idefics3"] = PROMPTS["smolvlm"]                   # the first SmolVLM checkpoints


# ---- the frozen backbone ---------------------------------------------------------------------------------------------

class Backbone:
    """A frozen vision-language model with its prompt: images -> hidden states (B, L, W), one row per state.

    Not a module, so a head that refers to it neither trains, saves nor copies it: copies share it. It counts its
    `calls` and the `rows` it encoded. Raises UserError for a folder without a complete model.
    """

    def __init__(self, model: nn.Module, instruction: str, views: int, tokenizer=None):
        self.model, self.views, self.calls, self.rows = model.eval().requires_grad_(False), views, 0, 0
        config, vision = model.config, model.config.vision_config
        self.family, self.size, self.width = config.model_type, vision.image_size, config.text_config.hidden_size
        self.image_token = config.image_token_id
        self.image_tokens = (self.size // vision.patch_size) ** 2 // getattr(config, "scale_factor", 1) ** 2
        self.prompt = torch.tensor([self._prompt(instruction, tokenizer)])                       # (1, L)
        self.length = self.prompt.shape[1]

    @classmethod
    def load(cls, folder, instruction: str, views: int = 1, device="cpu", dtype=None) -> "Backbone":
        """A SmolVLM or PaliGemma from a local folder; nothing is downloaded, and every weight must be there."""
        import transformers
        from transformers.utils import logging
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--backbone {folder} holds no config.json; fetch a model first: huggingface-cli download "
                            "HuggingFaceTB/SmolVLM2-500M-Video-Instruct --local-dir DIR")
        logging.disable_progress_bar()
        level, _ = logging.get_verbosity(), logging.set_verbosity_error()        # what is missing is said below
        try:
            model, report = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype,
                                                                   output_loading_info=True)
        except Exception as error:                                                # bad files fail in any way at all
            raise UserError(f"--backbone {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        finally:
            logging.set_verbosity(level)
        bad = [name for kind in ("missing_keys", "mismatched_keys") for name in report[kind]]
        if bad:
            first = sorted(name if isinstance(name, str) else name[0] for name in bad)[0]
            raise UserError(f"--backbone {folder} lacks {len(bad)} of the model's weights, the first is {first}: they "
                            "would stay random. Download the folder again")
        if model.config.model_type not in PROMPTS:
            raise UserError(f"--backbone {folder} is a {model.config.model_type}; known: {', '.join(PROMPTS)}")
        has_words = (Path(folder) / "tokenizer_config.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_words else None
        return cls(model.to(device), instruction, views, tokenizer)

    def _prompt(self, instruction, tokenizer):
        if tokenizer is None:                            # a model of ours: the bytes of the instruction are its tokens
            return [self.image_token] * self.image_tokens * self.views + list(instruction.encode())
        before, image, after = PROMPTS[self.family]
        image = image.format(tokenizer.convert_ids_to_tokens(self.image_token) * self.image_tokens)
        ids = tokenizer(before + image * self.views + after.format(instruction), add_special_tokens=False)["input_ids"]
        if ids.count(self.image_token) != self.image_tokens * self.views:
            raise UserError(f"the tokenizer of this {self.family} makes {ids.count(self.image_token)} image tokens of "
                            f"{self.views} views, expected {self.image_tokens} each")
        return ids

    def __deepcopy__(self, memo):
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images (B, V, S, S, 3) uint8 -> last hidden states (B, L, W). Any S: they are resized to the model's.

        uint8, because 0 ... 255 never becomes the exact 0 that SmolVLM takes for a missing image and drops.
        """
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[1] != self.views:
            raise ValueError(f"images are uint8 (B, {self.views}, S, S, 3), got {images.dtype} {tuple(images.shape)}")
        rows, device = len(images), next(self.model.parameters()).device
        pixels = images.to(device).permute(0, 1, 4, 2, 3).flatten(0, 1) / 127.5 - 1               # (B*V, 3, S, S)
        if pixels.shape[-1] != self.size or pixels.shape[-2] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if self.family != "paligemma":
            pixels = pixels.unflatten(0, (rows, self.views))
        ids = self.prompt.to(device).expand(rows, -1)
        out = self.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), use_cache=False)
        self.calls, self.rows = self.calls + 1, self.rows + rows
        return out.last_hidden_state


def tiny_backbone(folder, width: int = 64, layers: int = 2, size: int = 64, seed: int = 0) -> Path:
    """Write a small random SmolVLM, 8 x 8 patches, where `Backbone.load` finds it; 0.13 M weights by default."""
    from transformers import SmolVLMConfig, SmolVLMModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    vision = dict(hidden_size=width // 2, intermediate_size=width, num_hidden_layers=layers, image_size=size,
                  num_attention_heads=2, patch_size=8)
    text = dict(model_type="llama", hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=300, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmolVLMModel(SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=299, scale_factor=2,
                                           pad_token_id=0))
        for name, weight in model.named_parameters():     # 0.02, the default, is for wide trained models: it would
            if weight.ndim > 1:                           # leave the place of a patch unreadable
                scale = 0.5 if "embed" in name and weight.ndim == 2 else weight[0].numel() ** -0.5
                nn.init.normal_(weight, std=scale)
    model.save_pretrained(folder)
    return Path(folder)


# ---- the trainable head ----------------------------------------------------------------------------------------------

@dataclass
class Context:
    """What the head knows of B states; with `projected`, the keys and values of every layer."""

    hidden: Tensor                    # (B, L, W) standardised
    state: Tensor                     # (B, P) standardised
    mask: Tensor | None = None        # (B, L) bool, False: not a token
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

    def forward(self, x: Tensor, condition: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, H, C), condition (B, N, 1, C) -> (B, N, H, C)."""
        shape, (rows, n) = x.shape, x.shape[:2]
        shift, scale, gate = self.modulation(F.silu(condition)).unflatten(-1, (3, 3, -1)).unbind(-3)   # (B, N, 1, 3, C)
        norm = [lambda h, i=i: F.layer_norm(h, h.shape[-1:]) * (1 + scale[..., i, :]) + shift[..., i, :]
                for i in range(3)]
        q, k, v = self._split(self.self_in(norm[0](x)).flatten(0, 1), 3)             # (B*N, heads, H, C / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)
        x = x + (1 + gate[..., 0, :]) * self.self_out(h)
        q, = self._split(self.query(norm[1](x)).flatten(1, 2), 1)                    # (B, heads, N*H, C / heads)
        h = F.scaled_dot_product_attention(q, key, value, None if mask is None else mask[:, None, None])
        x = x + (1 + gate[..., 1, :]) * self.cross_out(h.transpose(1, 2).reshape(shape))
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
    def fit(self, obs: Tensor) -> None:
        """Statistics of demonstrations, obs (rows, P + L*W): standardise the inputs, pool by principal components."""
        state, hidden = self._parts(obs)
        self.state_mean.copy_(state.mean(0)), self.state_std.copy_(state.std(0).clamp(min=1e-3))
        spread = hidden.std(0)
        self.hidden_mean.copy_(hidden.mean(0)), self.hidden_std.copy_(spread.clamp(min=0.2 * spread.mean() + 1e-6))
        some = self.encode(obs[torch.linspace(0, len(obs) - 1, min(len(obs), 1024)).long()]).hidden.flatten(1)
        count = min(self.pool.shape[1], len(some) - 1)
        self.pool.zero_()[:, :count].copy_(torch.linalg.svd(some, full_matrices=False)[2][:count].T)
        features = torch.cat([self.critic_obs(self.encode(part)) for part in obs.split(256)])
        self.obs_mean.copy_(features.mean(0)), self.obs_std.copy_(features.std(0).clamp(min=1e-3))

    def observe(self, images: Tensor, state: Tensor) -> Tensor:
        """images (B, V, S, S, 3) uint8 and proprioception (B, P) -> observation (B, P + L*W): the backbone's one call."""
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
            h = block(h, condition, key, value, context.mask)
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


# ---- POCO on it: what robot.py and the loop below drive --------------------------------------------------------------

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
        self.actor_optimizer = torch.optim.Adam(policy.head_parameters(), lr=args.actor_learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.critic_learning_rate)

    def clone(self, batch) -> dict:
        """One step of behaviour cloning, SFT; the actor follows at once."""
        loss, stats = m_step_loss(self.policy, self.policy.encode(batch.obs), batch.chunk, batch.valid, None, None, 0, 0)
        self._minimise(loss, self.actor_optimizer)
        self.actor.load_state_dict(self.policy.state_dict())
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
                ("policy", "actor", "critic", "target", "actor_optimizer", "critic_optimizer")}

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError for a checkpoint of other sizes, naming the first weight that does not fit."""
        for name, value in state.items():
            try:
                getattr(self, name).load_state_dict(value)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"the checkpoint's {name} does not fit this run: "
                                f"{' '.join(str(error).splitlines()[:2])}; use the same --backbone and sizes") from error

    @staticmethod
    def _minimise(loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


# ---- python vla_head.py: image-and-instruction Lift ------------------------------------------------------------------

@dataclass
class Args:
    task: str = "lift"                # a robosuite task of envs.py
    preset: Literal["cpu", "paper"] = "cpu"  # paper: Table V, with --backbone; cpu: a tiny backbone, minutes on a laptop
    backbone: str | None = None       # folder of a SmolVLM or PaliGemma (config.json, *.safetensors); None: tiny, random
    instruction: str | None = None    # what the model is told; default: the task's own
    view: Literal["auto", "rendered", "drawn"] = "auto"  # pictures by OpenGL, by software, or by what works
    seed: int = 0                     # of demonstrations, networks, batches and training episodes
    data: str | None = None           # robomimic HDF5 with 'states'; default: scripted demonstrations, made when missing
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
    guidance: float = 1.0             # beta (Table V)
    clip: float = 0.01                # zeta (Table V)
    reward_offset: float = 0.0        # added to every reward
    warmup_steps: int = 2000          # first environment steps: only the critic learns (Table V)
    online_steps: int = 15_000        # environment steps, warm-up included (Table V)
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


CPU = dict(demo_episodes=20, episode_limit=100, horizon=5, channels=64, layers=2, heads=2, flow_steps=5, sft_steps=3000,
           batch_size=32, learning_rate=1e-3, actor_learning_rate=1e-3, critic_learning_rate=1e-3, critic_hidden=256,
           critic_layers=3, policy_tau=0.005, num_candidates=8, temperature=0.01, clip=0.6, reward_offset=-0.01,
           warmup_steps=1000, online_steps=7000, steps_per_update=2, capacity=8000, eval_every=3000, threads=1)
PHASES = ("env", "critic", "e_step", "m_step", "eval")
COLUMNS = ["warmup", "success", "episodes", "updates", "updates_per_s", *Learner.stats,
           *(f"time/{phase}" for phase in PHASES)]
EVAL_SEED, VIEWS, STATE = 1_000_000, 2, 9          # STATE: robomimic's proprioception comes first, the object is not seen


def parse(argv=None) -> Args:
    """The command line; --preset, --resume and --eval are looked at first, so that --help shows their values."""
    import tyro
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--resume", "--eval"):
        first.add_argument(name)
    known, _ = first.parse_known_args(argv)
    stored = known.resume or known.eval
    values = read_args(stored) if stored else CPU if known.preset in (None, "cpu") else {"preset": "paper"}
    names = {field.name for field in dataclasses.fields(Args)}
    args = tyro.cli(Args, args=argv, description=__doc__,
                    default=Args(**{name: value for name, value in values.items() if name in names}))
    if args.preset == "paper" and args.backbone is None:
        raise UserError("--preset paper needs --backbone DIR, a SmolVLM or PaliGemma in from_pretrained's format; "
                        "--preset cpu makes a tiny random one")
    if args.task not in envs.TASKS or envs.TASKS[args.task].suite != "robosuite":
        raise UserError(f"no pictures of task '{args.task}': --task lift, can or square")
    for name, least in (("sft_steps", 0), ("online_steps", 0), ("temperature", 1e-6), ("clip", 0), ("guidance", 0),
                        ("batch_size", 1), ("num_candidates", 1), ("steps_per_update", 1), ("eval_episodes", 1)):
        if not getattr(args, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}, got {getattr(args, name)}")
    return args


class Seeing(envs.gymnasium.Wrapper):
    """An environment whose observation is [proprioception, the backbone's hidden states]: one backbone call a state.

    every: make pictures at each so-many-th step only, zeros between; open-loop execution looks at no other.
    """

    def __init__(self, env, view: View, policy: VLAFlowHead, every: int = 1):
        super().__init__(env)
        self.view, self.policy, self.every, self.count = view, policy, every, 0

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.count = 0
        return self._observe(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.count += 1
        return self._observe(obs), *rest

    def _observe(self, obs):
        policy = self.policy
        if self.count % self.every:
            return np.zeros(STATE + policy.length * policy.width, np.float32)
        images, state = torch.from_numpy(self.view(self.env)), torch.from_numpy(obs[:STATE])
        return policy.observe(images[None], state[None])[0].cpu().numpy()


def make_policy(args, folder: Path) -> VLAFlowHead:
    """The backbone, loaded from a folder whether tiny or real, and a fresh head on it."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    source = args.backbone or (folder / "backbone" if (folder / "backbone" / "config.json").is_file() else
                               tiny_backbone(folder / "backbone"))
    text = args.instruction or INSTRUCTIONS[args.task]
    backbone = Backbone.load(source, text, VIEWS, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return VLAFlowHead(backbone, backbone.length, backbone.width, STATE, envs.TASKS[args.task].action_dim, args.horizon,
                       args.channels, args.layers, args.heads, args.flow_steps).to(device)


def demonstrations(args, view: View, policy: VLAFlowHead) -> dict:
    """Transitions whose observations are what `Seeing` gives; every state is encoded once."""
    try:
        path = demos.obtain(args.task, "cpu", args.data, args.demo_episodes, args.seed, 1)
        data = demos.load(path, args.task, args.demo_episodes)
        ends = np.flatnonzero(np.maximum(data["terminated"], data["truncated"]))
        images = demo_images(view, path, args.demo_episodes, np.diff(ends, prepend=-1).tolist())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(str(error)) from error
    states = torch.from_numpy(data["obs"][:, :STATE])
    parts = [policy.observe(torch.from_numpy(images[i:i + 64]), states[i:i + 64]).cpu() for i in
             range(0, len(images), 64)]
    obs = torch.cat(parts)
    after = torch.arange(1, len(obs) + 1)
    after[ends] = torch.from_numpy(ends)              # the state after an episode's end has no picture and no future
    return data | {"obs": obs, "next_obs": obs[after], "reward": data["reward"] + args.reward_offset,
                   "terminated": np.maximum(data["terminated"], data["truncated"])}


def cost(args, policy: VLAFlowHead, rows: int) -> str:
    """Measure and describe what a run will take: memory, prefix, head step, updates/s, and what to lower."""
    backbone, size = policy.backbone, args.batch_size
    side, weights = backbone.size, sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    image = torch.full((1, VIEWS, side, side, 3), 100, dtype=torch.uint8)
    learner, width = Learner(args, policy), policy.state_dim + policy.length * policy.width
    obs = policy.observe(image, torch.zeros(1, policy.state_dim)).expand(size, -1)
    context = policy.encode(obs)

    def seconds(call, repeats=3):
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    prefix = seconds(lambda: backbone(image))
    draw = seconds(lambda: policy.sample(context, args.num_candidates))
    loss = seconds(lambda: policy.cfm_loss(context, torch.zeros(size, args.num_candidates + 1, args.horizon,
                                                                policy.action_dim)).mean().backward())
    policy.zero_grad()
    head, critic = (sum(p.numel() for p in net.parameters()) for net in (policy, learner.critic))
    update, n, k = draw * (1 + 1 / args.num_candidates) + loss + 0.01, args.num_candidates, args.flow_steps
    return (f"cost: backbone {weights / 1e6:.1f} MB, run once a state, {1e3 * prefix:.1f} ms for {VIEWS} views; head "
            f"{head / 1e6:.2f} M and critic {critic / 1e6:.2f} M weights, {16e-6 * (head + critic):.0f} MB with Adam; "
            f"replay {8e-6 * width * rows:.0f} MB ({width} numbers a state)\n"
            f"      N x K = {n} x {k} head steps on {size} states, {1e3 * draw / k:.1f} ms each, sharing one prefix; "
            f"about {1 / update:.1f} updates/s, so {args.online_steps / args.steps_per_update * update / 60:.0f} min of "
            "updates\n      too slow: lower --num-candidates, --flow-steps, --batch-size or raise --steps-per-update; "
            "too big: lower --capacity, --batch-size or take a smaller --backbone")


def evaluate(args, learner, view, step, book) -> float:
    """Success over fixed episodes, in this process; pictures only where a chunk begins."""
    env = Seeing(view.make_env(args.episode_limit), view, learner.actor, every=args.horizon)
    rows = [envs.run_episode(learner.act, env, EVAL_SEED + i) for i in range(args.eval_episodes)]
    env.close()
    result = envs.EvalResult(*(np.array(column) for column in zip(*rows)))
    if book is not None:
        book.evaluation(step, "policy", [dict(zip(("seed", "success", "length", "return"), row)) for row in rows])
    print(f"step {step}: success {result}", flush=True)
    return result.success_rate


def supervised(args, learner, replay) -> None:
    """SFT: behaviour cloning of the demonstrations."""
    generator, every, start = torch.Generator(replay.device).manual_seed(args.seed), max(args.sft_steps // 5, 1), time.time()
    for group in learner.actor_optimizer.param_groups:
        group["lr"] = args.learning_rate
    for step in range(1, args.sft_steps + 1):
        stats = learner.clone(replay.sample(args.batch_size, generator))
        if step % every == 0:
            print(f"SFT {step}/{args.sft_steps}: loss {stats['bc']:.3f}, {time.time() - start:.0f} s", flush=True)
    learner.actor_optimizer = torch.optim.Adam(learner.policy.head_parameters(), lr=args.actor_learning_rate)


def train(args, learner, replay, runner, book, view, state) -> bool:
    """Warm-up, then POCO. False if the user interrupted; what is saved continues exactly."""
    clock, sums, recent, steps, episodes, updates = learner.clock, {}, [], 0, 0, 0
    rng, batches = np.random.default_rng([args.seed, 2]), torch.Generator(replay.device).manual_seed(args.seed + 1)
    if state is not None:
        replay.load_state_dict(state["replay"]), runner.load_state_dict(state["runner"])
        rng.bit_generator.state, steps, episodes, updates, recent = (state[name] for name in
                                                                     ("rng", "steps", "episodes", "updates", "recent"))
        runner.rng.bit_generator.state = state["act_rng"]
        batches.set_state(state["batches"]), torch.set_rng_state(state["torch_rng"])
    else:
        runner.reset(int(rng.integers(EVAL_SEED)))
    with Interrupt() as interrupt, Progress("POCO", args.online_steps, args.log_every, steps, updates) as bar:
        while steps < args.online_steps:
            with clock("env"):
                move = runner.step()
                replay.add(move.obs, move.action, move.reward + args.reward_offset, *move[3:6])
            steps, warmup, last = steps + 1, steps < args.warmup_steps, steps + 1 == args.online_steps
            if runner.ended:
                episodes, recent = episodes + 1, [*recent[-19:], float(move.success)]
                with clock("env"):
                    runner.reset(int(rng.integers(EVAL_SEED)))
            if steps % args.steps_per_update == 0:
                updates += 1
                for name, value in learner.update(replay.sample(args.batch_size, batches), warmup).items():
                    sums.setdefault(name, []).append(value)
            bar.update(steps, updates, sum(recent) / len(recent) if recent else None)
            if steps % args.log_every == 0:
                seconds = {phase: 0.0 for phase in PHASES} | clock.split()
                book.log(steps, warmup=int(warmup), success=sum(recent) / max(len(recent), 1), episodes=episodes,
                         updates=updates, updates_per_s=len(sums.get("critic", ())) / sum(seconds.values()),
                         **{name: float(torch.stack(values).mean()) for name, values in sums.items()},
                         **{f"time/{phase}": value for phase, value in seconds.items()})
                sums = {}
            if (steps % args.eval_every == 0 and not warmup) or last:
                with clock("eval"):
                    evaluate(args, learner, view, steps, book)
            if steps % args.save_every == 0 or last or interrupt.stop:
                save(book, learner, replay, runner, {
                    "steps": steps, "episodes": episodes, "updates": updates, "recent": recent,
                    "rng": rng.bit_generator.state, "act_rng": runner.rng.bit_generator.state,
                    "batches": batches.get_state(), "torch_rng": torch.get_rng_state()})
            if interrupt.stop and not last:
                bar.write(f"saved at step {steps}; continue with --resume {book.folder}")
                return False
    return True


def save(book, learner, replay, runner, rest) -> None:
    state = learner.state_dict()
    refuse_nonfinite(state, "learner", f"before step {rest['steps']}; {book.folder}/last.pt is the last good checkpoint")
    book.save("last.pt", {"learner": state, "replay": replay.state_dict(), "runner": runner.state_dict(), **rest})


def main(argv=None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = Path(args.eval or args.resume or args.run_dir or f"runs/{args.task}-vla-s{args.seed}")
    view = View(args.view, args.task)
    fresh = not (args.eval or args.resume)
    if fresh:
        book = Logbook.create(folder, dataclasses.asdict(args) | {"method": "vla"}, COLUMNS, overwrite=args.overwrite)
    policy = make_policy(args, folder)
    print(f"task {args.task}, '{args.instruction or INSTRUCTIONS[args.task]}', preset {args.preset}, "
          f"{policy.device.type}, images {view.kind}, seed {args.seed}", flush=True)
    learner = Learner(args, policy)
    if args.eval:
        learner.load_state_dict(load_checkpoint(folder / "last.pt")["learner"])
        return evaluate(args, learner, view, 0, None)
    state = None
    if not fresh:
        book = Logbook.resume(folder, COLUMNS, task=args.task, method="vla")
        state = book.load("last.pt")
        book.rewind(state["steps"])
        learner.load_state_dict(state["learner"])
        demo_steps = state["replay"]["demos"]
    else:
        data = demonstrations(args, view, policy)
        demo_steps = len(data["obs"])
        policy.fit(data["obs"])
        learner = Learner(args, policy)
    print(cost(args, policy, demo_steps + args.capacity), flush=True)
    replay = ChunkReplay(demo_steps + args.capacity, STATE + policy.length * policy.width, policy.action_dim,
                         args.horizon, args.discount, policy.device)
    if fresh:
        replay.extend(data)
        supervised(args, learner, replay)
        evaluate(args, learner, view, 0, book)
    rng = np.random.default_rng([args.seed, 1])
    env = Seeing(view.make_env(args.episode_limit), view, policy)
    runner = envs.ChunkRunner(env, lambda obs: learner.act(obs[None], rng))
    runner.rng = rng
    if train(args, learner, replay, runner, book, view, state):
        print(f"done: {curve(book.folder)}")
    book.close()


if __name__ == "__main__":
    cli(main)
