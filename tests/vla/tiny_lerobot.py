"""Tiny random builds of LeRobot's own pi0.5 and SmolVLA, for the tests of adapters and tuning.

Import LeRobot first, with lerobot_here.importable().
"""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

HORIZON, ACTIONS = 4, 5
IMAGE = "observation.images.top"
STATE = "observation.state"
TOKENS = "observation.language.tokens"
MASK = "observation.language.attention_mask"
VOCABULARY = 128  # the last word is the image token


def features(cameras=(IMAGE,), size=32, state=6, actions=ACTIONS):
    from lerobot.configs import FeatureType, PolicyFeature

    inputs = {
        name: PolicyFeature(type=FeatureType.VISUAL, shape=(3, size, size)) for name in cameras
    }
    inputs[STATE] = PolicyFeature(type=FeatureType.STATE, shape=(state,))
    return inputs, {"action": PolicyFeature(type=FeatureType.ACTION, shape=(actions,))}


def batch(rows=2, vocabulary=100, seed=1):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, 7, dtype=torch.bool)
    mask[0, 5:] = False  # prompts of different lengths
    return {
        IMAGE: torch.rand(rows, 3, 32, 32, generator=g),
        STATE: torch.randn(rows, 6, generator=g),
        TOKENS: torch.randint(1, vocabulary, (rows, 7), generator=g),
        MASK: mask,
    }


def randomise(module, std=0.1):
    """Perturb all weights: adaRMS layers start at zero and would hardly see the context."""
    g = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=g)


# ---- pi0.5 ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_pi05():
    """The library with small sizes in place of its literals."""
    import lerobot.policies.pi05.modeling_pi05 as lib

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "projection_dim": 32,
    }
    small = copy.copy(lib.get_gemma_config("gemma_300m"))
    small.width = 32
    small.depth = 2
    small.mlp_dim = 64
    small.head_dim = 8
    vlm = lib.PaliGemmaForConditionalGenerationWithPiGemma
    expert = lib.PiGemmaForCausalLM

    def small_vlm(config):
        for name, value in sizes.items():
            setattr(config.text_config, name, value)
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        config.projection_dim = 32
        config.hidden_size = 32
        config._vocab_size = VOCABULARY
        config.image_token_index = 127
        config.image_token_id = 127
        return vlm(config)

    def small_expert(config):
        config.vocab_size = VOCABULARY
        return expert(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "get_gemma_config", lambda variant: small)
        patch.setattr(lib, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm)
        patch.setattr(lib, "PiGemmaForCausalLM", small_expert)
        yield lib


def pi05_policy(shapes=None, horizon=HORIZON, **settings):
    with tiny_pi05() as lib:
        inputs, outputs = shapes or features()
        config = lib.PI05Config(
            chunk_size=horizon,
            n_action_steps=horizon,
            num_inference_steps=5,
            image_resolution=(32, 32),
            input_features=inputs,
            output_features=outputs,
            device="cpu",
            train_expert_only=True,
            **settings,
        )
        library = lib.PI05Policy(config).eval()
    randomise(library.model)
    return library


# ---- SmolVLA -------------------------------------------------------------------------------------


def tiny_tokenizer(folder):
    """Save and return a tokenizer: words of the instruction, digits, and four image marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "fake_image_token": "<f>",
        "image_token": "<i>",
        "end_of_utterance_token": "<e>",
        "global_image_token": "<g>",
    }
    words = ["[UNK]", *special.values(), *["lift", "the", "red", "cube", "Task", "State", "Action"]]
    words += [str(number) for number in range(60)]
    numbers = {word: index for index, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        pad_token="[UNK]",
        extra_special_tokens=special,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@contextlib.contextmanager
def tiny_smolvla(folder):
    """The library with a vision-language model of small sizes, described in the folder."""
    import lerobot.policies.smolvla.modeling_smolvla as lib
    import lerobot.policies.smolvla.smolvlm_with_expert as parts
    from transformers import SmolVLMConfig

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCABULARY - 1,
        scale_factor=2,
        pad_token_id=0,
    ).save_pretrained(folder)
    processor = SimpleNamespace(tokenizer=tiny_tokenizer(folder))  # the library reads no more of it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
        yield lib


def smolvla_policy(folder, shapes=None, horizon=HORIZON, **settings):
    with tiny_smolvla(folder) as lib:
        inputs, outputs = shapes or features()
        config = lib.SmolVLAConfig(
            vlm_model_name=str(folder),
            load_vlm_weights=False,
            num_vlm_layers=4,
            train_state_proj=False,
            chunk_size=horizon,
            n_action_steps=horizon,
            num_steps=5,
            resize_imgs_with_padding=(32, 32),
            input_features=inputs,
            output_features=outputs,
            device="cpu",
            **settings,
        )
        library = lib.SmolVLAPolicy(config).float().eval()
    randomise(library.model, 0.05)
    return library
