"""Flow action heads of released VLAs behind FlowPolicy's methods: POCO's update runs unchanged.

    from arms.adapters.pi05 import Pi05                 # likewise .smolvla.SmolVLA, .groot.Groot
    policy = Pi05.load("pi05_base", action_dim=7)       # a LeRobot folder, with its processors
    context = policy.encode(policy.batch(observation))  # the frozen backbone, once per state
    candidates, weights, stats = poco.e_step(policy, q_fn, context, 16, 0.001)
    chunk = policy.unnormalise(candidates[:, 0])        # robot units; all else is normalised

Checked against lerobot 0.6.1 (Python 3.12; GR00T also needs diffusers).

    adapter   kept per state           library's time        padded          trained
    Pi05      Gemma's keys, values     backwards, v = -v_pi  actions         expert, projections
    SmolVLA   SmolVLM's keys, values   backwards, v = -v_pi  actions, state  expert, projections
    Groot     hidden states, state     as here, in 1/1000    actions, state  the whole head

`parameters()` and `state_dict()` of an adapter are the head's alone: optimiser, averages and
checkpoints hold nothing of the backbone, and a deepcopy shares it. An adapter stays in eval mode,
because dropout would give one chunk two different losses.
Not here: image resizing and tokenising (LeRobot's processors), a frozen model without a head of its
own (backbone.py, for vla_head.py).

Shapes: B batch, N candidates, H chunk, A action, W the library's padded action width, L prefix
tokens, K flow steps, F what the critic sees.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flow_policy import FlowPolicy
from logbook import UserError


@dataclass
class Prefix:
    """What an adapter keeps of B states; the caller never expands it.

    parts: tensors with leading dimension B. "pooled" (B, F) is what the critic sees.
    cache: keys and values of each layer, each (B, heads, L, width).
    """

    parts: dict[str, Tensor]
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dtype = torch.float32

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def repeated(self, count: int) -> "Prefix":
        """Repeat each state `count` times in a row."""
        parts = {name: part.repeat_interleave(count, 0) for name, part in self.parts.items()}
        cache = [
            (key.repeat_interleave(count, 0), value.repeat_interleave(count, 0))
            for key, value in self.cache
        ]
        return Prefix(parts, cache)


@dataclass(frozen=True)
class Pictures:
    """How a flat observation row is laid out: proprioception (P), then pictures as 0 ... 255."""

    cameras: tuple[str, ...]  # the checkpoint's names of our V views
    size: int  # S
    instruction: str

    @property
    def features(self) -> int:
        """The numbers of a row beside the proprioception, V * S * S * 3."""
        return len(self.cameras) * self.size**2 * 3

    def observe(self, images: Tensor, state: Tensor) -> Tensor:
        """Flatten images (B, V, S, S, 3) uint8 beside the proprioception (B, P)."""
        return torch.cat([state, images.flatten(1).to(state.dtype)], dim=1)

    def unpack(self, obs: Tensor) -> dict[str, Any]:
        """Return LeRobot's raw observation of flat rows (B, P + V * S * S * 3)."""
        shape = (len(self.cameras), self.size, self.size, 3)
        images = obs[:, -self.features :].unflatten(1, shape)
        images = images.permute(1, 0, 4, 2, 3) / 255  # (V, B, 3, S, S)
        observation = dict(zip(self.cameras, images))
        observation["observation.state"] = obs[:, : -self.features]
        observation["task"] = [self.instruction] * len(obs)
        return observation


