"""Whole runs on the simulated arm: record, train, eval; kills, resumes, signals, a learner beside.

python -m pytest tests/robot/test_session.py
"""

import csv
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from robot_toys import ROOT, SIZES, TOY

import robot
from arms.background import BackgroundLearner
from arms.episodes import (
    Episode,
    layout,
    length,
    load,
    merge,
    next_file,
    numbered,
    outcome,
    refuse_loss,
    workspace_of,
)
from arms.settings import parse_args
from logbook import UserError, load_checkpoint, read_args

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demos"
    robot.main(["record", *TOY, "--episodes", "3", "--data", str(folder)])
    return folder


def train(folder, recorded, *more):
    where = ["--data", str(recorded), "--run-dir", str(folder)]
    robot.main(["train", *TOY, *where, "--episode-limit", "15", *more])


@pytest.fixture(scope="module")
def trained(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, recorded, "--episodes", "4")
    return folder


def rows_of(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_recording_writes_one_file_per_success_and_one_of_all(recorded):
    files = numbered(recorded)
    with h5py.File(files[0]) as file:
        sizes = {
            key: file[f"data/demo_0/obs/{key}"].shape[1]
            for key in ("joints", "gripper", "eef", "object")
        }
    each, all_of_them = (
        load(files, layout("insert-usb", sizes)),
        load([recorded.with_suffix(".hdf5")], layout("insert-usb", sizes)),
    )
    assert len(files) == 3 and each["terminated"].sum() == 3
    np.testing.assert_array_equal(each["obs"], all_of_them["obs"])
    low, high = workspace_of(files)
    assert (high > low).all() and (np.abs(each["action"]) <= 1).all()


def test_the_whole_path_learns_logs_and_evaluates_what_was_trained(trained, recorded, capsys):
    rows = rows_of(trained)
    assert len(rows) == 4 and int(rows[-1]["updates"]) == int(rows[-1]["step"]) > 25
    assert (
        float(rows[-1]["critic"]) > 0
        and float(rows[-1]["ess"]) > 0
        and (trained / "curve.png").exists()
    )
    result = robot.main(["eval", "--run-dir", str(trained), "--episodes", "2"])
    assert len(result) == 2 and len((trained / "eval.csv").read_text().splitlines()) == 3
    with open(trained / "eval.csv", newline="") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {rows[-1]["step"]}  # of the curve
    assert robot.main(["eval", "--run-dir", str(trained), "--episodes", "2"]) == result
    for flag in ("--run-dir", "--run_dir"):  # both spellings take its settings
        assert parse_args(["eval", flag, str(trained)]).hidden == 32
    assert "policy " in capsys.readouterr().out


def test_a_learner_that_diverges_is_one_line_and_the_arm_goes_to_rest(
    recorded, tmp_path, monkeypatch, capfd
):
    step = robot.Learner.update

    def diverge(learner):
        learner.agent.target.out.bias.data.fill_(np.nan)
        step(learner)

    monkeypatch.setattr(robot.Learner, "update", diverge)
    with pytest.raises(
        UserError, match="learner.critic.* became non-finite.*last.pt is the last good"
    ):
        train(tmp_path / "run", recorded, "--episodes", "3", "--warmup-steps", "0")
    assert "ValueError: the arm holds, then goes to rest" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "run")["updates"] == 0  # of stage I


def test_a_run_killed_between_episodes_continues_bitwise(trained, recorded, tmp_path):
    """4 episodes == 2 + resume + 1 + kill + resume + 1, where the checkpoint is older than the
    last episode.
    """
    train(tmp_path / "run", recorded, "--episodes", "2")
    old = (tmp_path / "run" / "last.pt").read_bytes()
    train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "3")
    (tmp_path / "run" / "last.pt").write_bytes(old)
    (tmp_path / "run" / "episodes" / ".episode_00002.hdf5.1.part").write_bytes(
        b"torn"
    )  # what a kill leaves
    train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "4")
    one, other = (load_checkpoint(folder / "last.pt") for folder in (trained, tmp_path / "run"))
    for name in ("policy", "actor", "critic", "target"):
        mine, theirs = one["agent"][name], other["agent"][name]
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert [row["step"] for row in rows_of(trained)] == [
        row["step"] for row in rows_of(tmp_path / "run")
    ]


