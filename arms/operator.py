"""The person who tele-operates, as actions in the guard's units: a leader arm or a stick.

    from arms.operator import open_operator
    operator = open_operator(teleop, profile, "so101_leader")    # refuses another kind of arm
    action = operator.action(guard)                              # (7,), for guard.step

Not here: the devices themselves (LeRobot's teleoperators, piper.py: PiperLeader, teleop.py),
hand-over and pauses (rig.py).
"""

from __future__ import annotations

import contextlib

import numpy as np

from arms.profile import Profile
from logbook import UserError

DELTAS = ("delta_x", "delta_y", "delta_z")  # of LeRobot's gamepad and keyboard_ee, each in [-1, 1]
CLOSE, STAY, OPEN = 0, 1, 2  # LeRobot's gripper commands


class Leader:
    """An arm that the person holds: the follower goes where it is."""

    def __init__(self, teleop, profile: Profile):
        self.teleop = teleop
        self.profile = profile

    def action(self, guard) -> np.ndarray:
        """Return the action (7,) from the guard's last target to the leader's pose."""
        joints, gripper = self.profile.from_driver(self.teleop.get_action())
        return guard.towards(joints, gripper)

    def close(self) -> None:
        """Let the device go."""
        self.teleop.disconnect()


class Stick:
    """A gamepad, SpaceMouse or keyboard: how far to move the tool in this period.

    Turns (delta_roll, delta_pitch, delta_yaw) are taken where the device has them.
    """

    def __init__(self, teleop):
        self.teleop = teleop

    def action(self, guard) -> np.ndarray:
        """Return the action (7,) of the stick's deflection; a centred stick stays."""
        told = self.teleop.get_action()
        shift = [told[name] for name in DELTAS]
        turn = [told.get(name, 0.0) for name in ("delta_roll", "delta_pitch", "delta_yaw")]
        command = told.get("gripper", STAY)
        if command == CLOSE:
            grip = -1.0
        elif command == OPEN:
            grip = 1.0
        else:
            grip = 2 * guard.gripper / guard.opening - 1
        return np.array([*shift, *turn, grip], dtype=float)

    def close(self) -> None:
        """Let the device go."""
        self.teleop.disconnect()


class Scripted(Leader):
    """The scripted operator of the simulated arm, which has no device."""

    def close(self) -> None:
        """Nothing to let go."""


def open_operator(teleop, profile: Profile, name: str) -> Leader | Stick:
    """Return the operator for a connected teleop, by its keys.

    UserError, before anything moves, for one of another kind of arm. A leader that is silent now
    and declares no keys is judged when it speaks.
    """
    keys = keys_of(teleop)
    if keys is not None and set(DELTAS) <= set(keys):
        return Stick(teleop)
    missing = [] if keys is None else [key for key in profile.keys if key not in keys]
    if missing:
        raise UserError(
            f"--teleop {name} leads another kind of arm: of its keys ({', '.join(keys)}) "
            f"{', '.join(missing)} is missing"
        )
    return Leader(teleop, profile)


def keys_of(teleop) -> list[str] | None:
    """Return the keys of a teleoperator's actions, or None where it is silent about them now."""
    features = getattr(teleop, "action_features", None)
    if features is not None:
        return list(features.get("names", features))
    with contextlib.suppress(OSError, RuntimeError):
        return list(teleop.get_action())
    return None
