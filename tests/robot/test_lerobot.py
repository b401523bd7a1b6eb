"""LeRobot's own robots on a fake bus: what is refused before a motor is written, what is driven.

    python -m pytest tests/robot/test_lerobot.py

Needs lerobot 0.6.1 and feetech-servo-sdk, skipped without.
"""

import dataclasses
import sys

import pytest
from robot_toys import ROOT, SIZES

from arms.driver import Driver
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
