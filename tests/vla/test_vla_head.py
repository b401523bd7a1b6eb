"""vla_head.py: one backbone call per state, exact folding, a frozen backbone, cloning and POCO.

python -m pytest tests/vla/test_vla_head.py
"""

import copy
import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import poco
import train_offline
import train_online
from chunk_critic import aggregate
from logbook import Clock, UserError, load_checkpoint, save_checkpoint
from replay import Batch

transformers = pytest.importorskip("transformers", reason="vla_head.py needs transformers")
import vla_head  # noqa: E402
from arms.adapters.backbone import INSTRUCTIONS, Backbone, tiny_backbone  # noqa: E402
from demos.views import Seeing  # noqa: E402
from vla_head import VLAFlowHead  # noqa: E402

B, V, P, H, A = 3, 2, 5, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("tiny"), size=32)


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone.load(folder, "lift the cube", V)


def head(backbone, seed=0, **sizes):
    torch.manual_seed(seed)
    small = {"channels": 16, "blocks": 2, "attention_heads": 2, "flow_steps": 3, "features": 8}
    return VLAFlowHead(backbone.length, backbone.width, P, A, H, **small | sizes)


def pictures(rows=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(0, 256, (rows, V, 32, 32, 3), dtype=torch.uint8, generator=g),
        "state": torch.randn(rows, P, generator=g),
    }


def agent(policy, **changes):
    """POCO with this head, at toy size."""
    args = {
        "act": "policy",
        "horizon": H,
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "online_learning_rate": 3e-3,
        "critic_learning_rate": 3e-3,
        "pessimism": 0.0,
        "tau": 0.05,
        "policy_tau": 0.1,
        "num_candidates": 16,
        "particles": 0,
        "temperature": 0.05,
        "guidance": 1.0,
        "clip": 10.0,
        "precision": "float32",
    }
    return train_online.POCO(SimpleNamespace(**args | changes), policy, Clock())


class Spy:
    """Count the rows of every forward pass of a module while it lasts."""

    def __init__(self, module, argument):
        self.rows = []
        self.argument = argument
        self.hook = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.rows.append(len(kwargs[self.argument] if self.argument in kwargs else args[0]))

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        self.hook.remove()


# ---- one prefix for all candidates ---------------------------------------------------------------


@pytest.mark.parametrize("n, steps", [(1, 1), (16, 10)])
def test_the_backbone_runs_once_per_state_whatever_n_and_k(backbone, n, steps):
    """Counted at the model, not by the backbone: one call of B rows for E- and M-step."""
    policy = head(backbone, flow_steps=steps)
    calls = backbone.calls
    rows = backbone.rows
    with (
        Spy(backbone.model, "input_ids") as seen,
        Spy(backbone.model.vision_model, "pixel_values") as images,
    ):
        context = policy.encode(backbone.observe(**pictures()))
        candidates, weights, _ = poco.e_step(policy, lambda _, a: a.sum((-2, -1)), context, n, 0.1)
        loss, _ = poco.m_step_loss(
            policy, context, torch.zeros(B, H, A), None, candidates, weights, 1.0, 10.0
        )
        loss.backward()
        policy.critic_obs(context)
    assert seen == [B] and images == [B * V] and candidates.shape == (B, n, H, A)
    assert (backbone.calls - calls, backbone.rows - rows) == (1, B)


def test_keys_and_values_are_projected_once_per_sample_and_never_expanded(backbone, monkeypatch):
    policy = head(backbone, flow_steps=7)
    projected = []
    used = []

    def watch(block):
        project = block.project

        def counted(tokens):
            projected.append(len(tokens))
            return project(tokens)

        monkeypatch.setattr(block, "project", counted)
        block.register_forward_pre_hook(
            lambda _, args: used.append((len(args[0]), len(args[2]), len(args[3])))
        )

    for block in policy.blocks:
        watch(block)
    policy.sample(policy.encode(backbone.observe(**pictures())), 5)
    assert projected == [B] * 2 and used == [(B, B, B)] * 14


