"""vla_head.py --policy lerobot:DIR: a checkpoint is tuned by POCO and goes back to LeRobot.

    python -m pytest tests/vla/test_tuning.py

The folders are written by LeRobot itself, from tiny random builds of its own classes.
"""

import contextlib
import json
import shutil

import pytest
import torch
from lerobot_here import importable, reason
from tiny_lerobot import features, pi05_policy, smolvla_policy, tiny_pi05, tiny_smolvla
from torch.testing import assert_close

import vla_head
from logbook import UserError, load_checkpoint

pytestmark = pytest.mark.skipif(reason() is not None, reason=f"adapters: {reason()}")
H, A, P, V = 5, 7, 9, 2
CAMERAS = ("observation.images.front", "observation.images.wrist")
TEXT = "lift the red cube"
SIZES = (V, P, A, H)


@pytest.fixture(scope="module", autouse=True)
def lerobot():
    with importable():
        yield


def statistics():
    """What LeRobot would compute of a data set."""
    g = torch.Generator().manual_seed(0)
    stats = {}
    for name, width in (("observation.state", P), ("action", A)):
        mean = 0.1 * torch.randn(width, generator=g)
        spread = 0.5 + torch.rand(width, generator=g)
        stats[name] = {
            "mean": mean,
            "std": spread,
            "min": mean - 2 * spread,
            "max": mean + 2 * spread,
            "q01": mean - 1.8 * spread,
            "q99": mean + 1.8 * spread,
        }
    return stats


@contextlib.contextmanager
def any_tokenizer(tokenizer):
    """Let LeRobot's processors be built around this tokenizer, whatever name they ask for."""
    import lerobot.processor.tokenizer_processor as lib

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
        yield


class Family:
    """One of the two: its folder as LeRobot writes it, and a context in which it loads."""

    def __init__(self, name, folder):
        self.name = name
        self.folder = folder
        self.parts = folder.parent / f"{name}-parts"
        shapes = features(CAMERAS, size=64, state=P, actions=A)
        if name == "pi05":
            self.library = pi05_policy(shapes, horizon=8, tokenizer_max_length=24)
        else:
            self.library = smolvla_policy(self.parts, shapes, horizon=8, tokenizer_max_length=24)
        self.library.save_pretrained(folder)
        for processor in self.processors(statistics()):
            processor.save_pretrained(folder)

    def processors(self, stats):
        from lerobot.policies.factory import make_pre_post_processors
        from tiny_lerobot import tiny_tokenizer

        with any_tokenizer(tiny_tokenizer(self.folder)):
            return make_pre_post_processors(self.library.config, dataset_stats=stats)

    def loading(self):
        return tiny_pi05() if self.name == "pi05" else tiny_smolvla(self.parts)

    def loaded(self, folder):
        """Load a folder by LeRobot's own class."""
        with self.loading():
            return type(self.library).from_pretrained(folder, local_files_only=True)

    def open(self, folder=None, sizes=SIZES, text=TEXT):
        from arms.adapters.tuning import Checkpoint

        with self.loading():
            return Checkpoint(folder or self.folder, text, *sizes)


@pytest.fixture(scope="module", params=["pi05", "smolvla"])
def family(request, lerobot, tmp_path_factory):
    torch.manual_seed(0)
    return Family(request.param, tmp_path_factory.mktemp("lerobot") / request.param)


@pytest.fixture
def copied(family, tmp_path):
    """A copy of the folder, to be spoilt."""
    shutil.copytree(family.folder, tmp_path / "copy")
    return tmp_path / "copy"


# ---- the border between the simulator and the checkpoint -----------------------------------------


def test_flat_observations_reach_the_model_as_lerobot_prepares_them(family):
    checkpoint = family.open()
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, V, 64, 64, 3), dtype=torch.uint8, generator=g)
    state = torch.randn(3, P, generator=g)
    obs = checkpoint.observe(images, state)
    assert obs.shape == (3, P + checkpoint.features)
    raw = {name: images[:, i].permute(0, 3, 1, 2) / 255 for i, name in enumerate(CAMERAS)}
    raw |= {"observation.state": state, "task": [TEXT] * 3}
    policy = checkpoint.policy
    noise = torch.randn(3, 2, H, policy.width)
    expected = policy.sample(policy.encode(policy.processors[0](raw)), 2, noise)
    assert torch.equal(policy.sample(policy.encode(obs), 2, noise), expected)
    other = checkpoint.observe(images.flip(1), state)
    assert not torch.equal(policy.sample(policy.encode(other), 2, noise), expected)
    moved = checkpoint.observe(images, state + 0.5)
    assert not torch.equal(policy.sample(policy.encode(moved), 2, noise), expected)