class Adapter(FlowPolicy):
    """A library's policy as a FlowPolicy.

    A subclass names the trained modules in `head`, says whether the library's time runs backwards,
    and defines `encode_batch` and `_field`.
    pictures: how flat observations are laid out, where `encode` is given those.
    group: how many candidates' prefixes are expanded at a time; that many prefixes must fit in
    memory. limit: where samples are clipped, 1 for actions normalised by quantiles or extremes,
    more for mean and deviation. critic_dim: F.
    """

    head: tuple[str, ...] = ()
    backwards = False

    def __init__(
        self,
        library: Any,
        model: nn.Module,
        action_dim: int,
        horizon: int,
        width: int,
        flow_steps: int,
        critic_dim: int,
        limit: float = 1.0,
        group: int = 4,
        processors: tuple = (None, None),
    ):
        nn.Module.__init__(self)  # of FlowPolicy only the methods
        object.__setattr__(self, "library", library)  # as a submodule it would name weights twice
        self.model = model
        self.calls = 0
        self.action_dim = action_dim
        self.horizon = horizon
        self.width = width
        self.flow_steps = flow_steps
        self._critic_dim = critic_dim
        self.limit = limit
        self.group = group
        self.processors = processors
        self.pictures: Pictures | None = None
        self.register_buffer("pooled_mean", torch.zeros(critic_dim))
        self.register_buffer("pooled_std", torch.ones(critic_dim))
        model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.eval()

    # ---- only the head is trained, saved and copied

    def _in_head(self, name: str) -> bool:
        if name in ("pooled_mean", "pooled_std"):
            return True
        name = name.removeprefix("model.")
        if "lm_head" in name:  # pi0.5's expert has one that nothing uses
            return False
        return any(name == part or name.startswith(part + ".") for part in self.head)

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            if self._in_head(name):
                yield name, parameter

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        everything = super().state_dict(*args, **kwargs)
        return {name: value for name, value in everything.items() if self._in_head(name)}

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True, assign: bool = False):
        if strict:
            self._refuse_misfits(state)
        return super().load_state_dict(state, strict=False, assign=assign)

    def _refuse_misfits(self, state: dict[str, Tensor]) -> None:
        """Raise RuntimeError for a state that is not exactly this head's."""
        mine = self.state_dict()
        misfits = sorted(set(mine) ^ set(state))
        if not misfits:
            misfits = [name for name in mine if mine[name].shape != state[name].shape]
        if misfits:
            raise RuntimeError(
                f"{len(misfits)} weights do not fit this head, the first is {misfits[0]}"
            )

    def train(self, mode: bool = True) -> "Adapter":
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def __deepcopy__(self, memo: dict) -> "Adapter":
        """Copy the head and share everything else."""
        trained = {id(one) for one in self.parameters()}
        for one in (*self.model.parameters(), *self.model.buffers()):
            if id(one) not in trained:
                memo[id(one)] = one
        memo[id(self.library)] = self.library
        memo[id(self.processors)] = self.processors
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            clone.__dict__[name] = copy.deepcopy(value, memo)
        return clone

    # ---- FlowPolicy's methods, in the library's padded width

    @property
    def device(self) -> torch.device:
        return self.pooled_mean.device

    def sizes(self) -> dict[str, int]:
        """Return the constructor's arguments beside the library."""
        return {"action_dim": self.action_dim, "group": self.group}

    @property
    def critic_dim(self) -> int:
        """F, the width of what the critic sees."""
        return self._critic_dim

    def critic_obs(self, context: Prefix) -> Tensor:
        """Return what the critic sees (B, F): state and mean hidden state, standardised."""
        return (context.parts["pooled"] - self.pooled_mean) / self.pooled_std

    def fit(self, pooled: Tensor) -> None:
        """Standardise by these rows of parts["pooled"], usually the demonstrations' (rows, F)."""
        self.pooled_mean.copy_(pooled.mean(0))
        self.pooled_std.copy_(pooled.std(0).clamp(min=1e-3))

    def encode(self, obs: dict | Tensor) -> Prefix:
        """Run the frozen model once per state.

        obs: the library's processed batch, or flat rows (B, D) as `pictures` lays them out.
        """
        if isinstance(obs, Tensor):
            obs = self.batch(self.pictures.unpack(obs))
        return self.encode_batch(obs)

    def encode_batch(self, batch: dict) -> Prefix:
        """Run the frozen model on the library's processed batch."""
        raise NotImplementedError

    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """The library's velocity at its own time: x (R, H, W), t (R,), prefix of R rows."""
        raise NotImplementedError

    def velocity(self, context: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v(x, t | context), t = 0 noise: x (B, N, H, A or W) -> like x.

        Where only the A real actions are given, the padding is noise, as in the library.
        """
        given = x.shape[-1]
        if given < self.width:
            shape = (*x.shape[:-1], self.width - given)
            noise = torch.randn(shape, device=x.device, dtype=x.dtype)
            x = torch.cat([x, (1 - t[..., None, None]) * noise], dim=-1)
        velocities = []
        for part, time in zip(x.split(self.group, 1), t.split(self.group, 1)):
            velocities.append(self._group_velocity(context, part, time))
        return torch.cat(velocities, dim=1)[..., :given]

    def _group_velocity(self, context: Prefix, x: Tensor, t: Tensor) -> Tensor:
        rows, count = t.shape
        prefix = context.repeated(count)
        x = x.flatten(0, 1)
        t = t.flatten()
        v = -self._field(prefix, x, 1 - t) if self.backwards else self._field(prefix, x, t)
        return v.unflatten(0, (rows, count))

    @torch.no_grad()
    def sample(
        self, context: Prefix, n: int, noise: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Draw n chunks per state: noise (B, n, H, W or A) -> (B, n, H, A) within the limit."""
        if noise is None:
            noise = torch.randn(len(context), n, self.horizon, self.width, device=context.device)
        elif noise.shape[-1] < self.width:
            shape = (*noise.shape[:-1], self.width - noise.shape[-1])
            noise = torch.cat([noise, torch.randn(shape, device=noise.device)], dim=-1)
        steps = steps or self.flow_steps
        context = self.prepare(context)
        x = noise
        for k in range(steps):
            t = torch.full(x.shape[:2], k / steps, device=x.device)
            x = x + self.velocity(context, x, t) / steps
        return x[..., : self.action_dim].clamp(-self.limit, self.limit)

    def prepare(self, context: Prefix) -> Prefix:
        """Compute what a head needs of the context alone, once per `sample`.

        Nothing here: keys and values are already that.
        """
        return context

    def sample_t(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draw training times as the library does: most of them near the noise."""
        beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))
        return 0.999 * (1 - beta.sample(shape).to(device))

    def cfm_loss(
        self,
        context: Prefix,
        actions: Tensor,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """Compute FlowPolicy's loss at the library's training times: (B, N, H, A) -> (B, N)."""
        if t is None:
            t = self.sample_t(actions.shape[:2], actions.device)
        return super().cfm_loss(context, actions, valid, noise, t)

    # ---- the border to the robot

    def batch(self, observation: dict) -> dict:
        """Run LeRobot's preprocessing of a raw observation: normalise, tokenise, move."""
        preprocessor = self.processors[0]
        return observation if preprocessor is None else preprocessor(observation)

    def unnormalise(self, actions: Tensor) -> Tensor:
        """Return normalised actions (..., A) in the robot's units."""
        postprocessor = self.processors[1]
        return actions if postprocessor is None else postprocessor(actions)

    @classmethod
    def _load(
        cls,
        library_class: Any,
        folder: str | Path,
        action_dim: int,
        horizon: int | None,
        device: str | torch.device,
        tokenizer: str | None,
        changes: dict[str, Any],
    ) -> "Adapter":
        """Load a LeRobot folder with these changes to its configuration."""
        from lerobot.configs import PreTrainedConfig

        folder = Path(folder)
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} has no model.safetensors; download the policy first")
        config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        config.device = str(device)
        if horizon is not None:  # no weight has the chunk's shape
            changes = changes | {"chunk_size": horizon, "n_action_steps": horizon}
        for name, value in changes.items():
            setattr(config, name, value)
        library = library_class.from_pretrained(folder, config=config, local_files_only=True)
        verify_weights(library, folder)
        processors = load_processors(config, folder, tokenizer)
        return cls(library, action_dim, processors=processors).to(device)


def load_processors(config: Any, folder: Path, tokenizer: str | None) -> tuple:
    """Load LeRobot's pre- and postprocessor from the folder; (None, None) where it has none."""
    from lerobot.policies.factory import make_pre_post_processors

    if not (folder / "policy_preprocessor.json").is_file():
        return (None, None)
    changes = {"device_processor": {"device": config.device}}
    if tokenizer is not None:
        changes["tokenizer_processor"] = {"tokenizer_name": tokenizer}
    return make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides=changes
    )