def test_rows_that_a_kill_has_cost_are_written_on_resume(trained, recorded, tmp_path):
    """The process dies between an episode's file and its row: here three times in a row."""
    train(tmp_path / "run", recorded, "--episodes", "3")
    table = tmp_path / "run" / "progress.csv"
    whole = table.read_text().splitlines(keepends=True)
    state = (tmp_path / "run" / "last.pt").read_bytes()
    for kept in (3, 2, 1):  # the header and so many rows less one
        table.write_text("".join(whole[:kept]))
        (tmp_path / "run" / "last.pt").write_bytes(state)
        train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "3")
        rows = rows_of(tmp_path / "run")
        names = ("step", "success", "reward", "length")
        wanted = [[row[name] for name in names] for row in rows_of(trained)[:3]]
        assert [[row[name] for name in names] for row in rows] == wanted


def test_a_row_written_on_resume_has_what_its_updates_say(trained, recorded, tmp_path):
    """Where the checkpoint is older than the episode, its updates are done again and reported."""
    train(tmp_path / "run", recorded, "--episodes", "1")
    old = (tmp_path / "run" / "last.pt").read_bytes()
    train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "2")
    table = tmp_path / "run" / "progress.csv"
    whole = table.read_text().splitlines(keepends=True)
    table.write_text("".join(whole[:2]))
    (tmp_path / "run" / "last.pt").write_bytes(old)
    train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "2")
    for name in ("step", "updates", "critic", "q_data"):
        assert rows_of(tmp_path / "run")[1][name] == rows_of(trained)[1][name], name


def start(*command):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "robot.py"), *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"'{text}' never came")


def test_kill_9_while_recording_loses_at_most_the_running_episode(tmp_path):
    process = start("record", *TOY, "--episodes", "1000", "--data", str(tmp_path / "demos"))
    until(process, "2 of 1000")
    process.kill()
    process.wait()
    assert len(files := numbered(tmp_path / "demos")) >= 2
    merge(files, tmp_path / "all.hdf5")  # every one of them is whole


def test_sigterm_holds_goes_to_rest_and_exits_with_0(tmp_path):
    process = start("record", *SIZES, "--episodes", "1000", "--data", str(tmp_path / "demos"))
    until(process, "box")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 0 and "Traceback" not in output and "did not go to rest" not in output
    )


def test_a_resumed_run_learns_at_the_rates_it_is_given(trained, recorded, tmp_path):
    train(tmp_path / "run", recorded, "--episodes", "1")
    robot.main(
        [
            "train",
            "--resume",
            str(tmp_path / "run"),
            "--episodes",
            "2",
            "--online-learning-rate",
            "1e-7",
        ]
    )
    state, args = load_checkpoint(tmp_path / "run"), read_args(tmp_path / "run")
    assert (
        state["agent"]["actor_optimizer"]["param_groups"][0]["lr"]
        == 1e-7
        == args["online_learning_rate"]
    )
    assert (
        state["agent"]["critic_optimizer"]["param_groups"][0]["lr"] != 1e-7
        and state["seen"] == state["updates"] > 0
    )


def test_a_device_is_asked_for_where_the_learning_is_done():
    assert parse_args(["train", "--device", "cuda", "--learner", "127.0.0.1:6379"]).device == "cuda"
    assert parse_args(["record", "--device", "cuda"]).device == "cuda"


class Mortal(BackgroundLearner):
    """Is killed after its second episode, once it has learnt; on a busy machine later, once the
    loop kept its pace.
    """

    def absorb(self, path):
        super().absorb(path)
        rows = rows_of(path.parent.parent)
        if rows and (50 < float(rows[-1]["period_p50"]) < 90 or len(rows) == 30):
            end = time.monotonic() + 600
            while not self.report().get("updates") and time.monotonic() < end:
                time.sleep(0.05)
            self.process.kill()
            self.process.join()


