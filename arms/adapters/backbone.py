"""
A frozen vision-language model of transformers, SmolVLM or PaliGemma, and its prompt: images -> hidden states.

    backbone = Backbone.load(folder, "lift the red cube", views=2)        # local files only, tiny or real alike
    hidden = backbone(images)                                             # (B, L, W); counts its calls and rows
    tiny_backbone(folder)                                                 # a random one of 0.13 M weights, for a laptop

`transformers` is imported when a model is made, which takes some seconds.
Not here: a head (vla_head.py), models that bring their own (pi05.py, smolvla.py, groot.py).

Shapes: B batch, V views, S image side, L tokens, W their width.
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logbook import UserError

INSTRUCTIONS = {"lift": "lift the red cube", "can": "put the can into its bin", "square": "put the nut on the peg",
                "pick-pen": "Place the black pen in the green pen cup.",                              # the paper's
                "hang-keychain": "Pick up the orange keychain and hang it onto the white hook."}      # words
# What surrounds image and instruction in the prompt, by the family of the model.
PROMPTS = {"smolvlm": ("<|im_start|>User:", "<fake_token_around_image><global-img>{}<fake_token_around_image>",
                       "{}<end_of_utterance>\nAssistant:"),
           "paligemma": ("", "{}", "<bos>{}\n")}
PROMPTS["idefics3"] = PROMPTS["smolvlm"]                   # the first SmolVLM checkpoints
BYTES = 300                                                # words of a model of ours: the bytes, and the image's token


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
        if model.config.text_config.vocab_size == BYTES:
            return cls(model.to(device), instruction, views)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"--backbone {folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}. "
                            "Download the folder again") from error
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


def fingerprint(backbone: Backbone) -> str:
    """Eight digits of the prompt and of some of every weight; bfloat16, so that a GPU and a CPU agree."""
    digest = hashlib.sha256(backbone.prompt.numpy().tobytes())
    for weight in backbone.model.parameters():
        digest.update(weight.flatten()[:8].cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:8]


def tiny_backbone(folder, width: int = 64, layers: int = 2, size: int = 64, seed: int = 0) -> Path:
    """Write a small random SmolVLM, 8 x 8 patches, where `Backbone.load` finds it; 0.13 M weights by default."""
    from transformers import SmolVLMConfig, SmolVLMModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    vision = dict(hidden_size=width // 2, intermediate_size=width, num_hidden_layers=layers, image_size=size,
                  num_attention_heads=2, patch_size=8)
    text = dict(model_type="llama", hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=BYTES, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmolVLMModel(SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=BYTES - 1,
                                           scale_factor=2, pad_token_id=0))
        for name, weight in model.named_parameters():     # 0.02, the default, is for wide trained models: it would
            if weight.ndim > 1:                           # leave the place of a patch unreadable
                scale = 0.5 if "embed" in name and weight.ndim == 2 else weight[0].numel() ** -0.5
                nn.init.normal_(weight, std=scale)
    try:
        model.save_pretrained(folder)
    except Exception as error:                            # a full disk is an error of safetensors' own
        raise UserError(f"cannot write a backbone to {folder} ({error}): name another folder") from error
    return Path(folder)
