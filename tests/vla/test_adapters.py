"""arms/adapters/: each against a tiny random build of the library's real class: sampler, loss, freezing, sharing, POCO.

    python -m pytest tests/test_adapters.py

The last line of the output says which of the three ran (tests/conftest.py).
"""
import contextlib
import copy

import pytest
import torch
from torch.testing import assert_close

import poco
from lerobot_here import importable, reason

pytestmark = pytest.mark.skipif(reason() is not None, reason=f"adapters: {reason()}")
B, N, H, A = 2, 3, 4, 5
IMAGE, WORDS = "observation.images.top", "observation.language."


@pytest.fixture(scope="module", autouse=True)
def lerobot():
    with importable():
        yield


def features():
    from lerobot.configs import FeatureType, PolicyFeature
    return ({IMAGE: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 32, 32)),
             "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(6,))},
            {"action": PolicyFeature(type=FeatureType.ACTION, shape=(A,))})


def batch(rows=B, vocabulary=100):
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, 7, dtype=torch.bool)
    mask[0, 5:] = False                                              # prompts of different lengths
    return {IMAGE: torch.rand(rows, 3, 32, 32, generator=g), "observation.state": torch.randn(rows, 6, generator=g),
            WORDS + "tokens": torch.randint(1, vocabulary, (rows, 7), generator=g), WORDS + "attention_mask": mask}


def randomise(module, std=0.1):
    """adaRMS layers start at zero, where a head would hardly see its context."""
    g = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=g)


@contextlib.contextmanager
def tiny_pi05():
    """The library with small sizes in place of its literals."""
    import lerobot.policies.pi05.modeling_pi05 as lib
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8, vocab_size=128)
    small = copy.copy(lib.get_gemma_config("gemma_300m"))
    small.width, small.depth, small.mlp_dim, small.head_dim = 32, 2, 64, 8
    vlm, expert = lib.PaliGemmaForConditionalGenerationWithPiGemma, lib.PiGemmaForCausalLM

    def small_vlm(config):
        for name, value in sizes.items():
            setattr(config.text_config, name, value)
        vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                      patch_size=16, projection_dim=32)
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        config.projection_dim = config.hidden_size = 32
        config._vocab_size, config.image_token_index, config.image_token_id = 128, 127, 127
        return vlm(config)

    def small_expert(config):
        config.vocab_size = 128
        return expert(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "get_gemma_config", lambda variant: small)
        patch.setattr(lib, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm)
        patch.setattr(lib, "PiGemmaForCausalLM", small_expert)
        yield lib


def build_pi05():
    from arms.adapters.pi05 import Pi05
    with tiny_pi05() as lib:
        inputs, outputs = features()
        config = lib.PI05Config(chunk_size=H, n_action_steps=H, num_inference_steps=5, image_resolution=(32, 32),
                                input_features=inputs, output_features=outputs, device="cpu", train_expert_only=True)
        library = lib.PI05Policy(config).eval()
    randomise(library.model)
    return Pi05(library, A, group=2), lambda data, noise: library.model.sample_actions(
        *library._preprocess_images(data), data[WORDS + "tokens"], data[WORDS + "attention_mask"], noise)