def test_actions_are_normalised_and_back(family):
    checkpoint = family.open()
    actions = 2 * torch.rand(4, H, A) - 1
    normal = checkpoint.normalise(actions)
    stats = statistics()["action"]
    if family.name == "pi05":
        middle = (stats["q01"] + stats["q99"]) / 2
        half = (stats["q99"] - stats["q01"]) / 2
        expected = ((actions - middle) / half).clamp(-1, 1)
    else:
        expected = ((actions - stats["mean"]) / stats["std"]).clamp(-5, 5)
    assert_close(normal, expected, rtol=1e-4, atol=1e-5)
    inside = normal.abs() < checkpoint.policy.limit
    assert inside.float().mean() > 0.8
    assert_close(checkpoint.unnormalise(normal)[inside], actions[inside], rtol=1e-4, atol=1e-5)


def test_an_exported_head_acts_the_same_in_lerobots_own_class(family, tmp_path):
    checkpoint = family.open(sizes=(V, P, A, 8))
    policy = checkpoint.policy
    g = torch.Generator().manual_seed(2)
    head = {
        name: value + 0.05 * torch.randn(value.shape, generator=g)
        for name, value in policy.state_dict().items()
    }
    checkpoint.export(tmp_path / "out", head)
    images = torch.randint(0, 256, (2, V, 64, 64, 3), dtype=torch.uint8, generator=g)
    data = policy.batch(policy.pictures.unpack(checkpoint.observe(images, torch.zeros(2, P))))
    noise = torch.randn(2, 1, 8, policy.width, generator=g)
    ours = policy.sample(policy.encode(data), 1, noise)[:, 0]
    theirs = family.loaded(tmp_path / "out").predict_action_chunk(dict(data), noise=noise[:, 0])
    assert_close(ours, theirs.clamp(-policy.limit, policy.limit), rtol=0, atol=1e-5)
    before = family.loaded(family.folder).predict_action_chunk(dict(data), noise=noise[:, 0])
    assert (before - theirs).abs().max() > 1e-3
    again = family.open(tmp_path / "out", (V, P, A, 8))  # the exported folder can be tuned again
    assert_close(again.policy.sample(again.policy.encode(data), 1, noise)[:, 0], ours)


# ---- what is refused, before any weight is read --------------------------------------------------


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("file", ["policy_preprocessor", "policy_postprocessor"])
def test_missing_statistics_are_refused_by_name(family, copied, file):
    """LeRobot itself would go on without a word: states of -1 and 255."""
    (copied / "model.safetensors").unlink()
    for processor in family.processors(None):  # as pi05_base ships them
        if processor.name == file:
            processor.save_pretrained(copied)
            for path in copied.glob(f"{file}_step_*"):
                path.unlink()
    edit(copied / f"{file}.json", forget_state_files)
    with pytest.raises(UserError, match=f"{file}.json has no statistics .*(q01|mean)"):
        family.open(copied)


def forget_state_files(pipeline):
    for step in pipeline["steps"]:
        step.pop("state_file", None)


def test_a_missing_tokenizer_is_refused_by_name(family, copied):
    (copied / "model.safetensors").unlink()
    (copied / "tokenizer.json").unlink()

    def rename(pipeline):
        for step in pipeline["steps"]:
            if step.get("registry_name") == "tokenizer_processor":
                step["config"]["tokenizer_name"] = "nobody/has-this"

    edit(copied / "policy_preprocessor.json", rename)
    with pytest.raises(UserError, match="needs the tokenizer nobody/has-this.*tokenizer.json"):
        family.open(copied)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((V, 8, A, H), r"observation.state has shape \[9\], this task's is \[8\]"),
        ((V, P, 6, H), r"action has shape \[7\], this task's is \[6\]"),
        ((3, P, A, H), "looks through 2 cameras .*, this task has 3 views"),
    ],
)
def test_a_checkpoint_of_another_robot_is_refused(family, sizes, message):
    with pytest.raises(UserError, match=message):
        family.open(sizes=sizes)


