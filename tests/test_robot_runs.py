"""The arm's loop and its runs on the simulated arm: faults, labels, take-overs, every exit, record -> train -> eval."""
import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import robot
from arms.episodes import Take, layout, load, merge, numbered, outcome, reach
from arms.keypad import ScriptedPad
from arms.learner import Background
from arms.senses import JOINTS, PERIOD, Pace, Senses
from arms.settings import open_arm, parse
from logbook import Interrupt, UserError, load_checkpoint, read_args
from robot import Rig

ROOT = Path(__file__).parent.parent
TOY = ("--preset cpu --task insert-usb --hidden 32 --layers 2 --flow-steps 2 --batch-size 16 --num-candidates 4 "
       "--pretrain-steps 20 --warmup-updates 25 --save-every 20 --device cpu").split()
pytestmark = pytest.mark.sim


def still(obs):
    """A policy that stays where it is, four steps at a time."""
    return np.tile(np.array([0, 0, 0, 0, 0, 0, -0.5], np.float32), (4, 1))


class Scene:
    """A rig on the simulated arm at full speed, with a script instead of a person; `at` maps steps to interventions."""

    def __init__(self, events=(), at=None, auto=False, limit=30, teleop=True):
        self.args = parse(["train", *TOY, "--no-realtime", "--episode-limit", str(limit)], "")
        self.arm, operator = open_arm(self.args)
        senses = Senses(self.arm, self.arm.kinematics, Pace(False))
        self.keypad, self.sent, self.at = ScriptedPad(events), [], at or {}
        self.rig = Rig(self.args, self.arm, senses, self.keypad, operator if teleop else None, Interrupt(), auto)
        send, self.arm.send_action = self.arm.send_action, self.count
        self._send = send
        self.task = layout("insert-usb", senses.sizes)

    def count(self, action):
        step = len(self.sent)
        self.sent.append([action[name] for name in JOINTS])
        if step in self.at:
            self.at[step](self)
        return self._send(action)


def test_a_frozen_arm_holds_is_reported_and_leaves_no_hole_in_the_data(tmp_path, capfd):
    scene = Scene(at={8: lambda s: s.arm.freeze_state(), 14: lambda s: s.arm.freeze_state(False)}, limit=20)
    asked = []
    with scene.rig as rig:
        take = rig.episode(lambda obs: asked.append(len(scene.sent)) or still(obs) + 0.3, 0)
    assert "HOLDING: the arm is silent or frozen" in capfd.readouterr().err
    assert take.dropped >= 5 and take.steps == 20 and len(take.pieces) == 2
    assert np.ptp(scene.sent[10:15], axis=0).max() == 0                          # it held
    assert asked[:4] == [0, 4, 8, 15]                                            # then a new chunk, not what was left
    assert take.save(tmp_path / "episode_00000.hdf5", scene.task, False)
    rows = load([tmp_path / "episode_00000.hdf5"], scene.task)
    assert rows["truncated"].sum() == 2 and not rows["terminated"].any()
    joined = ~rows["truncated"].astype(bool)[:-1]                                # within a piece steps join exactly
    np.testing.assert_array_equal(rows["next_obs"][:-1][joined], rows["obs"][1:][joined])


def test_a_success_after_a_hole_is_not_put_on_the_step_before_it(tmp_path):
    obs, action = np.zeros(20), np.zeros(7)
    take = Take(obs)
    take.add(action, action, obs)
    take.drop(obs)
    take.save(tmp_path / "one.hdf5", layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9, "object": 4}), True)
    with h5py.File(tmp_path / "one.hdf5") as file:
        assert list(file["data"]) == ["demo_0"] and file["data/demo_0/rewards"][:].tolist() == [0]


def test_an_unplugged_arm_ends_the_session_in_one_line_and_is_left_holding(capfd):
    scene = Scene(at={5: lambda s: s.arm.unplug()})
    with pytest.raises(UserError, match="unplugged.*five seconds.*cables"), scene.rig as rig:
        rig.episode(still, 0)
    assert "HOLDING" in (err := capfd.readouterr().err) and "holds where it is" in err and not scene.arm.is_connected