def build_smolvla(folder):
    import lerobot.policies.smolvla.modeling_smolvla as lib
    from arms.adapters.smolvla import SmolVLA
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  patch_size=8)
    text = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, vocab_size=128, pad_token_id=0)
    SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=127, scale_factor=2,
                  pad_token_id=0).save_pretrained(folder)
    special = {"fake_image_token": "<f>", "image_token": "<i>", "end_of_utterance_token": "<e>",
               "global_image_token": "<g>"}
    words = {word: index for index, word in enumerate(["[UNK]", *special.values()])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
                                        unk_token="[UNK]", pad_token="[UNK]", extra_special_tokens=special)
    tokenizer.save_pretrained(folder)

    class Processor:                                                 # the library reads two token numbers of it
        def __init__(self):
            self.tokenizer = tokenizer

    import lerobot.policies.smolvla.smolvlm_with_expert as parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.AutoProcessor, "from_pretrained", lambda *_, **__: Processor())
        inputs, outputs = features()
        config = lib.SmolVLAConfig(
            vlm_model_name=str(folder), load_vlm_weights=False, num_vlm_layers=4, train_state_proj=False,
            chunk_size=H, n_action_steps=H, num_steps=5, resize_imgs_with_padding=(32, 32), input_features=inputs,
            output_features=outputs, device="cpu")
        library = lib.SmolVLAPolicy(config).float().eval()
    randomise(library.model, 0.05)
    return SmolVLA(library, A, group=2), lambda data, noise: library.model.sample_actions(
        *library.prepare_images(data), data[WORDS + "tokens"], data[WORDS + "attention_mask"],
        library.prepare_state(data), noise=noise)


@pytest.fixture(scope="module", params=["pi05", "smolvla"])
def built(request, tmp_path_factory, lerobot):
    torch.manual_seed(0)
    if request.param == "pi05":
        return build_pi05()
    return build_smolvla(tmp_path_factory.mktemp("smolvla"))


def test_samples_are_clipped_where_the_librarys_normalisation_ends(built):
    policy, _ = built
    mapping = policy.library.config.normalization_mapping
    assert policy.limit == {"Pi05": 1.0, "SmolVLA": 5.0}[type(policy).__name__]      # their defaults
    for mode, limit in (("MEAN_STD", 5.0), ("QUANTILES", 1.0), ("MIN_MAX", 1.0)):
        modes = mapping | {"ACTION": type(mapping["ACTION"])(mode)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy.library.config, "normalization_mapping", modes)
            assert type(policy)(policy.library, A).limit == limit


def test_samples_equal_the_librarys_own(built):
    """Every candidate from one shared prefix equals the library's run with its noise, to 1e-5."""
    policy, reference = built
    data = batch()
    noise = torch.randn(B, N, H, policy.width)
    chunks = policy.sample(policy.encode(data), N, noise)
    for j in range(N):
        own = reference(data, noise[:, j])[..., :A].clamp(-policy.limit, policy.limit)
        print(f"{type(policy).__name__}: largest difference {(chunks[:, j] - own).abs().max():.1e}")
        assert_close(chunks[:, j], own, rtol=0, atol=1e-5)
    assert (chunks[:, 0] - chunks[:, 1]).abs().max() > 0.01 and chunks.shape == (B, N, H, A)


def test_the_loss_is_the_librarys_with_time_reversed(built):
    """cfm_loss at t equals the library's training loss at 1 - t, over the real actions."""
    policy, _ = built
    data, g = batch(), torch.Generator().manual_seed(3)
    actions = torch.zeros(B, H, policy.width)
    actions[..., :A] = torch.randn(B, H, A, generator=g)
    noise, t = torch.randn(B, H, policy.width, generator=g), torch.rand(B, generator=g)
    images = (policy.library._preprocess_images if hasattr(policy.library, "_preprocess_images")
              else policy.library.prepare_images)(data)
    state = {} if policy.head[0].endswith("gemma_expert.model") else {"state": policy.library.prepare_state(data)}
    theirs = policy.model.forward(*images, data[WORDS + "tokens"], data[WORDS + "attention_mask"], *state.values(),
                                  actions, noise, 1 - t)[..., :A].mean((1, 2))
    x = (1 - t)[:, None, None] * noise + t[:, None, None] * actions
    v = policy.velocity(policy.encode(data), x[:, None], t[:, None])[:, 0]
    assert_close((v - (actions - noise))[..., :A].square().mean((1, 2)), theirs, rtol=1e-4, atol=1e-5)