def test_folded_candidates_equal_replicated_states(backbone):
    """N candidates against shared keys = N copies of the state with one candidate each, to 1e-6."""
    policy = head(backbone)
    n = 6
    data = pictures()
    obs = backbone.observe(**data)
    noise = torch.randn(B, n, H, A)
    single = noise.flatten(0, 1)[:, None]
    folded = policy.sample(policy.encode(obs), n, noise)
    copies = policy.sample(policy.encode(obs.repeat_interleave(n, 0)), 1, single)
    assert_close(folded, copies.view(B, n, H, A), rtol=0, atol=1e-6)
    repeated = {name: part.repeat_interleave(n, 0) for name, part in data.items()}
    again = policy.sample(policy.encode(backbone.observe(**repeated)), 1, single)
    assert_close(folded, again.view(B, n, H, A), rtol=0, atol=1e-5)  # the backbone's own rounding
    t = torch.rand(B, n)
    loss = policy.cfm_loss(policy.encode(obs), folded, None, noise, t)
    alone = []
    for b in range(B):
        context = policy.encode(obs[b : b + 1])
        for j in range(n):
            pick = (slice(b, b + 1), slice(j, j + 1))
            alone.append(policy.cfm_loss(context, folded[pick], None, noise[pick], t[pick]))
    assert_close(loss, torch.cat(alone).view(B, n), rtol=0, atol=1e-6)
    assert (folded[:, 0] - folded[:, 1]).abs().max() > 0.01


def test_candidates_and_states_do_not_see_each_other(backbone):
    policy = head(backbone)
    noise = torch.randn(B, 4, H, A)
    obs = backbone.observe(**pictures())
    before = policy.sample(policy.encode(obs), 4, noise)
    noise[1, 2] = 0
    obs[2] = obs[0]
    after = policy.sample(policy.encode(obs), 4, noise)
    changed = (before - after).abs().amax((2, 3)) > 1e-7
    assert changed[:2].nonzero().tolist() == [[1, 2]] and changed[2].all()


def test_the_chunk_depends_on_images_state_instruction_and_every_action(backbone, folder):
    policy = head(backbone)
    data = pictures()
    noise = torch.randn(B, 1, H, A)
    half = torch.full((B, 1), 0.5)
    obs = backbone.observe(**data)
    other = Backbone.load(folder, "drop the cube", V)
    assert (backbone(data["images"]) - other(data["images"])).abs().max() > 0.01
    base = policy.velocity(policy.encode(obs), noise, half)
    for changed in (
        backbone.observe(pictures(seed=1)["images"], data["state"]),
        backbone.observe(data["images"], data["state"] + 1),
    ):
        assert (policy.velocity(policy.encode(changed), noise, half) - base).abs().max() > 0.01
    noise[:, :, 0] += 1
    moved = (policy.velocity(policy.encode(obs), noise, half) - base).abs().amax((0, 1, 3))
    assert (moved > 1e-3).all()
    early = policy.velocity(policy.encode(obs), noise, torch.zeros(B, 1))
    late = policy.velocity(policy.encode(obs), noise, torch.ones(B, 1))
    assert (early - late).abs().max() > 0.01


# ---- what is trained, saved and standardised -----------------------------------------------------


def test_only_the_head_has_gradients_and_all_of_it(backbone):
    policy = head(backbone)
    context = policy.encode(backbone.observe(**pictures()))
    policy.cfm_loss(context, torch.zeros(B, 2, H, A)).mean().backward()
    trained = dict(policy.named_parameters())
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in trained.values())
    assert len(trained) == 48
    assert sum(1 for _ in policy.head_parameters()) == len(trained)
    assert all(one.grad is None and not one.requires_grad for one in backbone.model.parameters())
    assert not any(module.training for module in backbone.model.modules())


