"""A LeRobot checkpoint as vla_head.py's backbone and head in one: pi0.5 or SmolVLA.

    checkpoint = Checkpoint(folder, "lift the red cube", 2, state_dim=9, action_dim=7, horizon=10)
    obs = checkpoint.observe(images, state)         # (B, P + pictures), what the replay keeps
    checkpoint.policy                               # an Adapter: POCO trains its head
    checkpoint.normalise(actions)                   # to the space in which policy and critic live
    checkpoint.export("out", head)                  # a folder that LeRobot loads

The folder needs config.json, model.safetensors, policy_preprocessor.json with its statistics, and
a tokenizer: LeRobot's own name for one, if it is on this machine, or tokenizer files in the folder.
What is missing is refused by name before any weight is read: LeRobot itself would go on without
statistics, with states of -1 and 255.
A prefix of pi0.5 is 18 MB, so the replay keeps pictures and the frozen model looks at each batch
again. LeRobot asks for Python 3.12.
Not here: the adapters (pi05.py, smolvla.py), the loop (train_online.py), a LeRobotDataset.

Shapes: B batch, V views, S image side, P proprioception, A action.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arms.adapters import Adapter, Pictures
from logbook import UserError

STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "IDENTITY": (),
}
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
INSTALL = (
    "With Python 3.12: pip install --no-deps lerobot==0.6.1, then "
    "pip install draccus einops accelerate num2words"
)


class Checkpoint:
    """A LeRobot folder, opened: what looks, what acts, and the border to the simulator.

    views, state_dim, action_dim: what the simulator offers. size: side of the pictures that the
    replay keeps. Raises UserError for a folder that does not fit, or where something is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        instruction: str,
        views: int,
        state_dim: int,
        action_dim: int,
        horizon: int,
        device: str | torch.device = "cpu",
        size: int = 64,
    ):
        folder = Path(folder)
        config = read_json(folder, "config.json")
        family = config.get("type")
        if family not in ("pi05", "smolvla"):
            raise UserError(f"{folder} is a {family}; heads of pi05 and smolvla can be tuned")
        cameras = cameras_of(folder, config, views)
        refuse_other_size(folder, config["input_features"], "observation.state", state_dim)
        refuse_other_size(folder, config["output_features"], "action", action_dim)
        refuse_missing_statistics(folder, config)
        tokenizer = find_tokenizer(folder)
        if config["chunk_size"] != horizon:
            print(
                f"{folder} was trained on chunks of {config['chunk_size']} actions, --horizon is "
                f"{horizon}: no weight has the chunk's shape, stage I adapts the head to it"
            )
        self.folder = folder
        self.size = size
        self.policy = open_adapter(family, folder, action_dim, horizon, device, tokenizer)
        self.policy.pictures = Pictures(cameras, size, instruction)

    @property
    def features(self) -> int:
        """The numbers of an observation beside the proprioception: its pictures."""
        return self.policy.pictures.features

    def observe(self, images: Tensor, state: Tensor) -> Tensor:
        """Flatten images (B, V, S, S, 3) uint8 beside the proprioception (B, P)."""
        return self.policy.pictures.observe(images, state)

    @torch.no_grad()
    def fit(self, obs: Tensor) -> None:
        """Standardise what the critic sees by these observations (rows, D)."""
        policy = self.policy
        parts = [policy.encode(part.to(policy.device)).parts["pooled"] for part in obs.split(16)]
        policy.fit(torch.cat(parts))

    def normalise(self, actions: Tensor) -> Tensor:
        """Normalise the simulator's actions (..., A) as LeRobot does, within the policy's limit."""
        steps = self.policy.processors[0].steps
        normalizer = next(one for one in steps if type(one).__name__ == "NormalizerProcessorStep")
        limit = self.policy.limit
        return normalizer._normalize_action(actions, inverse=False).clamp(-limit, limit)

    def unnormalise(self, actions: Tensor) -> Tensor:
        """Return normalised actions (..., A) as the simulator takes them."""
        return self.policy.unnormalise(actions)

    def fingerprint(self) -> str:
        """Return eight digits of the instruction and of a few numbers of every frozen weight."""
        digest = hashlib.sha256(self.policy.pictures.instruction.encode())
        trained = {name for name, _ in self.policy.named_parameters()}
        for name, weight in self.policy.model.named_parameters():
            if f"model.{name}" not in trained:
                numbers = weight.detach().flatten()[:8].cpu().bfloat16().view(torch.int16)
                digest.update(numbers.numpy().tobytes())
        return digest.hexdigest()[:8]

    def export(self, folder: str | Path, head: dict[str, Tensor]) -> Path:
        """Write a folder that LeRobot loads, with this state_dict of the head."""
        folder = Path(folder)
        self.policy.load_state_dict(head)
        self.policy.library.save_pretrained(folder)
        for processor in self.policy.processors:
            processor.save_pretrained(folder)
        return folder


