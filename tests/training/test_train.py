"""The two training scripts, end to end at toy size: real simulator, real files, exact resume, clear
refusals."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import rows, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import demos
import envs
import poco
import train_offline
import train_online
from logbook import Clock, Progress, UserError, load_checkpoint
from logbook.options import parse
from replay import Batch, ChunkReplay

ROOT = Path(__file__).parent.parent.parent
TOY = [
    "--preset",
    "cpu",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--batch-size",
    "16",
    "--flow-steps",
    "2",
    "--episode-limit",
    "25",
    "--workers",
    "1",
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--threads",
    "1",
    "--learning-rate",
    "3e-3",
    "--eval-episodes",
    "1",
    "--demo-episodes",
    "2",
]
ONLINE = TOY + [
    "--num-candidates",
    "4",
    "--warmup-steps",
    "8",
    "--final-episodes",
    "2",
    "--eval-every",
    "1000",
    "--log-every",
    "4",
    "--save-every",
    "10",
]
pytestmark = pytest.mark.sim


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory):
    return demos.collect(
        "lift", 2, 3, tmp_path_factory.mktemp("demos") / "lift.hdf5", progress=False
    )


@pytest.fixture(scope="session")
def stage_one(demo_file, tmp_path_factory):
    """A finished stage I of 20 steps."""
    folder = tmp_path_factory.mktemp("bc") / "run"
    train_offline.main(
        [*TOY, "--data", str(demo_file), "--pretrain-steps", "20", "--run-dir", str(folder)]
    )
    return folder


def online(folder, demo_file, stage_one, *more):
    train_online.main(
        [
            *ONLINE,
            "--data",
            str(demo_file),
            "--checkpoint",
            str(stage_one),
            "--run-dir",
            str(folder),
            *more,
        ]
    )
    return folder


def test_stage_one_writes_a_run_folder_and_a_policy_that_loads(stage_one):
    written = {path.name for path in stage_one.iterdir()}
    assert {"args.json", "progress.csv", "eval.csv", "last.pt", "curve.png"} <= written
    losses = [float(row["bc"]) for row in rows(stage_one / "progress.csv")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert len(rows(stage_one / "eval.csv")) == 1


def test_stage_one_resumed_is_bitwise_the_uninterrupted_run(demo_file, stage_one, tmp_path):
    """20 steps == 12 + resume + 8, optimiser and random numbers included; --overwrite is not meant
    once more."""
    command = [*TOY, "--data", str(demo_file), "--run-dir", str(tmp_path / "run")]
    train_offline.main([*command, "--pretrain-steps", "12", "--overwrite"])
    train_offline.main(["--resume", str(tmp_path / "run"), "--pretrain-steps", "20"])
    same(load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(stage_one / "last.pt"))
    assert [row["step"] for row in rows(tmp_path / "run/progress.csv")] == [
        str(step) for step in range(1, 21)
    ]
    with pytest.raises(
        UserError, match="run has 20 steps already: --pretrain-steps must be at least that"
    ):
        train_offline.main(["--resume", str(tmp_path / "run"), "--pretrain-steps", "12"])
    assert (
        len(rows(tmp_path / "run/eval.csv")) == 2
        and rows(tmp_path / "run/eval.csv")[-1]["step"] == "20"
    )


def test_stage_one_interrupted_between_two_rows_has_the_same_rows(demo_file, tmp_path, monkeypatch):
    command = [*TOY, "--data", str(demo_file), "--pretrain-steps", "60"]  # a row every 3
    train_offline.main([*command, "--run-dir", str(tmp_path / "whole")])

    def interrupted_at(step):
        monkeypatch.setattr(
            Progress,
            "update",
            lambda self, at, *_: at == step and os.kill(os.getpid(), signal.SIGINT),
        )

    interrupted_at(7)  # seen after the next step
    train_offline.main([*command, "--run-dir", str(tmp_path / "parts")])
    assert load_checkpoint(tmp_path / "parts")["step"] == 8
    interrupted_at(None)
    train_offline.main(["--resume", str(tmp_path / "parts")])
    whole, parts = (rows(tmp_path / name / "progress.csv") for name in ("whole", "parts"))
    assert [(row["step"], row["bc"]) for row in whole] == [
        (row["step"], row["bc"]) for row in parts
    ]
    for row in parts:  # the seconds before the interruption are counted, too
        assert float(row["updates_per_s"]) * float(row["time/update"]) == pytest.approx(3)


def test_no_step_of_stage_one_leaves_the_untrained_policy(demo_file, tmp_path, capsys):
    train_offline.main(
        [
            *TOY,
            "--data",
            str(demo_file),
            "--pretrain-steps",
            "0",
            "--run-dir",
            str(tmp_path / "run"),
        ]
    )
    assert f"--checkpoint {tmp_path}/run/last.pt" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 0


def test_stage_one_saves_its_last_step_and_nothing_non_finite(demo_file, tmp_path):
    command = [*TOY, "--data", str(demo_file), "--eval-episodes", "1"]
    train_offline.main(
        [*command, "--pretrain-steps", "41", "--run-dir", str(tmp_path / "run")]
    )  # a row every 2
    assert (
        load_checkpoint(tmp_path / "run")["step"] == 41
        and rows(tmp_path / "run/progress.csv")[-1]["step"] == "41"
    )
    with pytest.raises(
        UserError, match="policy.* became non-finite before step 1; nothing was saved yet"
    ):
        train_offline.main(
            [
                *command,
                "--pretrain-steps",
                "1",
                "--learning-rate",
                "1e39",  # its loss is finite
                "--run-dir",
                str(tmp_path / "bad"),
            ]
        )
    assert not (tmp_path / "bad/last.pt").exists()


@pytest.fixture(scope="session")
def uninterrupted(demo_file, stage_one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "run"
    return online(folder, demo_file, stage_one, "--online-steps", "40")


def test_stage_two_logs_every_declared_figure(uninterrupted):
    last = rows(uninterrupted / "progress.csv")[-1]
    assert int(last["step"]) == 40 and int(last["updates"]) == 40
    for name in (*train_online.POCO.stats, *(f"time/{phase}" for phase in train_online.PHASES)):
        assert np.isfinite(float(last[name])), name
    assert 0 < float(last["ess"]) <= 1 and 0 <= float(last["alive_mass"]) <= 1
    acting = [(row["step"], row["acting"]) for row in rows(uninterrupted / "eval.csv")]
    assert acting == [("0", "policy")] * 2 + [("40", "policy")] * 2 + [("40", "posterior")] * 2
    assert (uninterrupted / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert (uninterrupted / "best.pt").exists()


@pytest.mark.parametrize("first", [18, 26])
def test_stage_two_resumed_is_bitwise_the_uninterrupted_run(
    first, demo_file, stage_one, uninterrupted, tmp_path
):
    """40 steps == first + resume + rest: replay, optimisers, pending chunk, simulator and all
    random numbers.

    18 stops inside a chunk of the first episode, 26 just after an episode of 25 steps.
    """
    online(tmp_path / "run", demo_file, stage_one, "--online-steps", str(first))
    train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", "40"])
    same(load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(uninterrupted / "last.pt"))
    steps = [int(row["step"]) for row in rows(tmp_path / "run" / "progress.csv")]
    assert steps == sorted(
        {*range(4, 41, 4), first}
    )  # where it had ended before there is a row, too


def test_a_resumed_run_goes_on_with_the_arguments_it_was_last_given(demo_file, stage_one, tmp_path):
    folder = online(tmp_path / "run", demo_file, stage_one, "--online-steps", "10")
    train_online.main(
        ["--resume", str(folder), "--online-steps", "12", "--online-learning-rate", "1e-9"]
    )
    train_online.main(["--resume", str(folder)])  # finished, by the newer arguments
    state, text = load_checkpoint(folder), json.loads((folder / "args.json").read_text())
    assert state["world"]["steps"] == 12
    assert [
        state["agent"][f"{net}_optimizer"]["param_groups"][0]["lr"] for net in ("actor", "critic")
    ] == [1e-9, 1e-3]
    assert text["args"]["online_steps"] == 12 and text["args"]["online_learning_rate"] == 1e-9
    assert [one["args"] for one in text["earlier"]] == [
        {"online_steps": 10, "online_learning_rate": 1e-3}
    ]
    assert text["earlier"][0]["versions"] == text["versions"]
    with pytest.raises(
        UserError, match="run has 12 steps already: --online-steps must be at least that"
    ):
        train_online.main(["--resume", str(folder), "--online-steps", "11"])
    assert json.loads((folder / "args.json").read_text()) == text


def test_a_finished_stage_one_evaluated_anew_says_with_what(stage_one, tmp_path):
    """Its eval.csv is then of another evaluation, and --eval must give the same one."""
    shutil.copytree(stage_one, tmp_path / "run")
    train_offline.main(
        ["--resume", str(tmp_path / "run"), "--episode-limit", "7", "--eval-episodes", "2"]
    )
    assert [row["length"] for row in rows(tmp_path / "run" / "eval.csv")] == ["7", "7"]
    stored = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (stored["args"]["episode_limit"], stored["args"]["eval_episodes"]) == (7, 2)
    assert stored["earlier"][-1]["args"] == {"episode_limit": 25, "eval_episodes": 1}


def test_stage_one_takes_demonstrations_shorter_than_a_chunk(demo_file, tmp_path):
    steps = len(demos.load(demo_file, "lift", 1)["obs"])
    train_offline.main(
        [
            *TOY,
            "--data",
            str(demo_file),
            "--demo-episodes",
            "1",
            "--horizon",
            str(steps + 1),
            "--pretrain-steps",
            "2",
            "--run-dir",
            str(tmp_path / "run"),
        ]
    )
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def test_a_policy_that_turns_non_finite_before_an_evaluation_is_told(
    demo_file, stage_one, tmp_path, monkeypatch
):
    update = train_online.POCO.update

    def spoil(agent, batch, warmup):
        agent.actor.out.bias.fill_(np.nan)
        return update(agent, batch, True)

    monkeypatch.setattr(train_online.POCO, "update", spoil)
    with pytest.raises(
        UserError, match="the evaluation failed: action has non-finite values.*nothing was saved"
    ):
        online(tmp_path / "run", demo_file, stage_one, "--online-steps", "1")


def test_a_signal_saves_and_exits_with_0_and_the_run_goes_on(
    demo_file, stage_one, uninterrupted, tmp_path
):
    command = [
        *ONLINE,
        "--data",
        str(demo_file),
        "--checkpoint",
        str(stage_one / "last.pt"),
        "--run-dir",
        "run",
        "--online-steps",
        "100000",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_online.py"), *command],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while (
        process.poll() is None
        and len(
            (tmp_path / "run/progress.csv").read_text().splitlines()
            if (tmp_path / "run/progress.csv").exists()
            else []
        )
        < 4
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "--resume run" in output and "Traceback" not in errors
    step = load_checkpoint(tmp_path / "run/last.pt")["world"]["steps"]
    train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", str(step + 4)])
    assert load_checkpoint(tmp_path / "run/last.pt")["world"]["steps"] == step + 4


def test_guidance_zero_is_behaviour_cloning_and_samples_no_candidate(
    demo_file, stage_one, tmp_path, monkeypatch
):
    def forbidden(*_):
        raise AssertionError("the E-step ran although guidance is 0")

    monkeypatch.setattr(train_online, "e_step", forbidden)
    folder = online(
        tmp_path / "run",
        demo_file,
        stage_one,
        "--online-steps",
        "12",
        "--guidance",
        "0",
        "--act",
        "posterior",
    )
    assert rows(folder / "progress.csv")[-1]["surrogate"] == ""


@pytest.mark.parametrize(
    "ratio, updates", [("0.3", [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]), ("1.5", [1, 3, 4, 6, 7, 9])]
)
def test_updates_keep_to_the_steps_when_their_ratio_is_no_whole_number(
    ratio, updates, demo_file, stage_one, tmp_path
):
    """Before and after a resumption too."""
    flags = ["--updates-per-step", ratio, "--log-every", "1", "--warmup-steps", "2"]
    online(tmp_path / "run", demo_file, stage_one, *flags, "--online-steps", "4")
    train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", str(len(updates))])
    assert [int(row["updates"]) for row in rows(tmp_path / "run/progress.csv")] == updates


def test_the_actor_is_frozen_during_warm_up(demo_file, stage_one, tmp_path):
    folder = online(
        tmp_path / "run", demo_file, stage_one, "--online-steps", "12", "--warmup-steps", "12"
    )
    before, after = (
        load_checkpoint(stage_one / "last.pt")["policy"],
        load_checkpoint(folder / "last.pt")["agent"],
    )
    same(before, after["policy"])
    same(before, after["actor"])
    assert not torch.equal(after["critic"]["out.weight"], after["target"]["out.weight"])


def test_the_online_setting_has_no_stage_one(demo_file, tmp_path, monkeypatch):
    """Table II: an untrained policy that standardises by the demonstrations, which are in the
    replay."""
    monkeypatch.setattr(train_online, "stage_one", None)
    train_online.main(
        [
            *ONLINE,
            "--data",
            str(demo_file),
            "--setting",
            "online",
            "--online-steps",
            "4",
            "--run-dir",
            str(tmp_path / "run"),
        ]
    )
    state, data = load_checkpoint(tmp_path / "run/last.pt"), demos.load(demo_file, "lift")
    assert torch.equal(state["agent"]["policy"]["obs_mean"], torch.as_tensor(data["obs"]).mean(0))
    assert state["world"]["replay"]["demos"] == len(data["obs"])
    assert (
        parse(train_online.Args, ["--preset", "paper", "--setting", "online"]).pretrain_steps == 0
    )


def test_a_checkpoint_is_evaluated_with_its_own_arguments(uninterrupted, capsys):
    for flag in ("--eval", "--resume"):
        assert parse(train_online.Args, [flag, str(uninterrupted)]).preset == "cpu"
    for change in (
        "--seed 5",
        "--setting online",
        "--demo-episodes 9",
        "--no-normalize",
        "--checkpoint other.pt",
    ):
        with pytest.raises(UserError, match="began with .*: it cannot go on with"):
            parse(train_online.Args, ["--resume", str(uninterrupted), *change.split()])
    train_online.main(["--eval", str(uninterrupted), "--final-episodes", "1"])
    printed = capsys.readouterr().out
    assert (
        "acting from the policy: success" in printed
        and "acting from the posterior: success" in printed
    )


def untrained(args, data=None, device="cpu"):
    return train_offline.Simulation(args).make_policy(torch.device(device), data)


def defaults(task, preset, setting="offline-to-online"):
    known = {"task": task, "preset": preset, "setting": setting}
    return train_online.Args(**train_online.Args.defaults(known))


def test_acting_from_the_posterior_takes_the_candidate_the_critic_prefers():
    torch.manual_seed(0)
    policy = untrained(train_offline.Args(hidden=16, layers=1, flow_steps=1))

    def critic(_, chunks, best=0.3):  # likes a certain first action
        return -(chunks[..., 0, 0] - best).square().unsqueeze(0)

    def heads(obs, chunks):
        return torch.cat([3 * critic(obs, chunks), critic(obs, chunks, -0.3)])

    def act(critic, temperature, seed=0, **options):
        acting = train_offline.Acting(policy, critic, 64, temperature, **options)
        return acting(np.zeros((1, 19), np.float32), np.random.default_rng(seed))

    noise = np.random.default_rng(0).standard_normal((1, 64, 5, 7), dtype=np.float32)
    candidates = policy.sample(policy.encode(torch.zeros(1, 19)), 64, noise=torch.as_tensor(noise))
    two = heads(None, candidates)
    best, average, lower = (
        int(q.argmax()) for q in (critic(None, candidates), two.mean(0), two.amin(0))
    )
    assert (
        np.array_equal(act(critic, 1e-6), candidates[0, best]) and len({best, average, lower}) == 3
    )
    assert np.array_equal(act(heads, 1e-6), candidates[0, average])
    assert np.array_equal(act(heads, 1e-6, pessimism=1.0), candidates[0, lower])
    assert (
        max(abs(act(critic, 1e6, seed)[0, 0] - 0.3) for seed in range(20)) > 0.5
    )  # a draw, not the mode


def test_what_hardly_moves_in_the_demonstrations_gets_no_huge_unit():
    """Else one cube touched later would put the network's input hundreds of deviations out."""
    obs = np.random.default_rng(0).normal(size=(500, 19)).astype(np.float32) * np.linspace(
        1, 2, 19, dtype=np.float32
    )
    obs[:, [3, 7]] = [[0.5, -2.0]] + 1e-5 * obs[:, [3, 7]]
    std = untrained(train_offline.Args(), {"obs": obs}).obs_std.numpy()
    own, moving = obs.std(0, ddof=1), np.delete(np.arange(19), [3, 7])
    assert np.allclose(std[moving], own[moving]) and np.allclose(
        std[[3, 7]], 0.1 * np.median(own), rtol=0.01
    )


