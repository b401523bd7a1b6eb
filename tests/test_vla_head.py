"""vla_head.py: one backbone call per state, folding is exact, nothing leaks into the backbone, files, SFT and POCO.

    python -m pytest tests/test_vla_head.py
"""
import contextlib
import copy
import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import poco
from chunk_critic import aggregate
from logbook import UserError, load_checkpoint, save_checkpoint
from replay import Batch

transformers = pytest.importorskip("transformers", reason="vla_head.py needs transformers")
import vla_head  # noqa: E402
from arms.adapters.backbone import Backbone, tiny_backbone  # noqa: E402
from demos.views import Seeing  # noqa: E402
from vla_head import Learner, VLAFlowHead  # noqa: E402

B, V, P, H, A = 3, 2, 5, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone.load(folder, "lift the cube", V)


def head(backbone, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(channels=16, layers=2, heads=2, flow_steps=3, features=8) | sizes
    return VLAFlowHead(backbone, backbone.length, backbone.width, P, A, H, **sizes)


def pictures(rows=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"images": torch.randint(0, 256, (rows, V, 32, 32, 3), dtype=torch.uint8, generator=g),
            "state": torch.randn(rows, P, generator=g)}


class Spy:
    """Rows of every forward pass of a module while it lasts."""

    def __init__(self, module, argument):
        self.rows, self.argument = [], argument
        self.hook = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.rows.append(len(kwargs.get(self.argument, args[0] if args else None)))

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize("n, steps", [(1, 1), (16, 10)])
def test_the_backbone_runs_once_per_state_whatever_n_and_k(backbone, n, steps):
    """Counted at the model itself, not by the backbone's own counter: one call of B rows for E- and M-step."""
    policy, calls, rows = head(backbone, flow_steps=steps), backbone.calls, backbone.rows
    with Spy(backbone.model, "input_ids") as seen, Spy(backbone.model.vision_model, "pixel_values") as images:
        context = policy.encode(pictures())
        candidates, weights, _ = poco.e_step(policy, lambda _, a: a.sum((-2, -1)), context, n, 0.1)
        poco.m_step_loss(policy, context, torch.zeros(B, H, A), None, candidates, weights, 1.0, 10.0)[0].backward()
        policy.critic_obs(context)
    assert seen == [B] and images == [B * V] and candidates.shape == (B, n, H, A)
    assert (backbone.calls - calls, backbone.rows - rows) == (1, B)


def test_keys_and_values_are_projected_once_per_sample_and_never_expanded(backbone, monkeypatch):
    policy, projected, used = head(backbone, flow_steps=7), [], []
    for block in policy.blocks:
        own = block.project
        monkeypatch.setattr(block, "project", lambda tokens, own=own: projected.append(len(tokens)) or own(tokens))
        block.register_forward_pre_hook(lambda _, args: used.append((len(args[0]), len(args[2]), len(args[3]))))
    policy.sample(policy.encode(pictures()), 5)
    assert projected == [B] * 2 and used == [(B, B, B)] * 14


def test_folded_candidates_equal_replicated_states(backbone):
    """N candidates against shared keys and values = N copies of the state with one candidate each, to 1e-6."""
    policy, n = head(backbone), 6
    obs = policy.observe(**pictures())
    noise = torch.randn(B, n, H, A)
    folded = policy.sample(policy.encode(obs), n, noise)
    copies = policy.sample(policy.encode(obs.repeat_interleave(n, 0)), 1, noise.flatten(0, 1)[:, None])
    assert_close(folded, copies.view(B, n, H, A), rtol=0, atol=1e-6)
    again = policy.sample(policy.encode({name: part.repeat_interleave(n, 0) for name, part in pictures().items()}), 1,
                          noise.flatten(0, 1)[:, None])
    assert_close(folded, again.view(B, n, H, A), rtol=0, atol=1e-5)                   # the backbone's own rounding
    t = torch.rand(B, n)
    loss = policy.cfm_loss(policy.encode(obs), folded, None, noise, t)
    alone = [policy.cfm_loss(policy.encode(obs[b:b + 1]), folded[b:b + 1, j:j + 1], None, noise[b:b + 1, j:j + 1],
                             t[b:b + 1, j:j + 1]) for b in range(B) for j in range(n)]
    assert_close(loss, torch.cat(alone).view(B, n), rtol=0, atol=1e-6)
    assert (folded[:, 0] - folded[:, 1]).abs().max() > 0.01


def test_candidates_and_states_do_not_see_each_other(backbone):
    policy, noise = head(backbone), torch.randn(B, 4, H, A)
    obs = policy.observe(**pictures())
    before = policy.sample(policy.encode(obs), 4, noise)
    noise[1, 2], obs[2] = 0, obs[0]
    after = policy.sample(policy.encode(obs), 4, noise)
    changed = (before - after).abs().amax((2, 3)) > 1e-7
    assert changed[:2].nonzero().tolist() == [[1, 2]] and changed[2].all()


def test_the_chunk_depends_on_images_state_instruction_and_every_action(backbone, folder):
    policy, data, noise = head(backbone), pictures(), torch.randn(B, 1, H, A)
    obs = policy.observe(**data)
    other = Backbone.load(folder, "drop the cube", V)
    assert (backbone(data["images"]) - other(data["images"])).abs().max() > 0.01
    base = policy.velocity(policy.encode(obs), noise, torch.full((B, 1), 0.5))
    for changed in (policy.observe(pictures(seed=1)["images"], data["state"]),
                    policy.observe(data["images"], data["state"] + 1)):
        assert (policy.velocity(policy.encode(changed), noise, torch.full((B, 1), 0.5)) - base).abs().max() > 0.01
    noise[:, :, 0] += 1
    moved = (policy.velocity(policy.encode(obs), noise, torch.full((B, 1), 0.5)) - base).abs().amax((0, 1, 3))
    assert (moved > 1e-3).all()
    early = policy.velocity(policy.encode(obs), noise, torch.zeros(B, 1))
    assert (early - policy.velocity(policy.encode(obs), noise, torch.ones(B, 1))).abs().max() > 0.01


def test_only_the_head_has_gradients_and_all_of_it(backbone):
    policy = head(backbone)
    policy.cfm_loss(policy.encode(pictures()), torch.zeros(B, 2, H, A)).mean().backward()
    trained = dict(policy.named_parameters())
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in trained.values()) and len(trained) == 48
    assert sum(1 for _ in policy.head_parameters()) == len(trained)
    assert all(one.grad is None and not one.requires_grad for one in backbone.model.parameters())
    assert not any(module.training for module in policy.train().backbone.model.modules())


