"""LeRobot's own robots on a fake bus: what is refused before a motor is written, what is driven.

    python -m pytest tests/robot/test_lerobot.py

Needs lerobot 0.6.1 and feetech-servo-sdk, skipped without.
"""

import contextlib
import dataclasses
import sys

import h5py
import numpy as np
import pytest
from robot_toys import ROOT, SIZES, Person, plain, space

import arms.rig as rig_module
import robot
from arms.driver import Driver
from arms.episodes import numbered
from arms.keypad import ScriptedPad
from arms.operator import CLOSE, OPEN, STAY, open_operator
from arms.profile import load_profile
from arms.settings import open_driver, parse_args
from logbook import UserError

sys.path.append(str(ROOT / "tests" / "vla"))
from lerobot_here import importable, reason  # noqa: E402

pytestmark = pytest.mark.skipif(reason() is not None, reason=str(reason()))
PIPER = [f"joint_{i}" for i in range(1, 7)]


class FakeBus:
    """Has a LeRobot bus's motors, follows every goal, and keeps a log of what was written."""

    def __init__(self, motors, positions):
        self.motors = motors
        self.positions = dict(positions)
        self.log = []
        self.is_connected = False
        self.is_calibrated = True

    def connect(self, handshake=True):
        self.is_connected = True

    def disconnect(self, disable_torque=True):
        self.is_connected = False
        self.log.append(("torque off" if disable_torque else "torque stays", None))


@pytest.fixture
def lerobot(tmp_path, monkeypatch):
    """While it lasts lerobot can be imported, and keeps its calibrations in a temporary folder."""
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path))
    with importable():
        yield


def openarm(joints, **options):
    """The real OpenArmFollower with these joints, on a fake bus, near its zero pose in degrees."""
    from lerobot.robots.openarm_follower import OpenArmFollower, OpenArmFollowerConfig

    config = OpenArmFollowerConfig(port="can0", id="test", side="left", **options)
    config.motor_config = {
        name: entry for name, entry in config.motor_config.items() if name in joints
    }
    robot = OpenArmFollower(config)
    robot.bus = FakeBus(robot.bus.motors, dict.fromkeys(robot.bus.motors, 0.3))
    return robot


def test_seven_joints_in_degrees_are_no_piper(lerobot):
    """Near its zero pose this arm passed every check and got radians sent as degrees."""
    robot = openarm([*PIPER, "joint_7", "gripper"])
    with pytest.raises(UserError, match="keys are gripper.pos, joint_1.pos.*joint_7.pos.*expects"):
        Driver(robot, load_profile("piper"))
    assert not robot.bus.log and not robot.bus.is_connected


def test_nor_are_six_joints_of_the_same_names_in_degrees(lerobot):
    robot = openarm([*PIPER, "gripper"])
    with pytest.raises(UserError, match="joint_1.pos is in degrees.*'piper' says radians"):
        Driver(robot, load_profile("piper"))
    assert not robot.bus.log and not robot.bus.is_connected


def test_an_arm_that_nobody_has_described_is_refused_by_its_keys(lerobot):
    args = parse_args(["train", *SIZES, "--robot", "openarm_follower", "--options", "port=can0"])
    with pytest.raises(UserError, match="nobody says in which units openarm_follower.*joint_7.pos"):
        open_driver(args)


def test_no_disconnect_lets_the_arm_fall(lerobot, capsys):
    """LeRobot's default cuts the motors' power."""
    robot = openarm([*PIPER, "gripper"])
    profile = dataclasses.replace(load_profile("piper"), unit="degrees")
    assert robot.config.disable_torque_on_disconnect
    driver = Driver(robot, profile)
    robot.bus.connect()
    driver.disconnect()
    assert robot.bus.log == [("torque stays", None)]
    assert "disable_torque_on_disconnect is switched off" in capsys.readouterr().out


class Fixed:
    """A configuration that cannot be changed."""

    __slots__ = ()
    disable_torque_on_disconnect = True
    use_velocity_and_torque = False


def test_an_arm_whose_torque_cannot_be_kept_is_refused(lerobot):
    robot = openarm([*PIPER, "gripper"])
    profile = dataclasses.replace(load_profile("piper"), unit="degrees")
    robot.config = Fixed()
    with pytest.raises(
        UserError, match="cuts its motors' power.*disable_torque_on_disconnect=false"
    ):
        Driver(robot, profile)
    assert not robot.bus.log


def test_an_unknown_type_names_the_known_ones_and_a_wrong_option_itself(lerobot):
    for words, told in (
        (["--robot", "so999_follower"], "unknown arm 'so999_follower'.*so101_follower"),
        (["--robot", "openarm_follower", "--options", "prot=can0"], "does not take.*prot"),
        (["--robot", "openarm_follower"], "does not take.*port"),
    ):
        with pytest.raises(UserError, match=told):
            open_driver(parse_args(["train", *SIZES, *words]))


# ---- the SO-101: LeRobot's own follower and leader, on fake Feetech buses

START = {
    "shoulder_pan": 0.0,
    "shoulder_lift": 0.0,
    "elbow_flex": 0.0,
    "wrist_flex": 60.0,
    "wrist_roll": 0.0,
    "gripper": 20.0,
}