def test_only_the_head_learns_and_poco_runs(built):
    """One prefix per state for E- and M-step; gradients in every weight of the head and in no other."""
    policy, _ = built
    before, calls = copy.deepcopy(dict(policy.model.named_parameters())), policy.calls
    context = policy.encode(batch())
    candidates, weights, _ = poco.e_step(policy, lambda _, a: a.sum((-2, -1)), context, N, 0.5)
    loss, _ = poco.m_step_loss(policy, context, torch.zeros(B, H, A), None, candidates, weights, 1.0, 100.0)
    optimizer = torch.optim.Adam(policy.head_parameters(), lr=1e-3)
    loss.backward()
    head = {f"model.{name}" for name, one in policy.model.named_parameters() if one.grad is not None}
    assert head == {name for name, _ in policy.named_parameters()} and policy.calls == calls + 1
    optimizer.step()
    for name, one in policy.model.named_parameters():
        changed = not torch.equal(one, before[name])
        assert changed == (f"model.{name}" in head and one.grad.abs().sum() > 0), name
    assert candidates.shape == (B, N, H, A) and not candidates.requires_grad
    poco.m_step_loss(policy, context, torch.zeros(B, H, A), None, None, None, 0, 0)[0].backward()     # a second time


def test_copies_share_the_backbone_and_checkpoints_hold_the_head(built):
    policy, _ = built
    other = copy.deepcopy(policy)
    mine, theirs = dict(policy.model.named_parameters()), dict(other.model.named_parameters())
    trained = {name.removeprefix("model.") for name, _ in policy.named_parameters()}
    assert all((mine[name] is theirs[name]) == (name not in trained) for name in mine)
    state = policy.state_dict()
    assert set(state) == {f"model.{name}" for name in trained} and not any("lm_head" in name for name in state)
    for parameter in other.parameters():
        parameter.data.zero_()
    data, noise = batch(), torch.randn(B, N, H, policy.width)
    assert not torch.equal(other.sample(other.encode(data), N, noise), policy.sample(policy.encode(data), N, noise))
    other.load_state_dict(state)
    assert torch.equal(other.sample(other.encode(data), N, noise), policy.sample(policy.encode(data), N, noise))
    name = next(iter(state))
    with pytest.raises(RuntimeError, match=name):
        other.load_state_dict({key: value for key, value in state.items() if key != name})