def args(**changes):
    return SimpleNamespace(**(dict(
        critic_hidden=32, critic_layers=2, critic_heads=2, learning_rate=3e-3, actor_learning_rate=3e-3,
        critic_learning_rate=3e-3, pessimism=0.0, tau=0.05, policy_tau=0.1, num_candidates=16, temperature=0.05,
        guidance=1.0, clip=10.0) | changes))


def test_checkpoints_and_copies_hold_the_head_alone(backbone, tmp_path):
    """deepcopy, EMA and optimiser never touch the backbone; a saved head makes the same chunks in a fresh one."""
    policy = head(backbone)
    policy.fit(policy.observe(**pictures(12)))
    learner = Learner(args(), policy)
    assert learner.actor.backbone is policy.backbone is copy.deepcopy(policy).backbone
    assert learner.actor.from_hidden.weight is not policy.from_hidden.weight
    save_checkpoint(tmp_path / "a.pt", {"learner": learner.state_dict()})
    count = sum(one.numel() for one in policy.parameters()) + sum(one.numel() for one in policy.buffers())
    assert sum(one.numel() for one in policy.state_dict().values()) <= count < 30_000
    fresh = Learner(args(), head(backbone, seed=1))
    fresh.load_state_dict(load_checkpoint(tmp_path / "a.pt")["learner"])
    noise, obs, other = torch.randn(B, 2, H, A), policy.observe(**pictures()), fresh.policy
    assert torch.equal(other.sample(other.encode(obs), 2, noise), policy.sample(policy.encode(obs), 2, noise))
    assert torch.equal(other.critic_obs(other.encode(obs)), policy.critic_obs(policy.encode(obs)))
    wide = Learner(args(), head(backbone, channels=32))
    with pytest.raises(UserError, match="policy does not fit this run .size mismatch for"):
        wide.load_state_dict(load_checkpoint(tmp_path / "a.pt")["learner"])