def open_adapter(
    family: str,
    folder: Path,
    action_dim: int,
    horizon: int,
    device: str | torch.device,
    tokenizer: str,
) -> Adapter:
    """Load the folder's policy. UserError without LeRobot."""
    try:
        import lerobot  # noqa: F401
    except ImportError as error:
        raise UserError(f"--policy needs LeRobot ({error}). {INSTALL}") from error
    if family == "pi05":
        from arms.adapters.pi05 import Pi05

        return Pi05.load(folder, action_dim, horizon, device, tokenizer)
    from arms.adapters.smolvla import SmolVLA

    return SmolVLA.load(folder, action_dim, horizon, device, tokenizer)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a file of the folder. UserError where it is missing or damaged."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}: name the folder of a LeRobot policy")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error


def cameras_of(folder: Path, config: dict[str, Any], views: int) -> tuple[str, ...]:
    """Return the checkpoint's names for our views. UserError where it has fewer."""
    features = config["input_features"]
    names = [name for name, one in features.items() if one["type"] == "VISUAL"]
    if len(names) < views:
        raise UserError(
            f"{folder} looks through {len(names)} cameras ({', '.join(names)}), this task has "
            f"{views} views"
        )
    return tuple(names[:views])


def refuse_other_size(folder: Path, features: dict[str, Any], name: str, size: int) -> None:
    """Raise UserError unless the checkpoint's feature has as many numbers as the task's."""
    found = features[name]["shape"] if name in features else None
    if found != [size]:
        raise UserError(
            f"{folder}: {name} has shape {found}, this task's is [{size}]: take a checkpoint that "
            "was fine-tuned on this robot"
        )


def refuse_missing_statistics(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless state and actions can be normalised as the configuration says."""
    modes = config["normalization_mapping"]
    before = stored_statistics(folder, PREPROCESSOR, "normalizer_processor")
    after = stored_statistics(folder, POSTPROCESSOR, "unnormalizer_processor")
    refuse_absent(folder, PREPROCESSOR, before, "observation.state", modes["STATE"])
    refuse_absent(folder, PREPROCESSOR, before, "action", modes["ACTION"])
    refuse_absent(folder, POSTPROCESSOR, after, "action", modes["ACTION"])


def stored_statistics(folder: Path, file: str, kind: str) -> set[str]:
    """Return the names of the statistics that a processor's step of this kind has stored."""
    from safetensors import safe_open

    names = set()
    for step in read_json(folder, file)["steps"]:
        if step.get("registry_name") == kind and "state_file" in step:
            with safe_open(folder / step["state_file"], "pt") as tensors:
                names |= set(tensors.keys())
    return names


def refuse_absent(folder: Path, file: str, stored: set[str], feature: str, mode: str) -> None:
    """Raise UserError unless the statistics that this way of normalising needs are stored."""
    absent = [f"{feature}.{one}" for one in STATISTICS[mode] if f"{feature}.{one}" not in stored]
    if absent:
        raise UserError(
            f"{folder}/{file} has no statistics {', '.join(absent)}, and LeRobot would go on "
            "without: fine-tune the checkpoint on this robot first, which writes them"
        )


def find_tokenizer(folder: Path) -> str:
    """Return the tokenizer to load: the folder's own, or LeRobot's if it is on this machine."""
    import transformers

    steps = read_json(folder, PREPROCESSOR)["steps"]
    configs = [one["config"] for one in steps if one.get("registry_name") == "tokenizer_processor"]
    if not configs:
        raise UserError(f"{folder}/{PREPROCESSOR} has no tokenizer: download the folder again")
    name = configs[0]["tokenizer_name"]
    if (folder / "tokenizer.json").is_file():
        name = str(folder)
    try:
        transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception as error:  # bad files can fail in any way
        raise UserError(
            f"{folder} needs the tokenizer {name}, which is not on this machine: copy its files "
            f"(tokenizer.json and the others) into {folder}"
        ) from error
    return name