def test_the_learner_works_in_the_background_and_its_death_is_told(recorded, tmp_path, monkeypatch):
    """In real time: updates happen in another process, the period is logged; a dead learner ends
    the run by name.
    """
    monkeypatch.setattr(robot, "BackgroundLearner", Mortal)
    command = [
        "train",
        *SIZES,
        "--data",
        str(recorded),
        "--run-dir",
        str(tmp_path / "run"),
        "--episode-limit",
        "15",
    ]
    learners, wait = [], Mortal.wait
    monkeypatch.setattr(
        Mortal, "wait", lambda self, *seen: learners.append(self) or wait(self, *seen)
    )
    with pytest.raises(UserError, match="learner process has died.*--resume"):
        robot.main([*command, "--episodes", "40"])
    rows = rows_of(tmp_path / "run")
    assert 50 < float(rows[-1]["period_p50"]) < 90 and float(rows[-1]["period_p99"]) > 0
    assert int(rows[0]["version"]) >= 1 and learners[0].stats["updates"] > 0
    assert (
        len(numbered(tmp_path / "run" / "episodes")) == len(rows) + 1
    )  # the last is on disk all the same


@pytest.mark.parametrize(
    "command, found",
    [
        (["train", "--task", "sorting"], "pick-cube"),
        (["train", "--no-realtime", "--robot", "piper"], "cannot wait"),
        (["record", "--max-step", "0"], "greater than 0"),
        (["record", "--robot", "nothing"], "unknown arm"),
        (["train", "--data", "/nowhere", "--no-realtime"], "robot.py record"),
        (["record", "--options", "x"], "NAME=VALUE"),
        (["train", "--teleop", "no.module:Class"], "--teleop"),
        (["eval", "--run-dir", "/nowhere"], "run folder"),
    ],
)
def test_a_mistake_is_one_line(command, found):
    with pytest.raises(UserError, match=found):
        robot.main(command)


# ---- files of episodes


def test_episodes_of_a_real_arm_are_never_overwritten(tmp_path):
    (tmp_path / "episodes").mkdir()
    file = tmp_path / "episodes" / "episode_00000.hdf5"
    file.write_bytes(b"an afternoon")
    with pytest.raises(
        UserError, match="1 episodes played on piper.*move the folder away.*--resume"
    ):
        refuse_loss(tmp_path, "piper")
    refuse_loss(tmp_path, "sim")
    refuse_loss(tmp_path / "none", "piper")
    (tmp_path / "args.json").write_text('{"args": {"robot": "piper"}}')  # whoever asks
    with pytest.raises(UserError, match="1 episodes played on piper.*move the folder away"):
        refuse_loss(tmp_path, "sim")
    assert file.read_bytes() == b"an afternoon"


def test_train_refuses_before_it_writes_anything(tmp_path, monkeypatch):
    """--overwrite on another arm: here the simulated one by the name that anybody's driver has."""
    robot.main(["record", *TOY, "--episodes", "1", "--data", str(tmp_path / "demos")])
    command = [
        "train",
        *TOY[:-1],
        "--robot",
        "arms.sim:SimArm",
        "--keypad",
        "none",
        "--data",
        str(tmp_path / "demos"),
        "--run-dir",
        str(tmp_path / "run"),
        "--overwrite",
    ]
    episode = tmp_path / "run" / "episodes" / "episode_00000.hdf5"
    episode.parent.mkdir(parents=True)
    episode.write_bytes((tmp_path / "demos" / "episode_00000.hdf5").read_bytes())
    with pytest.raises(UserError, match="move the folder away"):
        robot.main(command)
    assert episode.exists() and not (tmp_path / "run" / "args.json").exists()


