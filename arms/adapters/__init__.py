"""
Flow action heads of released VLAs behind flow_policy.FlowPolicy's methods: POCO's update runs on them unchanged.

    from arms.adapters.pi05 import Pi05                # likewise .smolvla.SmolVLA, .groot.Groot
    policy = Pi05.load("pi05_base", action_dim=7)      # LeRobot's folder: config.json, model.safetensors, processors
    context = policy.encode(policy.batch(observation)) # the frozen backbone, once per state
    candidates, weights, stats = poco.e_step(policy, q_fn, context, 16, 0.001)
    chunk = policy.unnormalise(candidates[:, 0])       # for the robot; all else lives in normalised space

Extra: pip install lerobot==0.6.1 (Python 3.12; GR00T needs diffusers too), the version this was checked against.
    adapter   backbone's result, kept per state       time of the library    its padding          what is trained
    Pi05      keys, values of Gemma; prompt has state  backwards, v = -v_pi   actions to 32        expert, projections
    SmolVLA   keys, values of SmolVLM; state a token   backwards, v = -v_pi   actions, state to 32 expert, projections
    Groot     hidden states of the VLM, state          as here, in 1/1000     actions, state       the whole action head
`parameters()` and `state_dict()` of an adapter are the head's alone, so optimiser, EMA and checkpoints hold nothing of
the backbone, and a deepcopy shares it. Always in eval mode: dropout would make one chunk's two losses differ.
backbone.py is the other way: a frozen model without a head, for vla_head.py.
Not here: image resizing and tokenising (LeRobot's processors).

Shapes: B batch, N candidates, H chunk, A action, W the library's padded action width, L prefix tokens, K flow steps.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flow_policy import FlowPolicy
from logbook import UserError


@dataclass
class Prefix:
    """What an adapter keeps of B states: `parts` are tensors with leading dimension B, never expanded by the caller."""

    parts: dict[str, Tensor]
    cache: list[tuple] = field(default_factory=list)  # per layer key and value, each (B, heads, L, width)

    def __len__(self):
        return len(next(iter(self.parts.values())))

    device = property(lambda self: next(iter(self.parts.values())).device)
    dtype = torch.float32

    def repeated(self, count: int) -> Prefix:
        """Each state `count` times in a row."""
        return Prefix({name: part.repeat_interleave(count, 0) for name, part in self.parts.items()},
                      [tuple(part.repeat_interleave(count, 0) for part in layer) for layer in self.cache])


def action_limit(config) -> float:
    """Where LeRobot's normalised actions end: 5 deviations, or 1 where quantiles or extremes were mapped to [-1, 1]."""
    mode = config.normalization_mapping["ACTION"]
    return 5.0 if getattr(mode, "value", mode) == "MEAN_STD" else 1.0


