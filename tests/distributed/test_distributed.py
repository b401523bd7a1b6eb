"""The training script with rollout workers, and what it refuses; Ray's addresses and its hub.

    python -m pytest tests/distributed/test_distributed.py

Not here: the workers themselves (test_rollouts.py), a cluster (test_distributed_ray.py), an arm's
learner on another machine (test_distributed_arm.py).
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import demos
import train_online
from distributed import cluster
from logbook import UserError, load_checkpoint

ROOT = Path(__file__).parent.parent.parent


# ---- the training script

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
    "15",
    "--workers",
    "1",
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--threads",
    "1",
    "--eval-episodes",
    "1",
    "--demo-episodes",
    "2",
    "--pretrain-steps",
    "2",
    "--num-candidates",
    "4",
    "--warmup-steps",
    "8",
    "--final-episodes",
    "1",
    "--eval-every",
    "1000",
    "--log-every",
    "10",
    "--save-every",
    "10",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "lift.hdf5"
    return demos.collect("lift", 2, 3, path, progress=False)


def begin(tmp_path, recorded, *flags):
    """Start a run with one worker, and wait until it has saved."""
    command = [sys.executable, str(ROOT / "train_online.py"), *TOY, *flags]
    command += ["--data", str(recorded), "--run-dir", str(tmp_path / "run"), "--rollouts", "1"]
    command += ["--setting", "online", "--online-steps", "100000"]
    process = subprocess.Popen(
        command,
        text=True,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while process.poll() is None and not (tmp_path / "run/last.pt").exists():
        time.sleep(0.1)
    return process


def nobody_left(process):
    """Every process of its group has ended, or does so soon."""
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.sim
def test_a_worker_costs_no_update_and_ctrl_c_leaves_nobody_and_a_run_that_resumes(
    tmp_path, recorded
):
    """Ctrl-C at the whole process group: exit code 0, and the resumed run counts on."""
    process = begin(tmp_path, recorded, "--act", "posterior", "--updates-per-step", "2")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "--resume" in output and "Traceback" not in errors and nobody_left(process)
    step = load_checkpoint(tmp_path / "run/last.pt")["world"]["steps"]
    train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", str(step + 23)])
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["world"]["steps"] == step + 23
    assert state["report"]["updates"] == 2 * (step + 23)
    replay = state["world"]["replay"]
    ends = torch.maximum(replay["data"]["terminated"], replay["data"]["truncated"])
    ended = int(ends[replay["demos"] :].sum())
    assert state["world"]["episodes"] == ended >= (step + 23) // 15
    with pytest.raises(UserError, match="--rollouts 0"):
        train_online.main(["--resume", str(tmp_path / "run"), "--rollouts", "0"])


@pytest.mark.sim
def test_a_run_whose_worker_stands_still_is_saved_when_it_is_asked_to_end(tmp_path, recorded):
    """SIGTERM, as a cluster sends it, while the learner waits for a stopped process."""
    process = begin(tmp_path, recorded)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGSTOP)
    time.sleep(3)  # what the worker had played is learnt from by now
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "saved at step" in output and "Traceback" not in errors and nobody_left(process)
    step = load_checkpoint(tmp_path / "run/last.pt")["world"]["steps"]
    train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", str(step + 5)])
    assert load_checkpoint(tmp_path / "run/last.pt")["world"]["steps"] == step + 5


@pytest.mark.parametrize(
    "command, found",
    [(["--ray", "local"], "--rollouts N"), (["--rollouts", "-1"], "at least 0")],
)
def test_a_mistake_is_one_line(command, found):
    with pytest.raises(UserError, match=found):
        train_online.main([*TOY, "--task", "lift", *command])


@pytest.mark.parametrize(
    "method, flags, found",
    [
        ("dppo", [], "no --rollouts"),
        ("reinflow", [], "no --rollouts"),
        ("dsrl", ["--variant", "dsrl-sac"], "learns from the noise"),
        ("dsrl", ["--setting", "online"], "it needs stage I"),
        ("ogpo", ["--group", "1"], "at least 2 chains"),
    ],
)
def test_methods_refuse_what_they_cannot_do_before_anything_runs(tmp_path, method, flags, found):
    folders = ["--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "none.hdf5")]
    with pytest.raises(UserError, match=found):
        importlib.import_module(f"baselines.{method}").main(
            ["--preset", "cpu", *flags, "--rollouts", "1", *folders]
        )


# ---- Ray


def test_without_ray_installed_it_is_one_line_and_nothing_else_misses_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray==2.60.0"):
        cluster.connect("127.0.0.1:1")
    code = (
        "import sys, train_online, robot, distributed.cluster, distributed.arm; "
        "assert 'ray' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "address", ["10.0.0.2:6379", "ray://gpu.lab:10001", "127.evil.com:6379", "auto"]
)
def test_another_machine_without_a_token_is_refused(address, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        cluster.connect(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # but which?
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN"):
        cluster.connect(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        cluster.connect(address)


def test_this_machine_is_told_from_others():
    here = ("127.0.0.1", "127.0.0.1:6379", "localhost", "localhost:6379", "::1", "[::1]:6379")
    others = ("", "10.0.0.2", "127.evil.com", "localhost.evil.com:1")
    assert all(cluster.loopback(address) for address in (*here, "ray://127.0.1.1:10001"))
    assert not any(cluster.loopback(address) for address in others)


def test_the_hub_hands_out_newer_weights_only_and_every_episode_once():
    hub = cluster.hub_class()(2)
    assert hub.pull(0, 1) == (0, None, 0)
    hub.publish(1, ["one"], [5, 6])
    hub.publish(1, None, [7, 8])  # only the notes are new
    assert hub.pull(0, 1) == (1, ["one"], 8) and hub.pull(1, 0) == (1, None, 7)
    hub.push(0, "a")
    hub.push(1, "b")
    assert hub.take() == [(0, "a"), (1, "b")] and hub.take() == []
    hub.pull(1, 0, sender=(0, 2), signs=9)
    hub.push((0, 2), "c")
    items, signs = hub.arrivals()
    assert items == [((0, 2), "c")] and signs[0, 2] == 9 and hub.take() == []