def test_fit_standardises_and_pools_the_demonstrations(backbone):
    policy = head(backbone)
    obs = policy.observe(**pictures(20))
    policy.fit(obs)
    context = policy.encode(obs)
    assert_close(context.state.mean(0), torch.zeros(P), rtol=0, atol=1e-5)
    assert context.hidden.mean(0).abs().max() < 1e-4 and context.hidden.abs().max() <= 10
    seen = (policy.critic_obs(context) - policy.obs_mean) / policy.obs_std
    assert seen.shape == (20, P + 8)
    assert_close(seen.std(0), torch.ones(P + 8), rtol=0, atol=1e-3)
    correlation = torch.corrcoef(policy.critic_obs(context)[:, P:].T)
    assert (correlation - torch.eye(8)).abs().max() < 0.3                             # principal components
    policy.fit(obs, torch.tensor([3.0] + [0.01] * (P - 1)))
    assert policy.state_std[0] == 3 and (policy.state_std[1:] < 3).all() and (policy.obs_std[:P] == 1).all()


def test_black_and_grey_images_are_seen_and_other_types_refused(backbone):
    """SmolVLM drops images of exact zeros; uint8 never becomes one."""
    for level in (0, 127, 128, 255):
        assert torch.isfinite(backbone(torch.full((B, V, 32, 32, 3), level, dtype=torch.uint8))).all()
    larger = torch.randint(0, 256, (B, V, 48, 48, 3), dtype=torch.uint8)
    assert backbone(larger).shape == (B, backbone.length, backbone.width)
    for wrong in (torch.zeros(B, V, 32, 32, 3), larger[:, :1], larger[0]):
        with pytest.raises(ValueError, match="images are uint8"):
            backbone(wrong)


def edit(folder, target, change):
    """A copy of a model's folder with its weights changed."""
    import shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file(change(weights), target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_incomplete_or_wrong_weights_are_refused_by_name(folder, tmp_path):
    name = "text_model.layers.1.mlp.up_proj.weight"
    partial = edit(folder, tmp_path / "partial", lambda w: {key: one for key, one in w.items() if key != name})
    with pytest.raises(UserError, match=f"lacks 1 of the model's weights, the first is .*{name}"):
        Backbone.load(partial, "x", V)
    shape = edit(folder, tmp_path / "shape", lambda w: w | {name: torch.zeros(3, 3)})
    with pytest.raises(UserError, match="--backbone .*shape"):
        Backbone.load(shape, "x", V)
    with pytest.raises(UserError, match="holds no config.json"):
        Backbone.load(tmp_path, "x", V)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="--backbone"):
        Backbone.load(tmp_path / "bert", "x", V)


def test_loading_gives_the_saved_weights_and_a_seed_gives_the_same_model(folder, tmp_path):
    again = tiny_backbone(tmp_path, size=32)
    first, second = (Backbone.load(one, "x", V).model.state_dict() for one in (folder, again))
    other = Backbone.load(tiny_backbone(tmp_path / "other", size=32, seed=1), "x", V).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_paligemma_with_a_tokenizer_takes_the_same_path(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                  num_attention_heads=2, image_size=28, patch_size=14, projection_dim=64)
    text = dict(model_type="gemma", hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=1, head_dim=16, vocab_size=128)
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=64, image_token_id=127,
                                          image_token_index=127)
    transformers.PaliGemmaModel(config).save_pretrained(tmp_path)
    numbers = {"[UNK]": 0, "lift": 5, "cube": 6, "<image>": 127, "<bos>": 2}
    words = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="<bos>",
                                         additional_special_tokens=["<image>"]).save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, "lift cube", V)
    assert backbone.prompt.tolist() == [[127] * 4 * V + [2, 5, 6]]
    images = pictures()["images"]
    hidden = backbone(images)
    assert hidden.shape == (B, 4 * V + 3, 64) and torch.isfinite(hidden).all()
    (tmp_path / "tokenizer.json").write_text('{"trunc')
    for path in (None, *tmp_path.glob("tokenizer*"), *tmp_path.glob("special*")):      # bytes would mean nothing to it
        if path:
            path.unlink()
        with pytest.raises(UserError, match="--backbone .* has no usable tokenizer"):
            Backbone.load(tmp_path, "lift cube", V)
    images[0, 1] = 255 - images[0, 1]
    assert ((backbone(images) - hidden).abs().amax((1, 2)) > 1e-4).tolist() == [True, False, False]


