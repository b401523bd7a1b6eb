"""What must not go wrong silently on an arm: a start outside the box, lost recordings, a starved learner, a failure."""
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import robot
from arms.episodes import Take, layout, load, refuse_loss
from arms.keypad import ScriptedPad
from arms.learner import STARVED, Acting, Background, networks
from arms.senses import JOINTS, PERIOD, Pace, Senses
from arms.settings import open_arm, parse
from logbook import Interrupt, UserError

ROOT = Path(__file__).parent.parent
TOY = ("--preset cpu --task insert-usb --hidden 32 --layers 2 --flow-steps 2 --batch-size 16 --num-candidates 4 "
       "--pretrain-steps 20 --warmup-updates 25 --save-every 20 --device cpu --no-realtime").split()
ASIDE = "--box-center 36 3 -2 --box-size 8 8 8".split()                     # cm; the tool starts at 30, 0, 1


@pytest.mark.parametrize("flags", ("--updates-per-step inf", "--updates-per-step nan", "--heads 0", "--leash -1",
                                   "--learning-rate 0"))
def test_settings_that_could_only_fail_later_are_refused(flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]} must be a number greater than 0, got {flags.split()[1]}"):
        parse(["train", *TOY, *flags.split()], "")


# ---- a start outside the box

def rig(*flags, shift=0.0):
    """A rig on the simulated arm, whose encoders may be wrong by `shift` rad, and what it was sent."""
    args = parse(["train", *TOY, *ASIDE, *flags], "")
    arm, teleop = open_arm(args)
    sent, send, get = [], arm.send_action, arm.get_observation
    arm.send_action = lambda action: sent.append([action[name] for name in JOINTS]) or send(action)
    arm.get_observation = lambda: {name: value + shift * (name == JOINTS[4]) for name, value in get().items()}
    senses = Senses(arm, arm.kinematics, Pace(False))
    return robot.Rig(args, arm, senses, ScriptedPad(), teleop, Interrupt(), True), sent


def test_outside_the_box_nothing_moves_without_recover():
    outside, sent = rig()
    with pytest.raises(UserError, match="outside its limits.*--recover"), outside:
        pass
    assert not sent and not outside.robot.is_connected


def test_recover_goes_slowly_to_the_middle_of_the_box():
    inside, sent = rig("--recover")
    with inside:
        count, place = len(sent), inside.senses.kinematics.fk(inside.senses.read(inside.robot).joints)[0]
        np.testing.assert_allclose(place, [0.36, 0.03, -0.02], atol=0.01)
        assert inside.guard.outside(inside.home) is None
    speed = np.abs(np.diff(sent[:count], axis=0)).max() / PERIOD
    assert count > 5 and speed <= np.radians(90) / 4 + 1e-6                # a quarter of the limit


def test_recover_does_not_move_an_arm_whose_zero_is_wrong():
    wrong, sent = rig("--recover", shift=2.0)
    with pytest.raises(UserError, match="check its zero"), wrong:
        pass
    assert not sent


def test_recover_gives_up_when_the_middle_of_the_box_is_out_of_reach():
    far, _ = rig("--recover", "--box-center", "120", "0", "0")
    with pytest.raises(UserError, match="outside its limits|did not reach"), far:
        pass
    assert not far.robot.is_connected


# ---- recordings

def test_episodes_of_a_real_arm_are_never_overwritten(tmp_path):
    (tmp_path / "episodes").mkdir()
    file = tmp_path / "episodes" / "episode_00000.hdf5"
    file.write_bytes(b"an afternoon")
    with pytest.raises(UserError, match="1 episodes played on piper.*move the folder away.*--resume"):
        refuse_loss(tmp_path, "piper")
    refuse_loss(tmp_path, "sim")
    refuse_loss(tmp_path / "none", "piper")
    assert file.read_bytes() == b"an afternoon"


def test_train_refuses_before_it_writes_anything(tmp_path, monkeypatch):
    """--overwrite on another arm: here the simulated one by the name that anybody's driver has."""
    robot.main(["record", *TOY, "--episodes", "1", "--data", str(tmp_path / "demos")])
    command = ["train", *TOY[:-1], "--robot", "arms.sim:SimArm", "--keypad", "none", "--data", str(tmp_path / "demos"),
               "--run-dir", str(tmp_path / "run"), "--overwrite"]
    episode = tmp_path / "run" / "episodes" / "episode_00000.hdf5"
    episode.parent.mkdir(parents=True)
    episode.write_bytes((tmp_path / "demos" / "episode_00000.hdf5").read_bytes())
    with pytest.raises(UserError, match="move the folder away"):
        robot.main(command)
    assert episode.exists() and not (tmp_path / "run" / "args.json").exists()


