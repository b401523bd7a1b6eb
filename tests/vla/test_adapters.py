"""arms/adapters/: each against a tiny random build of the library's own class.

    python -m pytest tests/vla/test_adapters.py

The last line of the output says which of the three ran (tests/conftest.py).
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from lerobot_here import importable, reason
from tiny_lerobot import ACTIONS as A
from tiny_lerobot import HORIZON as H
from tiny_lerobot import (
    MASK,
    TOKENS,
    batch,
    pi05_policy,
    randomise,
    smolvla_policy,
    tiny_pi05,
)
from torch.testing import assert_close

import poco
import train_online
from logbook import Clock, UserError
from replay import Batch

pytestmark = pytest.mark.skipif(reason() is not None, reason=f"adapters: {reason()}")
B, N = 2, 3


@pytest.fixture(scope="module", autouse=True)
def lerobot():
    with importable():
        yield


# ---- an adapter, and its library's own sampler ---------------------------------------------------


def build_pi05():
    from arms.adapters.pi05 import Pi05

    library = pi05_policy()

    def reference(data, noise):
        images = library._preprocess_images(data)
        return library.model.sample_actions(*images, data[TOKENS], data[MASK], noise=noise)

    return Pi05(library, A, group=2), reference


def build_smolvla(folder):
    from arms.adapters.smolvla import SmolVLA

    library = smolvla_policy(folder)

    def reference(data, noise):
        images = library.prepare_images(data)
        state = library.prepare_state(data)
        return library.model.sample_actions(*images, data[TOKENS], data[MASK], state, noise=noise)

    return SmolVLA(library, A, group=2), reference


@pytest.fixture(scope="module", params=["pi05", "smolvla"])
def built(request, tmp_path_factory, lerobot):
    torch.manual_seed(0)
    if request.param == "pi05":
        return build_pi05()
    return build_smolvla(tmp_path_factory.mktemp("smolvla"))


# ---- pi0.5 and SmolVLA ---------------------------------------------------------------------------


def test_samples_are_clipped_where_the_librarys_normalisation_ends(built):
    policy, _ = built
    config = policy.library.config
    mapping = config.normalization_mapping
    own = {"Pi05": 1.0, "SmolVLA": 5.0}  # their defaults
    assert policy.limit == own[type(policy).__name__]
    for mode, limit in (("MEAN_STD", 5.0), ("QUANTILES", 1.0), ("MIN_MAX", 1.0)):
        modes = mapping | {"ACTION": type(mapping["ACTION"])(mode)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "normalization_mapping", modes)
            assert type(policy)(policy.library, A).limit == limit


def test_samples_equal_the_librarys_own(built):
    """Every candidate from one shared prefix equals the library's run with its noise, to 1e-5."""
    policy, reference = built
    data = batch()
    noise = torch.randn(B, N, H, policy.width)
    chunks = policy.sample(policy.encode(data), N, noise)
    for j in range(N):
        own = reference(data, noise[:, j])[..., :A].clamp(-policy.limit, policy.limit)
        difference = (chunks[:, j] - own).abs().max()
        print(f"{type(policy).__name__}: largest difference {difference:.1e}")
        assert_close(chunks[:, j], own, rtol=0, atol=1e-5)
    assert (chunks[:, 0] - chunks[:, 1]).abs().max() > 0.01 and chunks.shape == (B, N, H, A)


def test_noise_of_the_real_actions_is_padded(built):
    """What acts hands over noise of the real actions only."""
    policy, _ = built
    context = policy.encode(batch())
    noise = torch.randn(B, N, H, A)
    torch.manual_seed(3)
    padding = torch.randn(B, N, H, policy.width - A)
    whole = policy.sample(context, N, torch.cat([noise, padding], -1))
    torch.manual_seed(3)
    assert torch.equal(policy.sample(context, N, noise), whole)