def test_episodes_are_numbered_after_the_last_one_and_others_files_are_left_alone(tmp_path):
    assert next_file(tmp_path) == (0, tmp_path / "episode_00000.hdf5")
    for name in (
        "episode_00000.hdf5",
        "episode_00003.hdf5",
        "episode_bad.hdf5",
        "episode_00001.hdf5",
    ):
        (tmp_path / name).touch()
    assert [path.name[8:13] for path in numbered(tmp_path)] == ["00000", "00001", "00003"]
    assert next_file(tmp_path) == (4, tmp_path / "episode_00004.hdf5")


@pytest.mark.parametrize(
    "read",
    [
        outcome,
        length,
        lambda path: merge([path], path.parent / "all.hdf5"),
        lambda path: workspace_of([path]),
    ],
)
def test_a_torn_episode_is_named(tmp_path, read):
    torn = tmp_path / "episode_00000.hdf5"
    torn.write_bytes(b"half of an afternoon")
    with pytest.raises(UserError, match="episode_00000.hdf5 is damaged"):
        read(torn)


# ---- failure and running out of time


@pytest.mark.parametrize(
    "outcome, terminated, truncated, reward",
    [("success", 1, 0, 1), ("fail", 1, 0, 0), ("timeout", 0, 1, 0)],
)
def test_a_failure_is_terminal_without_reward_and_running_out_of_time_is_not(
    tmp_path, outcome, terminated, truncated, reward
):
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
    take, obs, action = Episode(np.zeros(16)), np.zeros(16), np.zeros(7)
    for step in range(5):
        take.add(action, action, obs)
        if step == 2:
            take.drop(obs)
    take.outcome = outcome
    take.save(tmp_path / "one.hdf5", task, outcome == "success")
    rows = load([tmp_path / "one.hdf5"], task)
    assert rows["terminated"].tolist() == [0, 0, 0, 0, terminated]  # never at the hole
    assert rows["truncated"].tolist() == [0, 0, 1, 0, truncated] and rows["reward"].tolist() == [
        0,
        0,
        0,
        0,
        reward,
    ]
    with h5py.File(tmp_path / "one.hdf5") as file:
        assert file["data/demo_1/dones"][:].tolist() == [0, terminated]
        assert (
            file["data/demo_0/dones"][:].tolist() == [0, 0, 0]
            and "failed" not in file["data/demo_0"].attrs
        )


def test_a_failure_before_a_hole_at_the_end_is_not_put_on_the_step_before_it(tmp_path):
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
    take = Episode(np.zeros(16))
    take.add(np.zeros(7), np.zeros(7), np.zeros(16))
    take.drop(np.zeros(16))
    take.outcome = "fail"
    take.save(tmp_path / "one.hdf5", task, False)
    rows = load([tmp_path / "one.hdf5"], task)
    assert not rows["terminated"].any() and rows["truncated"].tolist() == [1]


# ---- pictures


def test_record_train_eval_from_pictures(tmp_path):
    """At toy size. Needs OpenGL, which the other tests switch off: so in processes of their own."""
    environment = os.environ | {"MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT)}

    def python(*command):
        return subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
        )

    if python("-c", "from arms.sim import can_draw; assert can_draw()").returncode:
        pytest.skip("OpenGL does not work here (MUJOCO_GL=egl)")
    code = "import sys, robot\nfor line in sys.argv[1:]: robot.main(line.split())"
    where = f"--data {tmp_path}/demos --run-dir {tmp_path}/run"
    toy = " ".join(TOY) + " --observe vision --options size=64 " + where
    result = python(
        "-c",
        code,
        f"record {toy} --episodes 1",
        f"train {toy} --episodes 2 --episode-limit 15",
        f"eval --run-dir {tmp_path}/run --episodes 1 --episode-limit 5",
    )
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "run" / "episodes" / "episode_00000.hdf5") as file:
        seen = file["data/demo_0/obs"]
        assert sorted(seen) == [
            "eef",
            "front",
            "gripper",
            "joints",
            "wrist",
        ]  # no pose from the simulator
        assert seen["front"].shape[1] == 512 and np.ptp(seen["wrist"][:], axis=0).max() > 0
    assert "success" in result.stdout and (tmp_path / "run" / "eval.csv").exists()