def toy(policy, rows, g):
    """One-chunk episodes: the image's brightness says whether +0.6 or -0.6 is rewarded; 40 % of them are wrong."""
    bright = torch.rand(rows, generator=g) < 0.5
    images = torch.where(bright[:, None, None, None, None], 220, 40).expand(rows, V, 32, 32, 3).to(torch.uint8)
    obs = policy.observe(images.contiguous(), torch.zeros(rows, P))
    goal = torch.where(bright, 0.6, -0.6)
    wrong = torch.rand(rows, generator=g) < 0.4
    chunk = (torch.where(wrong, -goal, goal)[:, None, None] + 0.1 * torch.randn(rows, H, A, generator=g)).clamp(-1, 1)
    reward = ((chunk.mean((1, 2)) - goal).abs() < 0.3).float()
    return Batch(obs, chunk, torch.ones(rows, H), reward, torch.zeros(rows), obs), goal


def test_cloning_then_poco_improves_a_toy_task_seen_in_pictures(backbone):
    """SFT copies demonstrators who are wrong 40 % of the time; POCO finds out from the reward."""
    policy, g = head(backbone, channels=32), torch.Generator().manual_seed(0)
    data, _ = toy(policy, 512, g)
    policy.fit(data.obs)
    learner, (test, goal) = Learner(args(), policy), toy(policy, 128, g)

    def draw():
        rows = torch.randint(0, 512, (48,), generator=g)
        return Batch(*(part[rows] for part in data))

    def success():
        chunks = learner.policy.sample(learner.policy.encode(test.obs), 1)[:, 0]
        return ((chunks.mean((1, 2)) - goal).abs() < 0.3).float().mean().item()

    for _ in range(150):
        learner.clone(draw())
    cloned = success()
    frozen = copy.deepcopy(policy.state_dict())
    for _ in range(60):
        learner.update(draw(), warmup=True)
    assert all(torch.equal(frozen[name], one) for name, one in policy.state_dict().items())
    for _ in range(150):
        stats = learner.update(draw(), warmup=False)
    assert set(stats) == set(learner.stats)
    assert 0.4 < cloned < 0.8 and success() > cloned + 0.15
    both = goal[:, None, None, None].expand(-1, 2, H, A) * torch.tensor([1.0, -1.0])[:, None, None]
    q = aggregate(learner.critic(policy.critic_obs(policy.encode(test.obs)), both))
    assert (q[:, 0] > q[:, 1] + 0.3).float().mean() > 0.9


def test_an_observation_is_made_only_where_a_chunk_begins(backbone):
    class Env(vla_head.envs.gymnasium.Env):
        action_space = vla_head.envs.gymnasium.spaces.Box(-1, 1, (A,))

        def reset(self, seed=None, options=None):
            return np.ones(9, np.float32), {}

        def step(self, action):
            return np.ones(9, np.float32), 0.0, False, False, {}

    policy, calls = head(backbone), backbone.calls
    env = Seeing(Env(), lambda env: pictures()["images"][0].numpy(), policy.observe, P, every=3)
    rows = [env.reset()[0]] + [env.step(None)[0] for _ in range(6)]
    assert [bool(row.any()) for row in rows] == [True, False, False, True, False, False, True]
    assert backbone.calls == calls + 3 and rows[0].shape == (P + backbone.length * backbone.width,)
    assert np.array_equal(rows[0], policy.observe(pictures()["images"][:1], torch.ones(1, P))[0].numpy())


def test_what_a_gpu_still_does_of_the_first_call_is_not_counted(monkeypatch):
    """A stand-in: every call takes a second, all of them by the time that somebody waits."""
    from arms.adapters import cost
    clock, queue = [0.0], []

    def run(*_):
        queue.append(1.0)
        return SimpleNamespace(mean=lambda: SimpleNamespace(backward=lambda: None))

    def synchronize():
        clock[0] += sum(queue)
        queue.clear()
    gpu = SimpleNamespace(zeros=lambda *_, device: None, cuda=SimpleNamespace(synchronize=synchronize))
    monkeypatch.setattr(cost, "torch", gpu)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    context, none = Rows([0, 0]), SimpleNamespace(parameters=lambda: [])
    policy = SimpleNamespace(flow_steps=2, horizon=H, action_dim=A, sample=run, cfm_loss=run, parameters=lambda: [],
                             zero_grad=lambda: None)
    said = cost.cost(policy, run, context, 2, 60, none, none, 0)
    assert "once a state, 1000.0 ms" in said and "500.0 ms each" in said and "2 min for 60 updates" in said


