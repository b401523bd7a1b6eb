"""A LeRobot robot as the rest of the program sees it: radians and metres, checked before it moves.

    from arms.driver import Driver
    driver = Driver(robot, profile)         # refuses an arm that the profile does not describe
    driver.connect()                        # refuses one uncalibrated or with a joint missing
    raw = driver.get_observation()          # the robot's own dict
    sent = driver.send(joints, gripper)     # radians, metres -> what was really sent

Here alone stand the questions that a robot's class may answer or not: is it a simulation, does it
judge success itself, can it cut its motors' power.
Not here: where the arm may move (guard.py), what its numbers mean (profile.py).
"""

from __future__ import annotations

import inspect

import numpy as np

from arms.kinematics import Kinematics
from arms.profile import Profile
from logbook import UserError

LEROBOT_UNITS = {"DEGREES": "degrees", "RANGE_M100_100": "percent"}  # of lerobot's MotorNormMode


class Driver:
    """The robot and its profile. Constructing it moves, opens and connects nothing.

    simulated: the robot can be reset. judges: it says itself when a task has succeeded.
    """

    def __init__(self, robot, profile: Profile):
        refuse_other_keys(robot, profile)
        refuse_other_units(robot, profile)
        self.robot = robot
        self.profile = profile
        self.kinematics: Kinematics = profile.kinematics()
        self.simulated = hasattr(robot, "reset")
        self.judges = hasattr(robot, "success")
        self.can_release = "release" in inspect.signature(robot.disconnect).parameters
        keep_torque(robot)

    @property
    def observation_features(self) -> dict:
        return self.robot.observation_features

    @property
    def rest(self) -> np.ndarray | None:
        """Where the arm may lose its power, (J,) in radians, or None."""
        return self.profile.rest_joints

    def connect(self) -> None:
        """Connect without calibrating. UserError for an arm that its driver calls uncalibrated.

        The person at the arm calibrates with the maker's tool: that moves the arm without a guard.
        """
        self.robot.connect(calibrate=False)
        if not self.robot.is_calibrated:
            raise UserError(
                "the arm is not calibrated: calibrate it with its own tool first "
                "(lerobot-calibrate for LeRobot's arms)"
            )
        self._refuse_incomplete()

    def _refuse_incomplete(self) -> None:
        """UserError for an observation without a joint; none at all is waited for later."""
        try:
            seen = set(self.robot.get_observation())
        except Exception:  # drivers' errors are of any kind; the loop tells of one that lasts
            return
        missing = [key for key in self.profile.keys if key not in seen]
        if missing:
            raise UserError(
                f"this robot's observation lacks {', '.join(missing)}, which the arm profile "
                f"'{self.profile.name}' names; it has {', '.join(sorted(seen))}"
            )

    def refuse_implausible(self, joints, gripper: float) -> None:
        """UserError for a measured pose that the profile's limits exclude."""
        problem = self.profile.implausible(joints, gripper)
        if problem:
            raise UserError(problem)

    def reset(self, seed: int | None = None) -> None:
        """Start a simulated episode; a real arm has nothing to reset."""
        if self.simulated:
            self.robot.reset(seed)

    def success(self) -> bool:
        """Return whether the robot itself says that the task has succeeded."""
        return self.judges and bool(self.robot.success())

    def get_observation(self) -> dict:
        """Return the robot's own dict."""
        return self.robot.get_observation()

    def send(self, joints, gripper: float) -> tuple[np.ndarray, float]:
        """Send targets (J,) in radians and an opening; return what the robot says it sent."""
        command = self.profile.to_driver(joints, gripper)
        answer = self.robot.send_action(command) or {}
        return self.profile.from_driver(command | answer)

    def disconnect(self, release: bool = False) -> None:
        """Let the arm go; with release, and only where the driver can, cut its motors' power."""
        if release:
            self.robot.disconnect(release=True)
        else:
            self.robot.disconnect()


def refuse_other_keys(robot, profile: Profile) -> None:
    """UserError unless the robot takes exactly the keys that the profile names.

    A superset is another arm, too: seven joints driven by six would leave one unguarded.
    """
    keys = set(robot.action_features)
    if keys == set(profile.keys):
        return
    raise UserError(
        f"this robot's keys are {', '.join(sorted(keys))}, but the arm profile '{profile.name}' "
        f"expects {', '.join(profile.keys)}: name the profile of this arm with --profile "
        '(arms/README.md, "Your own arm")'
    )


def refuse_other_units(robot, profile: Profile) -> None:
    """UserError where the motors of a LeRobot robot are known to speak of another unit."""
    motors = getattr(getattr(robot, "bus", None), "motors", {})
    for key in profile.joints:
        motor = motors.get(key.removesuffix(".pos"))
        if motor is None:
            continue
        unit = LEROBOT_UNITS.get(motor.norm_mode.name, motor.norm_mode.name)
        if unit != profile.unit:
            raise UserError(
                f"this robot's {key} is in {unit}, but the arm profile '{profile.name}' says "
                f"{profile.unit}: change the robot's options (use_degrees) or the profile"
            )


def keep_torque(robot) -> None:
    """Switch off that disconnect() cuts the motors' power: the arm would fall. Raises UserError."""
    config = getattr(robot, "config", None)
    if not getattr(config, "disable_torque_on_disconnect", False):
        return
    try:
        config.disable_torque_on_disconnect = False
    except Exception as error:
        raise UserError(
            "this robot cuts its motors' power when it disconnects, and the arm would fall: give "
            "--options disable_torque_on_disconnect=false"
        ) from error
    print("disable_torque_on_disconnect is switched off: the arm keeps its power and does not fall")