def test_without_its_keypad_the_arm_stays_where_it_is(capfd):
    scene = Scene(at={5: lambda s: setattr(s.keypad, "gone", True)})
    with pytest.raises(UserError, match="keypad is gone"), scene.rig as rig:
        rig.episode(still, 0)
    assert len(scene.sent) == 7 and "holds where it is" in capfd.readouterr().err   # one hold, no way to rest


def test_every_ordinary_exit_goes_slowly_to_rest():
    scene = Scene(["quit"])
    with scene.rig as rig:
        assert rig.episode(still, 0).outcome == "quit"
    speed = np.abs(np.diff(scene.sent, axis=0)).max() / PERIOD
    assert speed <= np.radians(90) / 4 + 1e-6 and np.allclose(scene.sent[-1], scene.arm.rest, atol=1e-3)


def test_an_exception_holds_then_rests_and_stop_only_holds():
    scene = Scene()
    with pytest.raises(ZeroDivisionError), scene.rig as rig:
        rig.episode(lambda obs: 1 / 0, 0)
    assert np.allclose(scene.sent[-1], scene.arm.rest, atol=1e-3)
    scene = Scene([None, None, "stop"])
    with scene.rig as rig:
        assert rig.episode(still, 0).outcome == "stop"
    assert len(scene.sent) == 3


@pytest.mark.parametrize("events, expected, reward", [
    ([None] * 4 + ["success"], "success", 1), ([None] * 4 + ["fail"], "fail", 0),
    ([None] * 12, "timeout", 0), ([None] * 12 + ["success"], "success", 1)])
def test_labels(events, expected, reward, tmp_path):
    """Success terminates with reward 1, a failure with 0; running out of time truncates; who forgot is asked once."""
    scene = Scene(events, limit=12)
    with scene.rig as rig:
        take = rig.episode(still, 0)
    take.save(tmp_path / "episode_00000.hdf5", scene.task, take.outcome == "success")
    rows = load([tmp_path / "episode_00000.hdf5"], scene.task)
    assert take.outcome == expected == outcome(tmp_path / "episode_00000.hdf5")
    assert rows["reward"].sum() == reward and rows["terminated"].sum() == (expected != "timeout")
    assert rows["truncated"].sum() == (expected == "timeout")


def test_a_take_over_is_smooth_flagged_and_forgets_the_rest_of_the_chunk(tmp_path):
    scene, chunks = Scene([None] * 6 + ["pause"] + [None] * 9 + ["pause"], limit=20), []
    with scene.rig as rig:
        take = rig.episode(lambda obs: chunks.append(len(scene.sent)) or still(obs), 3)
    flags = np.array(take.pieces[0]["intervention"])
    assert flags.tolist() == [0] * 6 + [1] * 10 + [0] * 4
    assert chunks == [0, 4, 16]                                                  # at 16 a new one
    asked = np.abs(np.array(take.pieces[0]["requested"])[6:16, :6]).max(1)
    assert (asked <= (np.arange(10) + 1) * PERIOD + 1e-6).all() and asked[-1] > 0.1
    take.save(tmp_path / "episode_00000.hdf5", scene.task, False)
    with h5py.File(tmp_path / "episode_00000.hdf5") as file:
        assert file["data/demo_0/intervention"][:].sum() == 10 and file["data/demo_0/requested"].shape == (20, 7)


def test_pausing_without_an_operator_holds_and_records_nothing():
    scene = Scene([None] * 5 + ["pause"] + [None] * 7 + ["pause"], limit=10, teleop=False)
    with scene.rig as rig:
        take = rig.episode(lambda obs: still(obs) + 0.2, 0)
    assert [len(piece["action"]) for piece in take.pieces] == [5, 5]
    assert np.ptp(scene.sent[5:13], axis=0).max() == 0