def test_a_folder_of_another_kind_is_refused(family, copied):
    from arms.adapters.tuning import Checkpoint

    edit(copied / "config.json", lambda config: config.update(type="act"))
    with pytest.raises(UserError, match="is a act; heads of pi05 and smolvla"):
        family.open(copied)
    with pytest.raises(UserError, match="has no config.json"):
        Checkpoint(copied / "nothing", TEXT, *SIZES)
    (copied / "config.json").write_text('{"trunc')
    with pytest.raises(UserError, match="config.json is not JSON"):
        family.open(copied)


def test_another_horizon_is_explained(family, capsys):
    family.open(sizes=(V, P, A, 3))
    assert "chunks of 8 actions, --horizon is 3: no weight has the chunk's shape" in (
        capsys.readouterr().out
    )
    family.open(sizes=(V, P, A, 8))
    assert "no weight has" not in capsys.readouterr().out


def test_the_fingerprint_is_of_the_frozen_part_and_the_words(family, tmp_path):
    checkpoint = family.open()
    mark = checkpoint.fingerprint()
    head = {name: value + 1 for name, value in checkpoint.policy.state_dict().items()}
    checkpoint.policy.load_state_dict(head)
    assert checkpoint.fingerprint() == mark
    assert family.open(text="drop it").fingerprint() != mark


def test_a_policy_that_is_no_lerobot_folder_is_refused():
    with pytest.raises(UserError, match="--policy is lerobot:DIR, got pi05"):
        vla_head.main(["--policy", "pi05"])


# ---- a whole run ---------------------------------------------------------------------------------

TOY = (
    "--demo-episodes 1 --pretrain-steps 2 --warmup-steps 2 --eval-every 100 --eval-episodes 1 "
    "--final-episodes 1 --episode-limit 10 --log-every 4 --save-every 100 --batch-size 2 "
    "--num-candidates 2 --online-steps 6 --view drawn --learning-rate 1e-3"
)


@pytest.mark.sim
def test_a_checkpoint_is_cloned_tuned_and_goes_back_to_lerobot(family, tmp_path, monkeypatch):
    """Stage I, warm-up, POCO, evaluation, and a folder that acts as the tuned policy does."""
    pytest.importorskip("robosuite")
    monkeypatch.chdir(tmp_path)
    with family.loading():
        vla_head.main([*TOY.split(), "--policy", f"lerobot:{family.folder}", "--run-dir", "run"])
    state = load_checkpoint("run/last.pt")
    cloned = load_checkpoint("runs/lift-vla-tuned-bc-s0/last.pt")
    actor = state["agent"]["actor"]
    checkpoint = family.open()
    policy = checkpoint.policy
    assert actor.keys() == policy.state_dict().keys()
    name = next(name for name in actor if "action_out_proj.weight" in name)
    assert not torch.equal(actor[name], policy.state_dict()[name])
    assert not torch.equal(state["agent"]["policy"][name], cloned["policy"][name])

    policy.load_state_dict(actor)
    obs = checkpoint.observe(torch.full((1, V, 64, 64, 3), 90, dtype=torch.uint8), torch.ones(1, P))
    data = policy.batch(policy.pictures.unpack(obs))
    noise = torch.randn(1, 1, H, policy.width)
    ours = policy.sample(policy.encode(obs), 1, noise)[:, 0]
    library = family.loaded("run/lerobot")
    assert library.config.chunk_size == H
    theirs = library.predict_action_chunk(dict(data), noise=noise[:, 0])
    assert_close(ours, theirs.clamp(-policy.limit, policy.limit), rtol=0, atol=1e-5)

    with family.loading():
        vla_head.main(["--resume", "run", "--online-steps", "8"])
        with pytest.raises(UserError, match="begun with another checkpoint_and_instruction"):
            vla_head.main(["--resume", "run", "--online-steps", "9", "--instruction", "drop it"])
    assert load_checkpoint("run/last.pt")["world"]["steps"] == 8