class Rows(list):
    """Of a context that lives on a GPU."""

    device = SimpleNamespace(type="cuda")


def test_the_paper_preset_is_table_five():
    paper = vla_head.parse(["--preset", "paper", "--backbone", "somewhere"])
    table = dict(batch_size=64, actor_learning_rate=5e-5, critic_learning_rate=3e-4, discount=0.99, episode_limit=200,
                 horizon=10, warmup_steps=2000, num_candidates=16, temperature=0.001, guidance=1.0, clip=0.01,
                 online_steps=15_000, flow_steps=10, policy_tau=1.0, pessimism=0.0, reward_offset=0.0)
    assert {name: getattr(paper, name) for name in table} == table
    small = vla_head.parse(["--seed", "3"])
    assert small.preset == "cpu" and small.seed == 3 and small.horizon == 5 and small.backbone is None
    assert {"pick-pen", "hang-keychain"} <= set(vla_head.INSTRUCTIONS)


@pytest.mark.parametrize("line, message", [
    ("--preset paper", "needs --backbone DIR"), ("--task scene", "pictures of task 'scene' are not implemented"),
    ("--task lfit", "unknown task 'lfit'"), ("--view drawn --run-dir /proc/none", "cannot write .*/proc/none/backbone"),
    ("--temperature 0", "--temperature must be at least 1e-06"), ("--batch-size 0", "--batch-size must be a number"),
    ("--resume a --eval b", "give one of them"),
    ("--log-every 0", "--log-every must be a number greater"), ("--heads 3", "2, must divide --channels, got 3"),
    ("--heads 3 --channels 15", "2, must divide --channels, got 3 and 15"),
    ("--reward-offset nan", "--reward-offset must be a finite number"), ("--discount 2", "--discount is at most 1")])
def test_mistakes_on_the_command_line_are_one_sentence(line, message):
    with pytest.raises(UserError, match=message):
        vla_head.main(line.split())


@pytest.mark.parametrize("flags", ["--task can", "--preset paper", "--seed 1", "--demo-episodes 3", "--view auto",
                                   "--reward-offset 0"])
def test_a_resumed_run_keeps_what_its_replay_was_made_with(tmp_path, flags):
    """An evaluation may look at other pictures, but is of the task that was learnt."""
    stored = dataclasses.asdict(vla_head.parse([])) | {"method": "vla", "view": "drawn"}
    (tmp_path / "args.json").write_text(json.dumps({"args": stored}))
    name = flags.split()[0][2:].replace("-", "_")
    with pytest.raises(UserError, match=f"was begun with {name} {stored[name]}: it cannot go on with "):
        vla_head.parse(["--resume", str(tmp_path), *flags.split()])
    assert vla_head.parse(["--resume", str(tmp_path), "--sft-steps", "7"]).sft_steps == 7
    with pytest.raises(UserError, match="with task lift") if name == "task" else contextlib.nullcontext():
        vla_head.parse(["--eval", str(tmp_path), "--backbone", "somewhere", *flags.split()])


@pytest.mark.parametrize("where", ["clone", "save"])
def test_a_signal_in_the_last_step_of_sft_is_obeyed(where):
    """Not forgotten: evaluation and reinforcement learning would run on for hours."""
    run, net = vla_head.Run.__new__(vla_head.Run), torch.nn.Linear(1, 1)
    run.args, run.cloned, run.batch = SimpleNamespace(sft_steps=2), 0, lambda: None

    def here(place):
        if place == where and run.cloned == 2 - (place == "clone"):
            os.kill(os.getpid(), signal.SIGTERM)
        return {"bc": 0.0}
    run.learner = SimpleNamespace(clone=lambda _: here("clone"), actor=net, policy=net)
    assert not run.supervised(lambda: here("save")) and run.cloned == 2
    assert run.supervised(lambda: None)