def test_weights_that_did_not_load_are_refused_by_name(built, tmp_path):
    from logbook import UserError
    from safetensors.torch import save_file

    from arms.adapters import verify_weights
    policy, _ = built
    state = {name: value.clone() for name, value in policy.model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    verify_weights(policy.model, tmp_path)
    state["action_out_proj.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="action_out_proj.weight .another value"):
        verify_weights(policy.model, tmp_path)
    del state["action_in_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="2 weights.*action_in_proj.bias .absent"):
        verify_weights(policy.model, tmp_path)


@pytest.fixture(scope="module")
def groot(lerobot):
    pytest.importorskip("diffusers", reason="adapters: GR00T needs diffusers")
    from arms.adapters.groot import Groot
    from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config
    dit = dict(positional_embeddings=None, num_layers=4, num_attention_heads=2, attention_head_dim=8,
               norm_type="ada_norm", dropout=0.2, final_dropout=True, output_dim=16, interleave_self_attention=True)
    layers = dict(positional_embeddings=None, num_layers=1, num_attention_heads=2, attention_head_dim=12, dropout=0.2,
                  final_dropout=True)
    torch.manual_seed(0)
    config = GR00TN17Config(
        backbone_embedding_dim=24, max_state_dim=6, max_action_dim=8, action_horizon=H, hidden_size=16,
        input_embedding_dim=16, max_num_embodiments=3, diffusion_model_cfg=dit, vl_self_attention_cfg=layers,
        max_seq_len=32)
    policy = Groot(GR00TN17ActionHead(config), A, group=2)
    randomise(policy.model, 0.1)
    return policy


def groot_batch():
    g = torch.Generator().manual_seed(4)
    image = torch.zeros(B, 9, dtype=torch.bool)
    image[:, 2:6] = True
    return {"backbone_features": torch.randn(B, 9, 24, generator=g), "image_mask": image,
            "backbone_attention_mask": torch.ones(B, 9, dtype=torch.bool), "state": torch.randn(B, 1, 6, generator=g),
            "embodiment_id": torch.tensor([1, 2])}


def test_groot_samples_equal_the_librarys_own(groot):
    """The library draws its noise itself: the same seed gives the first candidate its noise."""
    from transformers.feature_extraction_utils import BatchFeature
    data = groot_batch()
    torch.manual_seed(7)
    noise = torch.randn(B, H, groot.width)
    torch.manual_seed(7)
    seen = {name: data[name] for name in ("backbone_features", "image_mask", "backbone_attention_mask")}
    action = {name: data[name] for name in ("state", "embodiment_id")}
    own = groot.model.get_action(BatchFeature(data=dict(seen)), BatchFeature(data=action))["action_pred"]
    chunks = groot.sample(groot.encode(data), N, torch.stack([noise] + [torch.randn_like(noise)] * (N - 1), 1))
    print(f"Groot: largest difference {(chunks[:, 0] - own[..., :A].clamp(-1, 1)).abs().max():.1e}")
    assert_close(chunks[:, 0], own[..., :A].clamp(-1, 1), rtol=0, atol=1e-5)
    assert chunks.shape == (B, N, H, A) and (chunks[:, 0] - chunks[:, 1]).abs().max() > 0.01


def test_poco_trains_groots_whole_head_without_dropout(groot):
    context = groot.encode(groot_batch())
    candidates, weights, _ = poco.e_step(groot, lambda _, a: a.sum((-2, -1)), context, N, 0.5)
    loss, _ = poco.m_step_loss(groot, context, torch.zeros(B, H, A), None, candidates, weights, 1.0, 100.0)
    loss.backward()
    names = {name.split(".")[1] for name, one in groot.named_parameters() if one.grad is not None}
    assert names == set(groot.head) and not groot.train().model.training
    noise, t = torch.randn(B, 1, H, groot.width), torch.rand(B, 1)
    assert torch.equal(groot.velocity(context, noise, t), groot.velocity(context, noise, t))
    shared = copy.deepcopy(groot)
    assert all(one is not two for one, two in zip(groot.parameters(), shared.parameters()))


def test_a_saved_policy_loads_with_another_horizon_and_an_unloadable_one_is_refused(lerobot, tmp_path):
    """The library prints its loading errors and returns random weights: here that is an error."""
    from arms.adapters.pi05 import Pi05
    from logbook import UserError
    from safetensors.torch import load_file, save_file
    policy, _ = build_pi05()
    policy.library.save_pretrained(tmp_path)
    with tiny_pi05():
        loaded = Pi05.load(tmp_path, A, horizon=H + 2)
        data, noise = batch(), torch.randn(B, 1, H + 2, policy.width)
        assert loaded.sample(loaded.encode(data), 1, noise).shape == (B, 1, H + 2, A)
        x, t = torch.randn(B, 1, H, policy.width), torch.rand(B, 1)
        same = Pi05.load(tmp_path, A)
        assert_close(same.velocity(same.encode(data), x, t), policy.velocity(policy.encode(data), x, t))
        weights = load_file(tmp_path / "model.safetensors")
        words = next(name for name in weights if "embed_tokens" in name)
        weights[words.replace("model.language_model.embed_tokens", "lm_head")] = weights.pop(words)  # as in pi05_base
        save_file(weights, tmp_path / "model.safetensors")
        other = Pi05.load(tmp_path, A)
        assert_close(other.velocity(other.encode(data), x, t), policy.velocity(policy.encode(data), x, t))
        name = next(name for name in weights if "action_out_proj.weight" in name)
        save_file(weights | {name: weights[name][:3].clone()}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="were not loaded"):
            Pi05.load(tmp_path, A)
        with pytest.raises(UserError, match="no model.safetensors"):
            Pi05.load(tmp_path / "none", A)