class Camera:
    """A driver whose picture freezes after `frames` reads."""

    observation_features = dict.fromkeys((*JOINTS, "gripper.pos", "stamp"), float) | {"front": (64, 64, 3)}

    def __init__(self, frames):
        self.frames, self.reads = frames, 0

    def get_observation(self):
        self.reads += 1
        picture = np.full((64, 64, 3), min(self.reads, self.frames), np.uint8)
        return dict.fromkeys(JOINTS, 0.1) | {"gripper.pos": 0.0, "stamp": float(self.reads), "front": picture}


def test_a_frozen_camera_is_stale_after_200_ms_even_without_a_stamp():
    from arms.kinematics import Kinematics
    pace = Pace(False)
    senses, driver, fresh = Senses(camera := Camera(5), Kinematics(), pace), camera, []
    assert senses.sizes["front"] > 100
    for _ in range(10):
        fresh.append(senses.read(driver) is not None)
        pace.wait()
    assert fresh == [True] * 8 + [False] * 2 and "camera front" in senses.fault


# ---- runs

@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demos"
    robot.main(["record", *TOY, "--no-realtime", "--episodes", "3", "--data", str(folder)])
    return folder


def train(folder, recorded, *more):
    robot.main(["train", *TOY, "--data", str(recorded), "--run-dir", str(folder), "--no-realtime", "--episode-limit",
                "15", *more])


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
        sizes = {key: file[f"data/demo_0/obs/{key}"].shape[1] for key in ("joints", "gripper", "eef", "object")}
    each, all_of_them = load(files, layout("insert-usb", sizes)), load([recorded.with_suffix(".hdf5")],
                                                                      layout("insert-usb", sizes))
    assert len(files) == 3 and each["terminated"].sum() == 3
    np.testing.assert_array_equal(each["obs"], all_of_them["obs"])
    low, high = reach(files)
    assert (high > low).all() and (np.abs(each["action"]) <= 1).all()


def test_the_whole_path_learns_logs_and_evaluates_what_was_trained(trained, recorded, capsys):
    rows = rows_of(trained)
    assert len(rows) == 4 and int(rows[-1]["updates"]) == int(rows[-1]["step"]) > 25
    assert float(rows[-1]["critic"]) > 0 and float(rows[-1]["ess"]) > 0 and (trained / "curve.png").exists()
    result = robot.main(["eval", "--run-dir", str(trained), "--episodes", "2"])
    assert len(result) == 2 and len((trained / "eval.csv").read_text().splitlines()) == 3
    assert {row["step"] for row in csv.DictReader(open(trained / "eval.csv"))} == {rows[-1]["step"]}     # of the curve
    assert robot.main(["eval", "--run-dir", str(trained), "--episodes", "2"]) == result
    for flag in ("--run-dir", "--run_dir"):                                        # both spellings take its settings
        assert parse(["eval", flag, str(trained)], "").hidden == 32
    assert "policy " in capsys.readouterr().out


def test_a_learner_that_diverges_is_one_line_and_the_arm_goes_to_rest(recorded, tmp_path, monkeypatch, capfd):
    step = robot.Learner.update

    def diverge(learner):
        learner.target.out.bias.data.fill_(np.nan)
        step(learner)
    monkeypatch.setattr(robot.Learner, "update", diverge)
    with pytest.raises(UserError, match="learner.critic.* became non-finite.*last.pt is the last good"):
        train(tmp_path / "run", recorded, "--episodes", "3", "--warmup-updates", "0")
    assert "ValueError: the arm holds, then goes to rest" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "run")["updates"] == 0                         # of stage I