@pytest.mark.sim
def test_lift_from_pictures_runs_and_resumes_exactly(tmp_path, monkeypatch, capsys):
    """Demonstrations, SFT, warm-up, POCO, evaluation; 12 steps and 12 resumed are bitwise 24 steps."""
    pytest.importorskip("robosuite")
    monkeypatch.chdir(tmp_path)
    line = ("--demo-episodes 1 --sft-steps 4 --warmup-steps 8 --eval-every 100 --eval-episodes 1 --episode-limit 10 "
            "--log-every 4 --save-every 100 --batch-size 4 --num-candidates 2 --view drawn --run-dir ").split()
    (tmp_path / "whole/backbone").mkdir(parents=True)
    (tmp_path / "whole/backbone/config.json").write_text("{")                      # a kill left half a backbone
    vla_head.main([*line, "whole", "--online-steps", "24"])
    text = capsys.readouterr().out
    assert "2 views drawn" in text and "updates/s" in text and "lower --num-candidates" in text
    clone, calls = vla_head.Learner.clone, []

    def interrupted(learner, batch):
        calls.append(learner)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return clone(learner, batch)
    monkeypatch.setattr(vla_head.Learner, "clone", interrupted)
    vla_head.main([*line, "part", "--online-steps", "12"])                         # stopped within SFT
    assert "saved at step 3 of SFT; continue with --resume part" in capsys.readouterr().out

    def killed(*_):
        raise ZeroDivisionError
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):         # after SFT, in its evaluation
        patch.setattr(vla_head.Run, "evaluate", killed)
        vla_head.main(["--resume", "part"])
    assert len(calls) == 4
    vla_head.main(["--resume", "part"])
    vla_head.main(["--resume", "part", "--online-steps", "24"])
    assert len(calls) == 4
    whole, part = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))

    def same(one, two, where=""):
        if isinstance(one, dict):
            assert one.keys() == two.keys()
            for name in one:
                same(one[name], two[name], f"{where}/{name}")
        else:
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, where

    same(whole["learner"], part["learner"])
    same(whole["run"]["replay"], part["run"]["replay"])
    rows = [[row for row in (tmp_path / name / "eval.csv").read_text().splitlines() if row.startswith("0,")]
            for name in ("whole", "part")]
    assert len(rows[0]) == 1 and rows[0] == rows[1]
    assert (tmp_path / "whole" / "curve.png").is_file() and not list((tmp_path / "whole").glob("best.pt"))
    assert max(path.stat().st_size for path in (tmp_path / "whole" / "backbone").iterdir()) > 400_000
    vla_head.main(["--eval", "part"])
    assert "success" in capsys.readouterr().out

    with pytest.raises(UserError, match="part has 24 steps already: --online-steps must be at least that"):
        vla_head.main(["--resume", "part", "--online-steps", "23"])
    vla_head.main(["--resume", "part", "--online-steps", "26", "--actor-learning-rate", "1e-7"])
    stored = json.loads((tmp_path / "part/args.json").read_text())
    assert load_checkpoint("part")["learner"]["actor_optimizer"]["param_groups"][0]["lr"] == 1e-7
    assert stored["args"]["actor_learning_rate"] == 1e-7 and stored["args"]["online_steps"] == 26
    for other in (["--instruction", "lift the red cup!"], ["--backbone", str(tiny_backbone("other", seed=1))]):
        with pytest.raises(UserError, match="begun with another --backbone or --instruction"):
            vla_head.main(["--resume", "part", "--online-steps", "28", *other])
    (tmp_path / "part/backbone").rename("moved")
    vla_head.main(["--resume", "part", "--backbone", "moved"])
    with pytest.raises(UserError, match="nowhere"):                                # before anything is deleted
        vla_head.main([*line, "whole", "--overwrite", "--backbone", "nowhere"])
    assert load_checkpoint("whole")["step"] == 24
    with pytest.raises(UserError, match="policy.* became non-finite before step 0"):
        vla_head.main([*line, "diverged", "--learning-rate", "1e30", "--view", "auto"])
    assert json.loads((tmp_path / "diverged/args.json").read_text())["args"]["view"] in ("drawn", "rendered")