class Adapter(FlowPolicy):
    """
    A library's policy as a FlowPolicy. A subclass sets `head` (names of the trained modules), `backwards`, `encode`
    and `_field`. group: candidates whose prefixes are expanded at a time, so many times the prefixes' memory is needed.
    limit: where samples are clipped, 1 for actions normalised by quantiles or extremes, more for mean and deviation.
    """

    head: tuple[str, ...] = ()
    backwards = False

    def __init__(self, library, model: torch.nn.Module, action_dim: int, horizon: int, width: int, flow_steps: int,
                 limit: float = 1.0, group: int = 4, processors=(None, None)):
        torch.nn.Module.__init__(self)  # of FlowPolicy only the methods
        object.__setattr__(self, "library", library)  # not as a submodule: its weights would have two names
        self.model, self.calls = model, 0
        self.action_dim, self.horizon, self.width, self.flow_steps = action_dim, horizon, width, flow_steps
        self.limit, self.group, self.processors = limit, group, processors
        model.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.eval()

    # ---- only the head is trained, saved and copied
    def _in_head(self, name: str) -> bool:
        name = name.removeprefix("model.")
        return any(name == part or name.startswith(part + ".") for part in self.head) and "lm_head" not in name

    def named_parameters(self, *args, **kwargs):
        return ((name, one) for name, one in super().named_parameters(*args, **kwargs) if self._in_head(name))

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if self._in_head(name)}

    def load_state_dict(self, state, strict=True, assign=False):
        mine = self.state_dict()
        wrong = sorted(set(mine) ^ set(state)) or [name for name in mine if mine[name].shape != state[name].shape]
        if wrong and strict:
            raise RuntimeError(f"{len(wrong)} weights do not fit this head, the first is {wrong[0]}")
        return super().load_state_dict(state, strict=False, assign=assign)

    def train(self, mode: bool = True):
        return super().train(False)

    def __deepcopy__(self, memo):
        own = {id(one) for one in self.parameters()}
        shared = [one for one in (*self.model.parameters(), *self.model.buffers()) if id(one) not in own]
        memo.update({id(one): one for one in (*shared, self.library)})
        clone = memo[id(self)] = self.__class__.__new__(self.__class__)
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return clone

    # ---- FlowPolicy's methods, in the library's padded width
    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """The library's own velocity at its own time: rows x (R, H, W), t (R,), prefix of R rows -> (R, H, W)."""
        raise NotImplementedError

    def velocity(self, context: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t | context), t = 0 noise: x (B, N, H, A or W) -> like x. Unknown padded actions are noise."""
        asked, rows = x.shape[-1], len(x)
        if asked < self.width:
            noise = torch.randn(*x.shape[:-1], self.width - asked, device=x.device, dtype=x.dtype)
            x = torch.cat([x, (1 - t[..., None, None]) * noise], -1)
        out = []
        for part, time in zip(x.split(self.group, 1), t.split(self.group, 1)):
            count = part.shape[1]
            time = (1 - time if self.backwards else time).flatten()
            v = self._field(context.repeated(count), part.flatten(0, 1), time).unflatten(0, (rows, count))
            out.append(-v if self.backwards else v)
        return torch.cat(out, 1)[..., :asked]

    @torch.no_grad()
    def sample(self, context: Prefix, n: int, noise: Tensor | None = None, steps: int | None = None) -> Tensor:
        """Draw n chunks per state: noise (B, n, H, W) -> (B, n, H, A) within the limit, without gradient."""
        if noise is None:
            noise = torch.randn(len(context), n, self.horizon, self.width, device=context.device)
        steps, x, prepared = steps or self.flow_steps, noise, self.prepare(context)
        for k in range(steps):
            x = x + self.velocity(prepared, x, torch.full(x.shape[:2], k / steps, device=x.device)) / steps
        return x[..., :self.action_dim].clamp(-self.limit, self.limit)

    def prepare(self, context: Prefix) -> Prefix:
        """What a head computes of the context alone, once per `sample`; keys and values are already that."""
        return context

    def sample_t(self, shape, device=None) -> Tensor:
        """Training times, as the library draws them: most near the noise."""
        beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0)).sample(shape).to(device)
        return 0.999 * (1 - beta)

    def cfm_loss(self, context, actions, valid=None, noise=None, t=None):
        """FlowPolicy's loss over the real actions, at the library's training times: (B, N, H, A) -> (B, N)."""
        t = self.sample_t(actions.shape[:2], actions.device) if t is None else t
        return super().cfm_loss(context, actions, valid, noise, t)

    # ---- the border to the robot
    def batch(self, observation: dict) -> dict:
        """LeRobot's preprocessing of a raw observation: normalise, tokenise, to the device."""
        return self.processors[0](observation) if self.processors[0] else observation

    def unnormalise(self, actions: Tensor) -> Tensor:
        """Normalised actions (..., A) -> the robot's units."""
        return self.processors[1](actions) if self.processors[1] else actions

    @classmethod
    def _load(cls, library_class, folder, action_dim: int, horizon: int | None, **overrides):
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.factory import make_pre_post_processors

        if not (Path(folder) / "model.safetensors").is_file():
            raise UserError(f"{folder} has no model.safetensors; download the policy's folder first")
        config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        for name in ("chunk_size", "n_action_steps") if horizon else ():  # no weight has the chunk's shape
            setattr(config, name, horizon)
        for name, value in overrides.items():
            setattr(config, name, value)
        library = library_class.from_pretrained(folder, config=config, local_files_only=True)
        verify_weights(library, folder)
        pair = (None, None)
        if (Path(folder) / "policy_preprocessor.json").is_file():
            pair = make_pre_post_processors(config, pretrained_path=str(folder))
        return cls(library, action_dim, processors=pair)


def verify_weights(model: torch.nn.Module, folder) -> None:
    """
    Compare every weight with the folder's safetensors: some loaders catch their errors and return random weights.
    Raises UserError that names the first weight that is absent from the files or differs from them.
    """
    from safetensors import safe_open

    stored, wrong = {}, []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= {name.removeprefix("model."): (path, name) for name in file.keys()}
    for name, value in model.named_parameters():  # tied weights come once
        if "lm_head" in name:  # not used by an action head
            continue
        tied = name.replace("model.language_model.embed_tokens", "lm_head")  # under which pi05_base's file has it
        path, key = stored.get(name.removeprefix("model."), stored.get(tied.removeprefix("model."), (None, None)))
        if path is None:
            wrong.append(f"{name} (absent)")
            continue
        with safe_open(path, "pt") as file:
            same = file.get_tensor(key)
        if same.shape != value.shape or not torch.equal(same.to(value.dtype), value.cpu()):
            wrong.append(f"{name} (another value)")
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} weights were not loaded and are random, the first is {wrong[0]}; "
                        "download the folder again, or take the library's version that wrote it")


def parts_of(cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a transformers cache, of version 4.57 or 5."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(parts):
    """A fresh transformers cache over these tensors: libraries append to and crop theirs in place."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (key, value) in enumerate(parts):
        cache.update(key, value, index)
    return cache