def test_a_run_killed_between_episodes_continues_bitwise(trained, recorded, tmp_path):
    """4 episodes == 2 + resume + 1 + kill + resume + 1, where the checkpoint is older than the last episode."""
    train(tmp_path / "run", recorded, "--episodes", "2")
    old = (tmp_path / "run" / "last.pt").read_bytes()
    train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "3")
    (tmp_path / "run" / "last.pt").write_bytes(old)
    (tmp_path / "run" / "episodes" / ".episode_00002.hdf5.1.part").write_bytes(b"torn")       # what a kill leaves
    train(tmp_path / "run", recorded, "--resume", str(tmp_path / "run"), "--episodes", "4")
    one, other = (load_checkpoint(folder / "last.pt") for folder in (trained, tmp_path / "run"))
    for name in ("policy", "actor", "critic", "target"):
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name]), name
    assert [row["step"] for row in rows_of(trained)] == [row["step"] for row in rows_of(tmp_path / "run")]


def start(*command):
    return subprocess.Popen([sys.executable, str(ROOT / "robot.py"), *command], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"'{text}' never came")


def test_kill_9_while_recording_loses_at_most_the_running_episode(tmp_path):
    process = start("record", *TOY, "--no-realtime", "--episodes", "1000", "--data", str(tmp_path / "demos"))
    until(process, "2 of 1000")
    process.kill()
    process.wait()
    assert len(files := numbered(tmp_path / "demos")) >= 2
    merge(files, tmp_path / "all.hdf5")                                          # every one of them is whole


def test_sigterm_holds_goes_to_rest_and_exits_with_0(tmp_path):
    process = start("record", *TOY, "--episodes", "1000", "--data", str(tmp_path / "demos"))
    until(process, "box")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Traceback" not in output and "did not go to rest" not in output


def test_a_resumed_run_learns_at_the_rates_it_is_given(trained, recorded, tmp_path):
    train(tmp_path / "run", recorded, "--episodes", "1")
    robot.main(["train", "--resume", str(tmp_path / "run"), "--episodes", "2", "--online-learning-rate", "1e-7"])
    state, args = load_checkpoint(tmp_path / "run"), read_args(tmp_path / "run")
    assert state["actor_optimizer"]["param_groups"][0]["lr"] == 1e-7 == args["online_learning_rate"]
    assert state["critic_optimizer"]["param_groups"][0]["lr"] != 1e-7 and state["seen"] == state["updates"] > 0


def test_a_device_is_asked_for_where_the_learning_is_done():
    assert parse(["train", "--device", "cuda", "--learner", "127.0.0.1:6379"], "").device == "cuda"
    assert parse(["record", "--device", "cuda"], "").device == "cuda"


class Mortal(Background):
    """Is killed after its second episode, once it has learnt; on a busy machine later, once the loop kept its pace."""

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
    """In real time: updates happen in another process, the period is logged; a dead learner ends the run by name."""
    monkeypatch.setattr(robot, "Background", Mortal)
    command = ["train", *TOY, "--data", str(recorded), "--run-dir", str(tmp_path / "run"), "--episode-limit", "15"]
    learners, wait = [], Mortal.wait
    monkeypatch.setattr(Mortal, "wait", lambda self: learners.append(self) or wait(self))
    with pytest.raises(UserError, match="learner process has died.*--resume"):
        robot.main([*command, "--episodes", "40"])
    rows = rows_of(tmp_path / "run")
    assert 50 < float(rows[-1]["period_p50"]) < 90 and float(rows[-1]["period_p99"]) > 0
    assert int(rows[0]["version"]) >= 1 and learners[0].stats["updates"] > 0
    assert len(numbered(tmp_path / "run" / "episodes")) == len(rows) + 1         # the last is on disk all the same


@pytest.mark.parametrize("command, found", [
    (["train", "--task", "sorting"], "pick-cube"), (["train", "--no-realtime", "--robot", "piper"], "cannot wait"),
    (["record", "--max-step", "0"], "greater than 0"), (["record", "--robot", "nothing"], "unknown arm"),
    (["train", "--data", "/nowhere", "--no-realtime"], "robot.py record"), (["record", "--options", "x"], "NAME=VALUE"),
    (["train", "--teleop", "no.module:Class"], "--teleop"), (["eval", "--run-dir", "/nowhere"], "run folder")])
def test_a_mistake_is_one_line(command, found):
    with pytest.raises(UserError, match=found):
        robot.main(command)
