"""A frozen vision-language model from transformers, SmolVLM or PaliGemma, and its prompt.

    backbone = open_backbone("auto", "lift the red cube", 2, device)  # what --backbone names
    backbone = Backbone.load(folder, "lift the red cube", views=2)    # local files only
    hidden = backbone(images)                                         # (B, L, W)
    obs = backbone.observe(images, state)                    # (B, P + L*W), for vla_head.py
    tiny_backbone(folder)                                    # writes a random one of 0.13 M weights

`transformers` is imported when a model is made, which takes some seconds.
Not here: a head (vla_head.py), the small trained backbone (pretrained.py), models that bring their
own head (pi05.py, smolvla.py, groot.py).

Shapes: B batch, V views, S image side, I instructions, L tokens, W their width, P proprioception.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from logbook import UserError

INSTRUCTIONS = {
    "lift": "lift the red cube",
    "can": "put the can into its bin",
    "square": "put the nut on the peg",
    "pick-pen": "Place the black pen in the green pen cup.",  # the paper's words
    "hang-keychain": "Pick up the orange keychain and hang it onto the white hook.",
}
# What surrounds each image, all images and the instruction, by model family.
SMOLVLM_PROMPT = (
    "<|im_start|>User:",
    "<fake_token_around_image><global-img>{}<fake_token_around_image>",
    "{}<end_of_utterance>\nAssistant:",
)
PROMPTS = {
    "smolvlm": SMOLVLM_PROMPT,
    "idefics3": SMOLVLM_PROMPT,  # the first SmolVLM checkpoints
    "paligemma": ("", "{}", "<bos>{}\n"),
}
BYTE_VOCABULARY = 300  # of our own tiny model: the bytes, and the image token
DOWNLOAD = "huggingface-cli download HuggingFaceTB/SmolVLM2-500M-Video-Instruct --local-dir DIR"


class Backbone:
    """A frozen model with its prompts: images -> hidden states (B, L, W), one row per state.

    instruction: what it is told by default. others: further instructions, chosen by `which` in a
    call; shorter prompts are padded at their end, and the padding's hidden states are zero.
    It counts its `calls` and the `rows` it encoded.
    """

    def __init__(
        self,
        model: nn.Module,
        instruction: str,
        views: int,
        tokenizer=None,
        others: Sequence[str] = (),
    ):
        self.model = model.eval().requires_grad_(False)
        self.views = views
        self.calls = 0
        self.rows = 0
        config = model.config
        vision = config.vision_config
        self.family = config.model_type
        self.size = vision.image_size
        self.width = config.text_config.hidden_size
        self.image_token = config.image_token_id
        patches = (self.size // vision.patch_size) ** 2
        merged = 1 if self.family == "paligemma" else config.scale_factor**2
        self.image_tokens = patches // merged
        prompts = [torch.tensor(self._prompt(text, tokenizer)) for text in (instruction, *others)]
        self.prompt = pad_sequence(prompts, batch_first=True)  # (I, L)
        self.mask = pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True)
        self.length = self.prompt.shape[1]

    @property
    def features(self) -> int:
        """The numbers of an observation beside the proprioception, L * W."""
        return self.length * self.width

    @classmethod
    def load(
        cls,
        folder: str | Path,
        instruction: str,
        views: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        others: Sequence[str] = (),
    ) -> "Backbone":
        """Load a SmolVLM or PaliGemma from a local folder; nothing is downloaded.

        Raises UserError where a weight or the tokenizer is missing, or the model is of another
        family.
        """
        model = load_model(folder, dtype)
        if model.config.model_type not in PROMPTS:
            raise UserError(
                f"--backbone {folder} is a {model.config.model_type}; known: {', '.join(PROMPTS)}"
            )
        tokenizer = None
        if model.config.text_config.vocab_size != BYTE_VOCABULARY:
            tokenizer = load_tokenizer(folder)
        return cls(model.to(device), instruction, views, tokenizer, others)

    def _prompt(self, instruction, tokenizer) -> list[int]:
        if tokenizer is None:  # our own tiny model reads the bytes of the instruction
            return [self.image_token] * self.image_tokens * self.views + list(instruction.encode())
        before, image, after = PROMPTS[self.family]
        image = image.format(tokenizer.convert_ids_to_tokens(self.image_token) * self.image_tokens)
        text = before + image * self.views + after.format(instruction)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = ids.count(self.image_token)
        if found != self.image_tokens * self.views:
            raise UserError(
                f"the tokenizer of this {self.family} makes {found} image tokens of {self.views} "
                f"views, expected {self.image_tokens} each"
            )
        return ids

    @torch.no_grad()
    def __call__(self, images: Tensor, which: Tensor | None = None) -> Tensor:
        """Encode images (B, V, S, S, 3) uint8 -> last hidden states (B, L, W).

        which (B,): the number of each row's instruction, 0 by default. Images are resized to the
        model's own size. Only uint8 is taken: 0 ... 255 never becomes the exact zero that SmolVLM
        takes for a missing image and drops.
        """
        pixels = self._pixels(images)
        rows = len(images)
        if self.family != "paligemma":
            pixels = pixels.unflatten(0, (rows, self.views))
        if which is None:
            which = torch.zeros(rows, dtype=torch.long)
        mask = self.mask[which].to(pixels.device)
        out = self.model(
            input_ids=self.prompt[which].to(pixels.device),
            pixel_values=pixels,
            attention_mask=mask,
            use_cache=False,
        )
        self.calls += 1
        self.rows += rows
        hidden = out.last_hidden_state
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)

    def _pixels(self, images: Tensor) -> Tensor:
        """Resize images (B, V, S, S, 3) and scale them to [-1, 1]: (B*V, 3, size, size)."""
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[1] != self.views:
            raise ValueError(
                f"images are uint8 (B, {self.views}, S, S, 3), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        weight = next(self.model.parameters())
        pixels = images.to(weight.device).permute(0, 1, 4, 2, 3).flatten(0, 1) / 127.5 - 1
        if pixels.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return pixels.to(weight.dtype)

    def observe(self, images: Tensor, state: Tensor, which: Tensor | None = None) -> Tensor:
        """Encode images and append them to the proprioception (B, P) -> (B, P + L*W)."""
        hidden = self(images, which).flatten(1)
        return torch.cat([state.to(hidden.device), hidden.to(state.dtype)], dim=1)


def resolve_backbone(name: str) -> str:
    """Return the backbone that "auto" stands for: the trained one where its packages are."""
    if name != "auto":
        return name
    from arms.adapters import pretrained

    return pretrained.NAME if pretrained.installed() else "tiny"


def open_backbone(
    name: str, instruction: str, views: int, device: torch.device, others: Sequence[str] = ()
) -> Backbone:
    """Load the model that --backbone names.

    A folder, "tiny" for a small random one, "mobilenet-minilm" for a small trained one, or "auto".
    """
    from arms.adapters import pretrained

    name = resolve_backbone(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == pretrained.NAME:
        return pretrained.PackagedBackbone(instruction, views, device, others)
    if name != "tiny":
        return Backbone.load(name, instruction, views, device, dtype, others)
    with tempfile.TemporaryDirectory() as folder:
        tiny_backbone(folder)
        return Backbone.load(folder, instruction, views, device, dtype, others)


def load_model(folder: str | Path, dtype: torch.dtype | None) -> nn.Module:
    """Load any transformers model from local files; UserError unless every weight is there."""
    import transformers
    from transformers.utils import logging

    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"--backbone {folder} holds no config.json; fetch a model first: {DOWNLOAD}"
        )
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are reported below
    try:
        model, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # bad files can fail in any way
        first_line = str(error).splitlines()[0]
        raise UserError(f"--backbone {folder} cannot be loaded: {first_line}") from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(report["missing_keys"])
    mismatched = sorted(key[0] for key in report["mismatched_keys"])  # (name, shape, shape)
    absent = missing + mismatched
    if absent:
        raise UserError(
            f"--backbone {folder} lacks {len(absent)} of the model's weights, the first is "
            f"{absent[0]}: they would stay random. Download the folder again"
        )
    return model


def load_tokenizer(folder: str | Path):
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # bad files can fail in any way
        message = " ".join(str(error).split())[:200]
        raise UserError(
            f"--backbone {folder} has no usable tokenizer: {message}. Download the folder again"
        ) from error


def fingerprint(backbone: Backbone) -> str:
    """Return eight digits of the prompt and of a few numbers of every weight.

    The numbers are taken in bfloat16, so a GPU and a CPU agree.
    """
    digest = hashlib.sha256(backbone.prompt.numpy().tobytes())
    for weight in backbone.model.parameters():
        numbers = weight.flatten()[:8].cpu().bfloat16().view(torch.int16)
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()[:8]


def tiny_backbone(
    folder: str | Path, width: int = 64, layers: int = 2, size: int = 64, seed: int = 0
) -> Path:
    """Write a small random SmolVLM with patches of 8 x 8 where `Backbone.load` finds it."""
    from transformers import SmolVLMConfig, SmolVLMModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    vision = {
        "hidden_size": width // 2,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "image_size": size,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    text = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": BYTE_VOCABULARY,
        "pad_token_id": 0,
    }
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=BYTE_VOCABULARY - 1,
        scale_factor=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmolVLMModel(config)
        widen_initialisation(model)
    try:
        model.save_pretrained(folder)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise UserError(
            f"cannot write a backbone to {folder} ({error}): name another folder"
        ) from error
    return Path(folder)


def widen_initialisation(model: nn.Module) -> None:
    """Draw all matrices anew, with deviations that fit their width.

    The default of 0.02 suits wide trained models; in a narrow random one it would leave the place
    of a patch unreadable.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        is_embedding = "embed" in name and weight.ndim == 2
        deviation = 0.5 if is_embedding else weight[0].numel() ** -0.5
        nn.init.normal_(weight, std=deviation)