# ---- a starved learner

class Pipe:
    def __init__(self, *messages):
        self.messages = list(messages)

    def poll(self):
        return bool(self.messages)

    def recv(self):
        return self.messages.pop(0)


def test_a_learner_that_falls_behind_is_told_once(capfd):
    background = Background.__new__(Background)
    background.stats, background.told = {}, False
    for behind in (STARVED, STARVED + 1, 10, 2 * STARVED):
        background.connection = Pipe({"updates": 3, "behind": behind})
        assert background.report() == {"updates": 3}
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"{STARVED + 1} updates behind" in err and "--updates-per-step" in err


def test_the_arm_waits_for_weights_that_are_just_being_written():
    """Version 1 is announced while the learner still holds the lock, for long where it gets no processor."""
    background, waited = Background.__new__(Background), []
    background.shared, background.newest, background.lock = torch.ones(3), -1, multiprocessing.Lock()
    background.version, background.policies = SimpleNamespace(value=1), [torch.nn.Linear(2, 1)]
    background.lock.acquire()
    background.process = SimpleNamespace(
        join=lambda seconds: waited.append(seconds) or len(waited) == 3 and background.lock.release(),
        is_alive=lambda: True)
    background.wait()
    assert len(waited) == 3 and background.newest == 1 and (background.policies[0].weight == 1).all()


def test_a_pessimistic_posterior_avoids_what_the_heads_disagree_on():
    """Q of two chunks, heads (1, 1) and (0, 3): the mean prefers the second, one deviation less the first."""
    args = parse(["train", *TOY, "--act", "posterior", "--num-candidates", "2"], "")
    policy, _ = networks(args, layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9}))
    chunks = torch.zeros(1, 2, args.horizon, 7)
    chunks[:, 1] = 1
    policy.sample = lambda *_, **__: chunks
    for args.pessimism, chosen in ((0.0, 1.0), (1.0, 0.0)):
        acting = Acting(args, policy, lambda obs, given: torch.tensor([[[1.0, 0.0]], [[1.0, 3.0]]]))
        assert acting(np.zeros(16), np.random.default_rng(0)).mean() == chosen


# ---- failure and running out of time

@pytest.mark.parametrize("outcome, terminated, truncated, reward", [
    ("success", 1, 0, 1), ("fail", 1, 0, 0), ("timeout", 0, 1, 0)])
def test_a_failure_is_terminal_without_reward_and_running_out_of_time_is_not(tmp_path, outcome, terminated, truncated,
                                                                           reward):
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
    take, obs, action = Take(np.zeros(16)), np.zeros(16), np.zeros(7)
    for step in range(5):
        take.add(action, action, obs)
        if step == 2:
            take.drop(obs)
    take.outcome = outcome
    take.save(tmp_path / "one.hdf5", task, outcome == "success")
    rows = load([tmp_path / "one.hdf5"], task)
    assert rows["terminated"].tolist() == [0, 0, 0, 0, terminated]            # never at the hole
    assert rows["truncated"].tolist() == [0, 0, 1, 0, truncated] and rows["reward"].tolist() == [0, 0, 0, 0, reward]
    with h5py.File(tmp_path / "one.hdf5") as file:
        assert file["data/demo_1/dones"][:].tolist() == [0, terminated]
        assert file["data/demo_0/dones"][:].tolist() == [0, 0, 0] and "failed" not in file["data/demo_0"].attrs


def test_a_failure_before_a_hole_at_the_end_is_not_put_on_the_step_before_it(tmp_path):
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
    take = Take(np.zeros(16))
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
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    if python("-c", "from arms.sim import can_draw; assert can_draw()").returncode:
        pytest.skip("OpenGL does not work here (MUJOCO_GL=egl)")
    code = "import sys, robot\nfor line in sys.argv[1:]: robot.main(line.split())"
    where = f"--data {tmp_path}/demos --run-dir {tmp_path}/run"
    toy = " ".join(TOY) + " --observe vision --options size=64 " + where
    result = python("-c", code, f"record {toy} --episodes 1", f"train {toy} --episodes 2 --episode-limit 15",
                    f"eval --run-dir {tmp_path}/run --episodes 1 --episode-limit 5")
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "run" / "episodes" / "episode_00000.hdf5") as file:
        seen = file["data/demo_0/obs"]
        assert sorted(seen) == ["eef", "front", "gripper", "joints", "wrist"]         # no pose from the simulator
        assert seen["front"].shape[1] == 512 and np.ptp(seen["wrist"][:], axis=0).max() > 0
    assert "success" in result.stdout and (tmp_path / "run" / "eval.csv").exists()