def test_pessimism_counts_in_the_target_the_weights_and_the_acting():
    """With two heads and pessimism 1 all three take the lower head."""
    args = train_online.Args(
        hidden=8, layers=1, flow_steps=2, num_candidates=4, pessimism=1.0, precision="float32"
    )
    torch.manual_seed(0)
    agent = train_online.POCO(args, untrained(args), Clock())
    obs, chunks = torch.randn(3, 19), torch.rand(3, 4, 5, 7)
    torch.testing.assert_close(agent.value(obs, chunks), agent.target(obs, chunks).amin(0))
    assert agent.acting("posterior").pessimism == 1.0
    batch = Batch(
        obs,
        chunks[:, 0],
        torch.ones(3, 5),
        torch.zeros(3),
        torch.full((3,), 0.9),
        torch.randn(3, 19),
    )
    agent.value = lambda obs, chunks: torch.full(chunks.shape[:2], 2.0)
    stats = agent.update(batch, warmup=False)
    assert abs(stats["target"] - 1.8) < 1e-6 and stats["q_mean"] == 2.0


def test_a_batch_and_its_update_stay_on_the_training_device(monkeypatch):
    """Nothing crosses over to the host but the one look at Q. torch's meta device stands for an
    accelerator: it has no values, so what asks for one fails. Replaced, because it has no such
    thing: the look at Q, autocast, fused Adam."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            assert all(x.device.type == "meta" for x in tensors), operator
            return operator(*args, **kwargs or {})

    monkeypatch.setattr(poco, "_checked", lambda temperature, q: temperature)
    monkeypatch.setattr(train_online, "autocast", lambda args, device: contextlib.nullcontext())
    monkeypatch.setattr(
        train_online, "adam", lambda parameters, rate: torch.optim.SGD(parameters, rate)
    )
    args = defaults("square", "cpu")
    agent = train_online.POCO(args, untrained(args, device="meta"), Clock())
    replay = ChunkReplay(
        100, len(agent.policy.obs_mean), 7, args.horizon, args.discount, "meta", args.demo_share
    )
    replay.demos, replay.online = 40, 60
    report = train_online.Report(None, Clock(), train_online.PHASES)
    with Watched():
        report.add(agent.update(replay.sample(args.batch_size), warmup=False))
    assert {total.device.type for total, _ in report.sums.values()} == {"meta"} and set(
        report.sums
    ) == set(agent.stats)


def preset(task, names, setting="offline-to-online"):
    args = defaults(task, "paper", setting)
    return tuple(getattr(args, name) for name in names)


def test_the_paper_preset_is_tables_2_and_3():
    table = dict(
        batch_size=256,
        learning_rate=3e-4,
        online_learning_rate=3e-4,
        discount=0.99,
        horizon=5,
        warmup_steps=5000,
        num_candidates=32,
        guidance=1.0,
        hidden=512,
        layers=4,
        flow_steps=10,
        updates_per_step=1,
        tau=0.005,
        heads=2,
        reward_offset=0.0,
        act="policy",
        pessimism=0.0,
        policy_tau=1.0,
        demo_share=None,
    )
    columns = ("episode_limit", "demo_episodes", "pretrain_steps", "temperature", "clip")
    table_3 = {
        "scene": (750, 1000, 500_000, 0.001, 0.15),
        "puzzle-3x3": (500, 1000, 500_000, 0.001, 0.15),
        "can": (300, 300, 100_000, 0.001, 0.3),
        "square": (400, 300, 500_000, 0.001, 0.08),
        "lift": (300, 300, 100_000, 0.001, 0.15),
        "cube-double": (500, 1000, 500_000, 0.1, 0.3),
        "cube-triple": (1000, 3000, 500_000, 0.1, 0.3),
    }  # the last three are ours
    assert set(table_3) == set(envs.TASKS)
    for task, row in table_3.items():
        assert preset(task, table) == preset(task, table, "online") == tuple(table.values())
        assert preset(task, columns) == row
        table_2 = (0.001, 0.15) if task in ("lift", "can", "square") else (0.1, 0.3)
        assert preset(task, columns, "online") == (*row[:2], 0, *table_2)


@pytest.mark.skipif(
    sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc only"
)
def test_freed_activations_are_not_mapped_anew():
    """After keep_freed_memory a second round of temporaries touches no new page; without it every
    round maps thousands."""
    code = (
        "import resource, torch, train_offline\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20):\n"
        "        kept = [torch.ones(2**20) for _ in range(4)]\n"
        "        del kept\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(), train_offline.keep_freed_memory(), faults()\n"
        "assert faults() < 500"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("gpu, preset", [(True, "paper"), (False, "cpu")])
def test_the_automatic_preset_is_the_papers_where_there_is_a_gpu(gpu, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert train_offline.resolve_preset("auto")[0] == preset
    assert parse(train_online.Args, []).online_steps == {"paper": 500_000, "cpu": 15_000}[preset]


def test_flags_win_over_the_preset():
    argv = ["--task", "lift", "--preset", "cpu", "--clip", "inf", "--hidden", "7"]
    args = parse(train_online.Args, argv)
    assert args.clip == float("inf") and args.hidden == 7
    assert args.batch_size == defaults("lift", "cpu").batch_size


def bad_commands(demo_file, stage_one, uninterrupted, tmp_path):
    """A user's likely mistakes: (arguments, what the one line must name)."""
    truncated, foreign, version = (
        tmp_path / name for name in ("cut.hdf5", "foreign.hdf5", "old.pt")
    )
    truncated.write_bytes(Path(demo_file).read_bytes()[:3000])
    foreign.write_text("not hdf5")
    state = torch.load(stage_one / "last.pt", weights_only=True)
    torch.save(state | {"version": 999}, version)
    (tmp_path / "file").write_text("")
    older = shutil.copy(demo_file, tmp_path / "older.hdf5")
    with h5py.File(older, "r+") as file:
        recorded = file["data"].attrs["env_args"]
        file["data"].attrs["env_args"] = recorded.replace(
            '"env_version": "1.5', '"env_version": "1.4'
        )
    damaged, swapped, elsewhere = (
        shutil.copytree(uninterrupted, tmp_path / name)
        for name in ("damaged", "swapped", "elsewhere")
    )
    (damaged / "args.json").write_text('{"args": null}')
    shutil.copy(stage_one / "last.pt", swapped / "last.pt")
    stored = json.loads((elsewhere / "args.json").read_text())
    stored["args"]["data"] = str(older)
    (elsewhere / "args.json").write_text(json.dumps(stored))
    start = ["--data", str(demo_file), "--checkpoint", str(stage_one / "last.pt")]
    return {
        "unknown task": (["--task", "lfit"], "lift, can, square"),
        "no such demonstrations": (
            ["--data", str(tmp_path / "none.hdf5"), *start[2:]],
            "none.hdf5",
        ),
        "truncated demonstrations": (["--data", str(truncated), *start[2:]], "cut.hdf5"),
        "foreign demonstrations": (["--data", str(foreign), *start[2:]], "foreign.hdf5"),
        "no such checkpoint": ([*start[:2], "--checkpoint", str(tmp_path / "none.pt")], "none.pt"),
        "another robosuite": (
            ["--data", str(older), *start[2:]],
            "recorded with robosuite 1.4.*pip install robosuite",
        ),
        "another version": ([*start[:2], "--checkpoint", str(version)], "999"),
        "other networks": ([*start, "--hidden", "48"], "--hidden"),
        "another task": (["--resume", str(uninterrupted), "--task", "can"], "lift"),
        "resume and evaluate": (
            ["--resume", str(uninterrupted), "--eval", str(uninterrupted)],
            "give one of them",
        ),
        "resume another preset": (
            ["--resume", str(uninterrupted), "--preset", "paper"],
            "began with --preset cpu",
        ),
        "resume with other rewards": (
            ["--resume", str(uninterrupted), "--reward-offset", "-3"],
            "began with --reward-offset",
        ),
        "damaged arguments": (["--resume", str(damaged)], "args.json is damaged"),
        "a checkpoint of another stage": (
            ["--resume", str(swapped)],
            "does not fit this run .*world",
        ),
        "evaluated by another simulator": (
            ["--eval", str(elsewhere)],
            "recorded with robosuite 1.4",
        ),
        "resume nothing": (["--resume", str(tmp_path / "nowhere")], "nowhere"),
        "resume with other networks": (
            ["--resume", str(uninterrupted), "--hidden", "48"],
            "run does not fit this run",
        ),
        "resume beyond the episode's limit": (
            ["--resume", str(uninterrupted), "--episode-limit", "5"],
            "longer than --episode-limit 5",
        ),
        "resume with another replay": (
            ["--resume", str(uninterrupted), "--capacity", "99"],
            "replay of capacity",
        ),
        "evaluate stage I": (["--eval", str(stage_one)], "method bc, not of method poco"),
        "a checkpoint for nothing": ([*start, "--setting", "online"], "leave out --checkpoint"),
        "no such device": ([*start, "--device", "gpu"], "--device gpu cannot be used here"),
        "fewer than no threads": (
            [*start, "--threads", "-1"],
            "--threads must be at least 0, got -1",
        ),
        "a negative seed": ([*start, "--seed", "-1"], "--seed must be at least 0, got -1"),
        "a seed of 20 digits": ([*start, "--seed", "9" * 20], "--seed must be at most"),
        "no steps": ([*start, "--online-steps", "0"], "--online-steps must be at least 1, got 0"),
        "a run is there": ([*start, "--run-dir", str(uninterrupted)], "--overwrite"),
        "a run is there, before stage I": (
            ["--data", str(demo_file), "--run-dir", str(uninterrupted)],
            "--overwrite",
        ),
        "unwritable folder": ([*start, "--run-dir", str(tmp_path / "file" / "run")], "file"),
        "no room for a chunk": (
            [*start, "--capacity", "3"],
            "--capacity 3 cannot hold one chunk of --horizon 5 steps",
        ),
        "temperature 0": ([*start, "--temperature", "0", "--warmup-steps", "0"], "temperature"),
        "endless updates": (
            [*start, "--updates-per-step", "inf"],
            "--updates-per-step must be a finite number",
        ),
        "more than a whole batch": (
            [*start, "--demo-share", "1.5"],
            "--demo-share must be at most 1",
        ),
    }