def test_checkpoints_hold_the_head_alone(backbone, tmp_path):
    """A saved head makes the same chunks in a fresh one, built from its sizes."""
    policy = head(backbone)
    policy.fit(backbone.observe(**pictures(12)))
    first = agent(policy)
    assert first.actor.from_hidden.weight is not policy.from_hidden.weight
    save_checkpoint(tmp_path / "a.pt", {"agent": first.state_dict(), "sizes": policy.sizes()})
    count = sum(one.numel() for one in (*policy.parameters(), *policy.buffers()))
    assert sum(one.numel() for one in policy.state_dict().values()) <= count < 30_000
    state = load_checkpoint(tmp_path / "a.pt")
    fresh = VLAFlowHead(**state["sizes"])
    agent(fresh).load_state_dict(state["agent"])
    noise = torch.randn(B, 2, H, A)
    obs = backbone.observe(**pictures())
    assert torch.equal(
        fresh.sample(fresh.encode(obs), 2, noise), policy.sample(policy.encode(obs), 2, noise)
    )
    assert torch.equal(fresh.critic_obs(fresh.encode(obs)), policy.critic_obs(policy.encode(obs)))
    with pytest.raises(RuntimeError, match="size mismatch for"):
        agent(head(backbone, channels=32)).load_state_dict(state["agent"])


def test_fit_standardises_and_pools_the_demonstrations(backbone):
    policy = head(backbone)
    obs = backbone.observe(**pictures(20))
    policy.fit(obs)
    context = policy.encode(obs)
    assert_close(context.state.mean(0), torch.zeros(P), rtol=0, atol=1e-5)
    assert context.hidden.mean(0).abs().max() < 1e-4 and context.hidden.abs().max() <= 10
    seen = policy.critic_obs(context)
    assert seen.shape == (20, P + 8) == (20, policy.critic_dim)
    assert_close(seen.mean(0), torch.zeros(P + 8), rtol=0, atol=1e-3)
    assert_close(seen.std(0), torch.ones(P + 8), rtol=0, atol=1e-3)
    correlation = torch.corrcoef(seen[:, P:].T)
    assert (correlation - torch.eye(8)).abs().max() < 0.3  # principal components
    policy.fit(obs, torch.tensor([3.0] + [0.01] * (P - 1)))
    assert policy.state_std[0] == 3 and (policy.state_std[1:] < 3).all()
    context = policy.encode(obs)
    assert torch.equal(policy.critic_obs(context)[:, :P], context.state)  # the floor holds here too


# ---- POCO on it ----------------------------------------------------------------------------------


def toy(backbone, rows, g):
    """One-chunk episodes: brightness says which of +0.6 and -0.6 is rewarded; 40 % are wrong."""
    bright = torch.rand(rows, generator=g) < 0.5
    level = torch.where(bright[:, None, None, None, None], 220, 40)
    images = level.expand(rows, V, 32, 32, 3).to(torch.uint8).contiguous()
    obs = backbone.observe(images, torch.zeros(rows, P))
    goal = torch.where(bright, 0.6, -0.6)
    wrong = torch.rand(rows, generator=g) < 0.4
    centre = torch.where(wrong, -goal, goal)[:, None, None]
    chunk = (centre + 0.1 * torch.randn(rows, H, A, generator=g)).clamp(-1, 1)
    reward = ((chunk.mean((1, 2)) - goal).abs() < 0.3).float()
    return Batch(obs, chunk, torch.ones(rows, H), reward, torch.zeros(rows), obs), goal


def test_cloning_then_poco_improves_a_toy_task_seen_in_pictures(backbone):
    """Cloning copies demonstrators who are wrong 40 % of the time; the reward corrects them."""
    policy = head(backbone, channels=32)
    g = torch.Generator().manual_seed(0)
    data, _ = toy(backbone, 512, g)
    test, goal = toy(backbone, 128, g)
    policy.fit(data.obs)
    optimizer = train_offline.adam(policy.head_parameters(), 3e-3)

    def draw():
        rows = torch.randint(0, 512, (48,), generator=g)
        return Batch(*(part[rows] for part in data))

    def success():
        chunks = policy.sample(policy.encode(test.obs), 1)[:, 0]
        return ((chunks.mean((1, 2)) - goal).abs() < 0.3).float().mean().item()

    for _ in range(150):
        train_offline.minimise(train_offline.cloning_loss(policy, draw()), optimizer)
    cloned = success()
    frozen = copy.deepcopy(policy.state_dict())
    learner = agent(policy)
    for _ in range(60):
        learner.update(draw(), warmup=True)
    assert all(torch.equal(frozen[name], one) for name, one in policy.state_dict().items())
    for _ in range(150):
        stats = learner.update(draw(), warmup=False)
    assert set(stats) == set(learner.stats)
    assert 0.4 < cloned < 0.8 and success() > cloned + 0.15
    signs = torch.tensor([1.0, -1.0])[:, None, None]
    both = goal[:, None, None, None].expand(-1, 2, H, A) * signs
    q = aggregate(learner.critic(policy.critic_obs(policy.encode(test.obs)), both))
    assert (q[:, 0] > q[:, 1] + 0.3).float().mean() > 0.9