def test_the_loss_is_the_librarys_with_time_reversed(built):
    """cfm_loss at t equals the library's training loss at 1 - t, over the real actions."""
    policy, _ = built
    data = batch()
    g = torch.Generator().manual_seed(3)
    actions = torch.zeros(B, H, policy.width)
    actions[..., :A] = torch.randn(B, H, A, generator=g)
    noise = torch.randn(B, H, policy.width, generator=g)
    t = torch.rand(B, generator=g)
    if type(policy).__name__ == "Pi05":
        inputs = (*policy.library._preprocess_images(data), data[TOKENS], data[MASK])
    else:
        state = policy.library.prepare_state(data)
        inputs = (*policy.library.prepare_images(data), data[TOKENS], data[MASK], state)
    theirs = policy.model.forward(*inputs, actions, noise, 1 - t)[..., :A].mean((1, 2))
    x = (1 - t)[:, None, None] * noise + t[:, None, None] * actions
    v = policy.velocity(policy.encode(data), x[:, None], t[:, None])[:, 0]
    ours = (v - (actions - noise))[..., :A].square().mean((1, 2))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_the_head_learns_and_poco_runs(built):
    """One prefix per state for E- and M-step; gradients in every weight of the head alone."""
    policy, _ = built
    before = copy.deepcopy(dict(policy.model.named_parameters()))
    calls = policy.calls
    context = policy.encode(batch())
    candidates, weights, _ = poco.e_step(policy, lambda _, a: a.sum((-2, -1)), context, N, 0.5)
    loss, _ = poco.m_step_loss(
        policy, context, torch.zeros(B, H, A), None, candidates, weights, 1.0, 100.0
    )
    optimizer = torch.optim.Adam(policy.head_parameters(), lr=1e-3)
    loss.backward()
    trained = [name for name, one in policy.model.named_parameters() if one.grad is not None]
    head = {f"model.{name}" for name in trained}
    assert head == {name for name, _ in policy.named_parameters()} and policy.calls == calls + 1
    optimizer.step()
    for name, one in policy.model.named_parameters():
        changed = not torch.equal(one, before[name])
        assert changed == (f"model.{name}" in head and one.grad.abs().sum() > 0), name
    assert candidates.shape == (B, N, H, A) and not candidates.requires_grad
    again, _ = poco.m_step_loss(policy, context, torch.zeros(B, H, A), None, None, None, 0, 0)
    again.backward()  # a second time through the same context


def poco_args(**changes):
    args = {
        "act": "policy",
        "horizon": H,
        "hidden": 16,
        "layers": 2,
        "heads": 2,
        "online_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "pessimism": 0.0,
        "tau": 0.05,
        "policy_tau": 0.1,
        "num_candidates": N,
        "particles": 0,
        "temperature": 0.5,
        "guidance": 1.0,
        "clip": 100.0,
        "precision": "float32",
    }
    return SimpleNamespace(**args | changes)


def transitions():
    g = torch.Generator().manual_seed(5)
    chunk = torch.randn(B, H, A, generator=g).clamp(-1, 1)
    return Batch(
        batch(), chunk, torch.ones(B, H), torch.ones(B), torch.full((B,), 0.9), batch(seed=6)
    )


def check_the_loops_update(policy, data):
    """train_online.POCO drives an adapter: warm-up moves the critic, an update the head too."""
    agent = train_online.POCO(poco_args(), policy, Clock())
    backbone = {name: one.clone() for name, one in policy.model.named_parameters()}
    for name, _ in policy.named_parameters():
        del backbone[name.removeprefix("model.")]
    head = copy.deepcopy(policy.state_dict())
    critic = copy.deepcopy(agent.critic.state_dict())
    agent.update(data, warmup=True)
    assert all(torch.equal(head[name], one) for name, one in policy.state_dict().items())
    assert any(
        not torch.equal(critic[name], one) for name, one in agent.critic.state_dict().items()
    )
    stats = agent.update(data, warmup=False)
    assert set(stats) == set(agent.stats) and all(torch.isfinite(one) for one in stats.values())
    moved = [name for name, one in policy.state_dict().items() if not torch.equal(head[name], one)]
    assert moved and not set(moved) & {"pooled_mean", "pooled_std"}
    now = dict(policy.model.named_parameters())
    assert all(torch.equal(now[name], one) for name, one in backbone.items())


def test_train_onlines_poco_drives_it(built):
    policy = copy.deepcopy(built[0])
    policy.fit(policy.encode(batch(8)).parts["pooled"])
    seen = policy.critic_obs(policy.encode(batch(8)))
    assert seen.shape == (8, policy.critic_dim)
    assert_close(seen.mean(0), torch.zeros(policy.critic_dim), rtol=0, atol=1e-3)
    assert policy.sizes() == {"action_dim": A, "group": 2}
    check_the_loops_update(policy, transitions())