MISTAKES = [
    "unknown task",
    "no such demonstrations",
    "truncated demonstrations",
    "foreign demonstrations",
    "no such checkpoint",
    "another robosuite",
    "another version",
    "other networks",
    "another task",
    "resume and evaluate",
    "resume another preset",
    "resume with other rewards",
    "damaged arguments",
    "a checkpoint of another stage",
    "evaluated by another simulator",
    "resume nothing",
    "resume with other networks",
    "resume beyond the episode's limit",
    "resume with another replay",
    "evaluate stage I",
    "a checkpoint for nothing",
    "no such device",
    "fewer than no threads",
    "a negative seed",
    "a seed of 20 digits",
    "no steps",
    "a run is there",
    "a run is there, before stage I",
    "unwritable folder",
    "no room for a chunk",
    "temperature 0",
    "endless updates",
    "more than a whole batch",
]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_sentence(
    name, demo_file, stage_one, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    commands = bad_commands(demo_file, stage_one, uninterrupted, tmp_path)
    assert list(commands) == MISTAKES
    argv, named = commands[name]
    before, arguments = (
        load_checkpoint(uninterrupted / "last.pt"),
        (uninterrupted / "args.json").read_text(),
    )
    argv = (
        argv
        if {"--resume", "--task", "--eval"} & {*argv}
        else [*ONLINE, "--run-dir", str(tmp_path / "new"), *argv]
    )
    with pytest.raises(UserError, match="(?s)" + named) as caught:
        train_online.main(argv)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "new").exists() and not (tmp_path / "runs").exists()
    same(load_checkpoint(uninterrupted / "last.pt"), before)
    assert (uninterrupted / "args.json").read_text() == arguments