class FakeFeetech(FakeBus):
    """Six servos that are where they are told to be; a leader's follow a hand."""

    buses: list = []

    def __init__(self, port, motors, calibration=None):
        super().__init__(motors, START)
        self.port = port
        self.reads = 0
        self.goals = []
        self.buses.append(self)

    def sync_read(self, name, num_retry=0):
        self.reads += 1
        if self.port == "leader":
            wave = 4 * np.sin(self.reads / 4)
            return START | {"shoulder_pan": wave, "gripper": 40.0}
        return dict(self.positions)

    def sync_write(self, name, goals):
        self.goals.append(dict(goals))
        self.positions |= goals

    @contextlib.contextmanager
    def torque_disabled(self):
        yield

    def write(self, name, motor, value):
        self.log.append((name, value))

    def configure_motors(self):
        pass

    def disable_torque(self):
        pass


class Pad(ScriptedPad):
    """Places the object whenever it is asked to, then plays one script per episode."""

    def __init__(self, *scripts):
        super().__init__()
        self.scripts = [list(script) for script in scripts]

    def wait(self, seconds):
        self.events = self.scripts.pop(0)
        return "pause"


@pytest.mark.realtime
def test_record_train_eval_with_lerobots_so101(lerobot, tmp_path, monkeypatch, capsys):
    """In real time, by the types and options that LeRobot's own command line takes."""
    from lerobot.robots.so_follower import so_follower
    from lerobot.teleoperators.so_leader import so_leader

    monkeypatch.setattr(FakeFeetech, "buses", [])
    monkeypatch.setattr(so_follower, "FeetechMotorsBus", FakeFeetech)
    monkeypatch.setattr(so_leader, "FeetechMotorsBus", FakeFeetech)
    pads = [
        Pad(*[[None] * 10 + ["success"]] * 2),
        Pad(*[[None] * 8 + ["success"], [None] * 8 + ["fail"]]),
        Pad([None] * 6 + ["success"]),
    ]
    monkeypatch.setattr(rig_module, "open_keypad", lambda name: pads.pop(0))
    arm = ["--robot", "so101_follower", "--options", "port=follower", "id=test"]
    leader = ["--teleop", "so101_leader", "--teleop-options", "port=leader", "id=lead"]
    where = ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]
    robot.main(["record", *SIZES, *arm, *leader, *where, "--episodes", "2"])
    robot.main(["train", *SIZES, *arm, *where, "--episodes", "2"])
    rows = robot.main(["eval", "--run-dir", str(tmp_path / "run"), "--episodes", "1"])
    assert [row["success"] for row in rows] == [True]
    with h5py.File(numbered(tmp_path / "demos")[0]) as file:
        seen = {key: value.shape[1] for key, value in file["data/demo_0/obs"].items()}
        assert seen == {"joints": 5, "gripper": 1, "eef": 9}
        assert np.abs(file["data/demo_0/obs/joints"][:, 3] - np.radians(60)).max() < 0.1
        assert np.ptp(file["data/demo_0/obs/joints"][:, 0]) > 0.02  # it followed the hand
    followers = [bus for bus in FakeFeetech.buses if bus.port == "follower"]
    assert len(followers) == 3
    for bus in followers:
        pan = [goal["shoulder_pan"] for goal in bus.goals]
        assert np.abs(np.diff(pan)).max() * 15 <= 91  # degrees per second
        assert all(set(goal) == set(START) for goal in bus.goals)
        assert bus.log[-1] == ("torque stays", None)
    assert "disable_torque_on_disconnect is switched off" in capsys.readouterr().out


def test_an_so101_without_degrees_is_told_apart(lerobot, monkeypatch):
    from lerobot.robots.so_follower import so_follower

    monkeypatch.setattr(so_follower, "FeetechMotorsBus", FakeFeetech)
    words = ["--robot", "so101_follower", "--options", "port=follower", "use_degrees=false"]
    with pytest.raises(UserError, match="shoulder_pan.pos is in percent.*'so101' says degrees"):
        open_driver(parse_args(["train", *SIZES, *words]))


# ---- a stick instead of a leader


class Gamepad:
    """Says by how much to move, as LeRobot's gamepad does."""

    action_features = {
        "dtype": "float32",
        "shape": (4,),
        "names": {"delta_x": 0, "delta_y": 1, "delta_z": 2, "gripper": 3},
    }

    def __init__(self, x=0.5, gripper=STAY):
        self.told = {"delta_x": x, "delta_y": 0.0, "delta_z": 0.0, "gripper": gripper}

    def get_action(self):
        return self.told


@pytest.mark.parametrize("gripper, sign", [(CLOSE, -1), (STAY, 0), (OPEN, 1)])
def test_a_stick_moves_the_tool_by_what_it_says(gripper, sign):
    rig, arm = plain(Person(space))
    rig.operator = open_operator(Gamepad(gripper=gripper), arm.profile, "gamepad")
    with rig:
        before = rig.driver.kinematics.fk(rig.guard.joints)[0]
        opening = rig.guard.gripper
        episode = rig.episode(None, 0)
        moved = rig.driver.kinematics.fk(rig.guard.joints)[0] - before
    assert episode.steps == 10 and episode.interventions == 10
    np.testing.assert_allclose(moved, [10 * 0.5 * 0.015 / 1.02, 0, 0], atol=3e-3)
    requested = np.array(episode.pieces[0]["requested"])
    if sign:
        assert (requested[:, 6] == sign).all()
    else:  # the peg is clamped: staying asks for the opening there is
        np.testing.assert_allclose(requested[:, 6], 2 * opening / 0.07 - 1, atol=1e-3)


def test_an_operator_with_other_keys_is_refused():
    class Glove:
        action_features = dict.fromkeys(("thumb.pos", "index.pos"), float)

    with pytest.raises(UserError, match="leads another kind of arm.*thumb.pos.*shoulder_pan.pos"):
        open_operator(Glove(), load_profile("so101"), "glove")