def test_copies_share_the_backbone_and_checkpoints_hold_the_head(built):
    policy, _ = built
    other = copy.deepcopy(policy)
    mine = dict(policy.model.named_parameters())
    theirs = dict(other.model.named_parameters())
    trained = {name.removeprefix("model.") for name, _ in policy.named_parameters()}
    assert all((mine[name] is theirs[name]) == (name not in trained) for name in mine)
    state = policy.state_dict()
    statistics = {"pooled_mean", "pooled_std"}
    assert set(state) == {f"model.{name}" for name in trained} | statistics
    assert not any("lm_head" in name for name in state)
    for parameter in other.parameters():
        parameter.data.zero_()
    data = batch()
    noise = torch.randn(B, N, H, policy.width)

    def draw(one):
        return one.sample(one.encode(data), N, noise)

    assert not torch.equal(draw(other), draw(policy))
    other.load_state_dict(state)
    assert torch.equal(draw(other), draw(policy))
    name = next(name for name in state if name not in statistics)
    with pytest.raises(RuntimeError, match=name):
        other.load_state_dict({key: value for key, value in state.items() if key != name})


def test_weights_that_did_not_load_are_refused_by_name(built, tmp_path):
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


# ---- GR00T ---------------------------------------------------------------------------------------


def build_groot(self_attention_layers):
    from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config

    dit = {
        "positional_embeddings": None,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "norm_type": "ada_norm",
        "dropout": 0.2,
        "final_dropout": True,
        "output_dim": 16,
        "interleave_self_attention": True,
    }
    layers = {
        "positional_embeddings": None,
        "num_layers": self_attention_layers,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "dropout": 0.2,
        "final_dropout": True,
    }
    torch.manual_seed(0)
    config = GR00TN17Config(
        backbone_embedding_dim=24,
        max_state_dim=6,
        max_action_dim=8,
        action_horizon=H,
        hidden_size=16,
        input_embedding_dim=16,
        max_num_embodiments=3,
        diffusion_model_cfg=dit,
        vl_self_attention_cfg=layers,
        max_seq_len=32,
    )
    action_head = GR00TN17ActionHead(config)
    randomise(action_head, 0.1)
    return action_head.eval()


@pytest.fixture(scope="module")
def groot(lerobot):
    pytest.importorskip("diffusers", reason="adapters: GR00T needs diffusers")
    from arms.adapters.groot import Groot

    return Groot(build_groot(self_attention_layers=1), A, group=2)


def groot_batch(seed=4):
    g = torch.Generator().manual_seed(seed)
    image = torch.zeros(B, 9, dtype=torch.bool)
    image[:, 2:6] = True
    return {
        "backbone_features": torch.randn(B, 9, 24, generator=g),
        "image_mask": image,
        "backbone_attention_mask": torch.ones(B, 9, dtype=torch.bool),
        "state": torch.randn(B, 1, 6, generator=g),
        "embodiment_id": torch.tensor([1, 2]),
    }


def groot_reference(action_head, data, seed):
    """The library's own sampler. It draws its noise itself, after this seed."""
    from transformers.feature_extraction_utils import BatchFeature

    def part(*names):
        return BatchFeature(data={name: data[name] for name in names})

    torch.manual_seed(seed)
    return action_head.get_action(
        part("backbone_features", "image_mask", "backbone_attention_mask"),
        part("state", "embodiment_id"),
    )["action_pred"]


def first_noise(policy, seed):
    """Noise for N candidates, the first of them the library's after this seed."""
    torch.manual_seed(seed)
    noise = torch.randn(B, 1, H, policy.width)
    return torch.cat([noise, torch.randn(B, N - 1, H, policy.width)], dim=1)


def test_groot_samples_equal_the_librarys_own(groot):
    data = groot_batch()
    own = groot_reference(groot.model, data, 7)[..., :A].clamp(-1, 1)
    chunks = groot.sample(groot.encode(data), N, first_noise(groot, 7))
    print(f"Groot: largest difference {(chunks[:, 0] - own).abs().max():.1e}")
    assert_close(chunks[:, 0], own, rtol=0, atol=1e-5)
    assert chunks.shape == (B, N, H, A) and (chunks[:, 0] - chunks[:, 1]).abs().max() > 0.01