def test_a_stage_one_of_other_settings_does_not_block_a_run(
    demo_file, stage_one, tmp_path, monkeypatch
):
    """Stage II trains its own beside it, in a folder that carries a digest of its settings."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stage_one, tmp_path / "runs/lift-bc-s0")
    before = load_checkpoint(stage_one)
    command = [*ONLINE, "--data", str(demo_file), "--online-steps", "2"]
    train_online.main([*command, "--pretrain-steps", "10", "--run-dir", "a", "--overwrite"])
    same(load_checkpoint("runs/lift-bc-s0"), before)
    (beside,) = Path("runs").glob("lift-bc-s0-*")
    assert load_checkpoint(beside)["step"] == 10
    stamp = (beside / "last.pt").stat().st_mtime_ns
    train_online.main([*command, "--pretrain-steps", "10", "--run-dir", "b"])  # found again
    assert (beside / "last.pt").stat().st_mtime_ns == stamp
    train_online.main([*command, "--checkpoint", str(beside), "--run-dir", "c"])


def changed_value(name, value):
    if name == "data":
        return "other.hdf5"
    if name == "normalize":
        return not value
    return 2 * value + 1


def test_the_folder_of_stage_one_is_that_of_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train_offline.Args()
    same_data = {"steps": 3}
    folder = train_offline.cloning_folder(args, "bc", same_data)
    assert folder == Path("runs/lift-bc-s0")
    folder.mkdir(parents=True)
    stored = dataclasses.asdict(args) | {"demonstrations": same_data}
    (folder / "args.json").write_text(json.dumps({"args": stored}))
    assert train_offline.cloning_folder(args, "bc", same_data) == folder
    others = set()
    for name in args.cloning_settings:
        value = getattr(args, name)
        changed = changed_value(name, value)
        other = dataclasses.replace(args, **{name: changed})
        others.add(train_offline.cloning_folder(other, "bc", same_data))
    others.add(train_offline.cloning_folder(args, "bc", {"steps": 4}))
    assert folder not in others and len(others) == len(args.cloning_settings) + 1


def test_stage_one_is_not_resumed_with_other_settings(stage_one, uninterrupted):
    for change in ("--hidden 33", "--batch-size 9", "--learning-rate 1", "--flow-steps 3"):
        with pytest.raises(UserError, match=f"was trained with another {change[2:6]}"):
            train_offline.main(["--resume", str(stage_one), *change.split()])
    with pytest.raises(UserError, match="method poco, not of method bc"):
        train_offline.main(["--eval", str(uninterrupted)])


def test_a_checkpoint_says_its_sizes(stage_one, uninterrupted):
    """load_policy needs no number typed in and acts like the delivered policy."""
    for path, weights in (
        (stage_one, load_checkpoint(stage_one)["policy"]),
        (uninterrupted / "best.pt", load_checkpoint(uninterrupted / "best.pt")["agent"]["actor"]),
    ):
        acting = train_online.load_policy(path)
        same(acting.policy.state_dict(), weights)
        obs = acting.policy.obs_mean.numpy()  # far from it the untrained policy saturates
        chunk = acting.act(obs)
        assert chunk.shape == (5, 7) and abs(chunk).max() <= 1
        assert not np.array_equal(chunk, acting.act(obs))  # a draw


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_online.py"), "--task", "lfit"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "lift" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_divergence_stops_the_run_and_the_last_good_checkpoint_stays(
    demo_file, stage_one, tmp_path
):
    folder = online(
        tmp_path / "run", demo_file, stage_one, "--online-steps", "4", "--save-every", "1"
    )
    with pytest.raises(UserError, match=f"step.*{folder}/last.pt is the last good checkpoint"):
        train_online.main(
            ["--resume", str(folder), "--online-steps", "40", "--online-learning-rate", "1e30"]
        )
    agent = load_checkpoint(folder)["agent"]
    assert all(
        torch.isfinite(value).all() for net in ("policy", "critic") for value in agent[net].values()
    )


def test_both_stages_from_the_command_line_with_task_as_the_only_needed_flag(tmp_path):
    """Makes its own demonstrations, runs stage I by itself, then stage II from the posterior, in
    two workers."""
    argv = [
        *ONLINE,
        "--task",
        "lift",
        "--pretrain-steps",
        "10",
        "--online-steps",
        "16",
        "--act",
        "posterior",
        "--workers",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_online.py"), *argv],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "MUJOCO_GL": "disable"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/lift-bc-s0/last.pt").exists() and (
        tmp_path / "runs/lift-poco-s0/curve.png"
    ).exists()
    assert (
        json.loads((tmp_path / "runs/lift-poco-s0/args.json").read_text())["args"]["act"]
        == "posterior"
    )


def test_demonstrations_that_have_changed_are_noticed(demo_file, stage_one, tmp_path):
    """The same name with other content: both stages say so instead of training on a mixture."""
    data = tmp_path / "lift.hdf5"
    shutil.copy(demo_file, data)
    bc = [*TOY, "--data", str(data), "--run-dir", str(tmp_path / "bc")]
    train_offline.main([*bc, "--pretrain-steps", "4"])
    online(tmp_path / "run", data, tmp_path / "bc", "--online-steps", "4")
    demos.collect("lift", 2, 4, data, progress=False)
    changed = "the demonstrations have changed, [0-9]+ steps of 2 episodes then, [0-9]+ of 2 now"
    with pytest.raises(UserError, match=changed):
        train_offline.main(["--resume", str(tmp_path / "bc"), "--pretrain-steps", "8"])
    with pytest.raises(UserError, match=changed):
        train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", "8"])


def test_a_run_from_scratch_needs_no_demonstration(tmp_path):
    """--demo-episodes 0: no stage I, and no update before the first chunk is complete."""
    flags = [*ONLINE, "--demo-episodes", "0", "--online-steps", "12", "--log-every", "1"]
    train_online.main([*flags, "--run-dir", str(tmp_path / "run")])
    state = load_checkpoint(tmp_path / "run")
    assert state["world"]["replay"]["demos"] == 0
    written = rows(tmp_path / "run/progress.csv")
    assert [int(row["updates"]) for row in written] == [0, 0, 0, 0, *range(1, 9)]
    with pytest.raises(UserError, match="stage I clones demonstrations"):
        train_offline.main([*TOY, "--demo-episodes", "0", "--run-dir", str(tmp_path / "bc")])