def action_limit(config: Any) -> float:
    """Return where LeRobot's normalised actions end.

    5 deviations, or 1 where quantiles or extremes were mapped to [-1, 1].
    """
    mode = config.normalization_mapping["ACTION"]
    return 5.0 if mode == type(mode)("MEAN_STD") else 1.0


def pooled(state: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return state (B, P) beside the mean of the hidden states (B, L, D) under mask (B, L)."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return torch.cat([state.float(), mean.float()], dim=1)


def verify_weights(model: nn.Module, folder: str | Path) -> None:
    """Compare every weight with the folder's safetensors.

    Some loaders catch their own errors and return random weights. Raises UserError naming the first
    weight that is absent from the files or differs from them.
    """
    stored = stored_names(folder)
    wrong = []
    for name, value in model.named_parameters():  # tied weights appear once
        if "lm_head" in name:  # no action head uses one
            continue
        found = stored.get(name.removeprefix("model."))
        if found is None:  # pi05_base's file has the embedding under the name it is tied to
            tied = name.replace("model.language_model.embed_tokens", "lm_head")
            found = stored.get(tied.removeprefix("model."))
        if found is None:
            wrong.append(f"{name} (absent)")
        elif not holds(*found, value):
            wrong.append(f"{name} (another value)")
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} weights were not loaded and are random, the first is "
            f"{wrong[0]}; download the folder again, or take the library's version that wrote it"
        )


def stored_names(folder: str | Path) -> dict[str, tuple[Path, str]]:
    """Return file and key of every weight in a folder's safetensors, by its name in the model."""
    from safetensors import safe_open

    stored = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                stored[key.removeprefix("model.")] = (path, key)
    return stored


def holds(path: Path, key: str, value: Tensor) -> bool:
    """Say whether a safetensors file has this value under this key."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        stored = file.get_tensor(key)
    return stored.shape == value.shape and torch.equal(stored.to(value.dtype), value.cpu())


def layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of a transformers cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(layers: list[tuple[Tensor, Tensor]]) -> Any:
    """Build a fresh transformers cache: libraries append to and crop theirs in place."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (key, value) in enumerate(layers):
        cache.update(key, value, index)
    return cache