def test_an_observation_is_made_only_where_a_chunk_begins(backbone):
    gymnasium = vla_head.gymnasium

    class Env(gymnasium.Env):
        action_space = gymnasium.spaces.Box(-1, 1, (A,))

        def reset(self, seed=None, options=None):
            return np.ones(9, np.float32), {}

        def step(self, action):
            return np.ones(9, np.float32), 0.0, False, False, {}

    calls = backbone.calls
    env = Seeing(Env(), lambda env: pictures()["images"][0].numpy(), backbone.observe, P, every=3)
    rows = [env.reset()[0]] + [env.step(None)[0] for _ in range(6)]
    assert [bool(row.any()) for row in rows] == [True, False, False, True, False, False, True]
    assert backbone.calls == calls + 3
    assert rows[0].shape == (P + backbone.length * backbone.width,)
    expected = backbone.observe(pictures()["images"][:1], torch.ones(1, P))[0].numpy()
    assert np.array_equal(rows[0], expected)


# ---- the command line ----------------------------------------------------------------------------


def parse(line):
    return train_online.parse(vla_head.Args, line.split(), method="vla")


def test_the_paper_preset_is_table_five():
    paper = parse("--preset paper --backbone somewhere")
    table = {
        "batch_size": 64,
        "online_learning_rate": 5e-5,
        "critic_learning_rate": 3e-4,
        "discount": 0.99,
        "episode_limit": 200,
        "horizon": 10,
        "warmup_steps": 2000,
        "num_candidates": 16,
        "temperature": 0.001,
        "guidance": 1.0,
        "clip": 0.01,
        "online_steps": 15_000,
        "flow_steps": 10,
        "policy_tau": 1.0,
        "pessimism": 0.0,
        "reward_offset": 0.0,
    }
    assert {name: getattr(paper, name) for name in table} == table
    small = parse("--seed 3")
    assert small.preset == "cpu" and small.seed == 3 and small.horizon == 5
    assert small.backbone == "auto" and small.updates_per_step == 0.5
    assert {"pick-pen", "hang-keychain"} <= set(INSTRUCTIONS)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--preset paper", "needs --backbone DIR"),
        ("--task scene", "pictures of task 'scene' are not implemented"),
        ("--task lfit", "unknown task 'lfit'"),
        ("--temperature 0", "--temperature must be at least 1e-06"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--resume a --eval b", "give one of them"),
        ("--attention-heads 3", "2, must divide --channels, got 3"),
        ("--attention-heads 3 --channels 15", "2, must divide --channels, got 3 and 15"),
        ("--reward-offset nan", "--reward-offset must be a finite number"),
        ("--discount 2", "--discount must be at most 1"),
        ("--workers 2", "--workers 1"),
        ("--rollouts 1", "--rollouts 0"),
        ("--demo-episodes 0", "--demo-episodes at least 1"),
        ("--filter-key train", "do not apply"),
        ("--backbone nowhere", "--backbone nowhere holds no config.json"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(line, message):
    with pytest.raises(UserError, match=message):
        vla_head.main(line.split())


@pytest.mark.parametrize(
    "flags", ["--preset paper", "--seed 1", "--demo-episodes 3", "--view auto", "--reward-offset 0"]
)
def test_a_resumed_run_keeps_what_its_replay_was_made_with(tmp_path, flags):
    """An evaluation may look at other pictures."""
    stored = dataclasses.asdict(parse("")) | {"method": "vla", "view": "drawn"}
    (tmp_path / "args.json").write_text(json.dumps({"args": stored}))
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(UserError, match=f"began with .* {stored[name]}: it cannot go on with"):
        parse(f"--resume {tmp_path} {flags}")
    assert parse(f"--resume {tmp_path} --clip 7").clip == 7
    parse(f"--eval {tmp_path} --backbone somewhere {flags}")
    with pytest.raises(UserError, match="is a run of task lift"):
        parse(f"--eval {tmp_path} --task can")


def test_a_replay_that_memory_cannot_hold_is_refused(capsys):
    vla_head.announce_replay(5000, 3000)
    assert "replay: 5000 transitions, 120 MB" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs 8000000 GB .* lower --capacity"):
        vla_head.announce_replay(10**9, 10**6)


# ---- a whole run ---------------------------------------------------------------------------------

TOY = (
    "--demo-episodes 1 --pretrain-steps 4 --warmup-steps 8 --eval-every 100 --eval-episodes 1 "
    "--final-episodes 1 --episode-limit 10 --log-every 4 --save-every 100 --batch-size 4 "
    "--num-candidates 2 --view drawn --backbone tiny"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script in an empty folder."""
    pytest.importorskip("robosuite")
    monkeypatch.chdir(tmp_path)

    def call(line):
        vla_head.main(line.split())

    return call


def assert_same(one, two, where=""):
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_same(one[name], two[name], f"{where}/{name}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


@pytest.mark.sim
def test_lift_from_pictures_runs_and_resumes_exactly(run, monkeypatch, capsys):
    """12 steps and 12 resumed are bitwise 24 steps; a kill within stage I loses nothing."""
    run(f"{TOY} --run-dir whole --online-steps 24")
    text = capsys.readouterr().out
    assert "'lift the red cube', 2 views drawn, seen by tiny" in text and "replay: 50" in text
    assert os.path.isfile("whole/curve.png") and os.path.isfile("runs/lift-vla-bc-s0/last.pt")
    shutil.move("runs", "first")

    update = train_offline.Cloning.update
    updates = []

    def interrupted(cloning):
        updates.append(cloning.step)
        if len(updates) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        update(cloning)

    monkeypatch.setattr(train_offline.Cloning, "update", interrupted)
    run(f"{TOY} --run-dir part --online-steps 12")
    assert "stage I saved at step 3" in capsys.readouterr().out
    assert not os.path.exists("part")
    run(f"{TOY} --run-dir part --online-steps 12")
    assert updates == [0, 1, 2, 3]
    run("--resume part --online-steps 24")
    assert updates == [0, 1, 2, 3]
    whole = load_checkpoint("whole/last.pt")
    part = load_checkpoint("part/last.pt")
    assert_same(whole["agent"], part["agent"])
    assert_same(whole["world"]["replay"], part["world"]["replay"])
    for name in ("whole", "part"):
        with open(f"{name}/eval.csv") as file:
            rows = [row for row in file.read().splitlines() if row.startswith(("0,", "24,"))]
        assert [row.split(",")[:2] for row in rows] == [
            ["0", "policy"],
            ["24", "policy"],
            ["24", "posterior"],
        ]
    run("--eval part")
    assert "acting from the posterior: success" in capsys.readouterr().out


@pytest.mark.sim
def test_a_run_is_resumed_only_with_its_own_backbone_and_instruction(run, tmp_path):
    run(f"{TOY} --run-dir part --online-steps 10")
    for other in ("--instruction lift_it", f"--backbone {tiny_backbone('other', seed=1)}"):
        with pytest.raises(UserError, match="begun with another backbone_and_instruction"):
            run(f"--resume part --online-steps 12 {other}")
    run(f"--resume part --online-steps 12 --backbone {tiny_backbone('same')}")
    with pytest.raises(UserError, match="nowhere"):  # before anything is deleted
        run(f"{TOY} --run-dir part --overwrite --backbone nowhere")
    assert load_checkpoint("part")["world"]["steps"] == 12


@pytest.mark.sim
def test_a_diverged_stage_one_is_named(run):
    with pytest.raises(UserError, match="(policy|loss).* became .* before step"):
        run(f"{TOY} --learning-rate 1e30 --view auto")
    with open("runs/lift-vla-bc-s0/args.json") as file:
        assert json.load(file)["args"]["view"] in ("drawn", "rendered")