def test_a_groot_head_without_self_attention_is_taken_too(groot):
    """N1.6's head has no such layer; N1.7's with none behaves the same."""
    from arms.adapters.groot import Groot

    action_head = build_groot(self_attention_layers=0)
    data = groot_batch()
    own = groot_reference(action_head, data, 7)[..., :A].clamp(-1, 1)
    del action_head.vl_self_attention
    policy = Groot(action_head, A, group=2)
    chunks = policy.sample(policy.encode(data), N, first_noise(policy, 7))
    assert_close(chunks[:, 0], own, rtol=0, atol=1e-5)


def test_poco_trains_groots_whole_head_without_dropout(groot):
    context = groot.encode(groot_batch())
    candidates, weights, _ = poco.e_step(groot, lambda _, a: a.sum((-2, -1)), context, N, 0.5)
    loss, _ = poco.m_step_loss(
        groot, context, torch.zeros(B, H, A), None, candidates, weights, 1.0, 100.0
    )
    loss.backward()
    names = {name.split(".")[1] for name, one in groot.named_parameters() if one.grad is not None}
    assert names == set(groot.head) and not groot.train().model.training
    noise = torch.randn(B, 1, H, groot.width)
    t = torch.rand(B, 1)
    assert torch.equal(groot.velocity(context, noise, t), groot.velocity(context, noise, t))
    shared = copy.deepcopy(groot)
    assert all(one is not two for one, two in zip(groot.parameters(), shared.parameters()))


def test_train_onlines_poco_drives_groot(groot):
    policy = copy.deepcopy(groot)
    data = transitions()._replace(obs=groot_batch(), next_obs=groot_batch(8))
    assert policy.critic_obs(policy.encode(data.obs)).shape == (B, policy.critic_dim)
    check_the_loops_update(policy, data)


# ---- folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(lerobot, tmp_path_factory):
    """A tiny pi0.5 and the folder that LeRobot wrote of it."""
    policy, _ = build_pi05()
    folder = tmp_path_factory.mktemp("pi05")
    policy.library.save_pretrained(folder)
    return policy, folder


def test_a_saved_policy_loads_with_another_horizon(saved):
    from arms.adapters.pi05 import Pi05

    policy, folder = saved
    data = batch()
    with tiny_pi05():
        loaded = Pi05.load(folder, A, horizon=H + 2)
        noise = torch.randn(B, 1, H + 2, policy.width)
        assert loaded.sample(loaded.encode(data), 1, noise).shape == (B, 1, H + 2, A)
        same = Pi05.load(folder, A)
    x = torch.randn(B, 1, H, policy.width)
    t = torch.rand(B, 1)
    assert_close(same.velocity(same.encode(data), x, t), policy.velocity(policy.encode(data), x, t))


def test_a_folder_with_the_tied_embeddings_other_name_loads(saved):
    """As in pi05_base."""
    from safetensors.torch import load_file, save_file

    from arms.adapters.pi05 import Pi05

    policy, folder = saved
    path = folder / "model.safetensors"
    weights = load_file(path)
    before = path.read_bytes()
    words = next(name for name in weights if "embed_tokens" in name)
    tied = words.replace("model.language_model.embed_tokens", "lm_head")
    weights[tied] = weights.pop(words)
    save_file(weights, path)
    with tiny_pi05():
        other = Pi05.load(folder, A)
    path.write_bytes(before)
    data = batch()
    x = torch.randn(B, 1, H, policy.width)
    t = torch.rand(B, 1)
    assert_close(
        other.velocity(other.encode(data), x, t), policy.velocity(policy.encode(data), x, t)
    )


def test_a_folder_that_did_not_load_is_refused(saved, tmp_path):
    """The library prints its loading errors and returns random weights: here that is an error."""
    from safetensors.torch import load_file, save_file

    from arms.adapters.pi05 import Pi05

    policy, _ = saved
    policy.library.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "action_out_proj.weight" in name)
    save_file(weights | {name: weights[name][:3].clone()}, tmp_path / "model.safetensors")
    with tiny_pi05(), pytest.raises(UserError, match="were not loaded"):
        Pi05.load(tmp_path, A)
    with pytest.raises(UserError, match="no model.safetensors"):
        Pi05.load(tmp_path / "none", A)
