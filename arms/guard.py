"""What stands between a policy and an arm: every command keeps limits of place, speed and force.

    from arms.guard import Guard, Limits
    guard = Guard(kinematics, box, axis, Limits(cone=0.5), opening=0.07)
    guard.start(joints, gripper)                    # the first target is the measured pose
    joints, gripper = guard.step(action, measured)  # a policy's action (7,) -> the next target
    applied = guard.sent(joints, gripper)           # what the driver sent, in action units

One step takes about 0.5 ms. The guard knows the tool centre point and the joints. It does not
know the elbow, cables, the table or people. SI units.
Not here: the loop and the watchdog (rig.py), the driver (driver.py), FK and IK (kinematics.py).
Shapes: J joints. An action is shift xyz, turn xyz, gripper, each in [-1, 1].
"""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy as np

from arms.rotation import rotation_matrix, rotation_vector
from arms.senses import PERIOD
from logbook import UserError

SLACK = 1.02  # the limits are this much wider than what a full action asks for
TWIST = 0.35  # rad between the commanded and the measured rotation (ours)
NEAR = 0.05  # rad of a joint that sag and contact explain (ours)
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)  # of a step, tried in this order until no limit breaks


@dataclass(frozen=True)
class Limits:
    """What a command may do, in metres and radians; all defaults are ours."""

    cone: float = np.radians(30.0)  # between the tool's axis and where it pointed at the start
    max_step: float = 0.015  # of the tool per period at full action
    max_turn: float = np.radians(4.0)  # of the tool per period at full action
    max_joint_speed: float = np.radians(90.0)  # per second, of every joint
    leash: float = 0.04  # between the commanded and the measured tool; bounds the force


class Guard:
    """Turn policy actions into joint targets that keep every limit; scale, count and never raise.

    A target is inside the joint ranges, its tool inside `box` (2, 3) in metres and within the
    cone around `axis` (3,). From one target to the next no joint, no shift and no turn exceeds
    its limit. The target also stays on two leashes: where the measured tool lags behind, in place
    or in rotation (as in contact), the target walks back to it and never further away. A step
    that IK or rounding would carry over a limit is shortened. A step of zero is always allowed,
    because the last target was. Once started, `step`, `slide`, `hold` and `towards` accept
    anything at all and never raise.
    """

    def __init__(self, kinematics, box, axis, limits: Limits, opening: float):
        self.kinematics = kinematics
        self.box = np.asarray(box, float)
        self.axis = np.asarray(axis, float)
        self.limits = limits
        self.low, self.high = np.asarray(kinematics.limits, float).T
        self.max_joint_step = limits.max_joint_speed * PERIOD
        self.opening = opening  # metres at action +1
        self.max_grip_step = opening / 4  # closes in a quarter of a second
        self.counts: collections.Counter[str] = collections.Counter()
        self.joints = None  # the last target (J,) in radians
        self.gripper = 0.0  # the last target in metres

    # ---- where the arm may be

    def start(self, joints, gripper) -> None:
        """Make the measured joints (J,) and opening the first target.

        UserError for a pose outside the limits.
        """
        measured = numbers(joints, len(self.low))
        opening = number(gripper)
        if measured is None or opening is None:
            raise UserError(f"the arm reports {joints} and {gripper}, which are no joints")
        target = np.clip(measured, self.low, self.high)
        if np.abs(target - measured).max() > NEAR:
            raise UserError(
                f"the arm reports joints {np.round(measured, 3)} rad, outside its own ranges: "
                "check its zero"
            )
        broken = self.outside(target)
        if broken:
            place = self.kinematics.fk(target)[0] * 100
            low, high = self.box * 100
            raise UserError(
                f"the arm starts outside its limits ({broken}): tool at {np.round(place, 1)} cm, "
                f"box {np.round(low, 1)} to {np.round(high, 1)} cm. "
                "Move it inside by hand, or give --recover"
            )
        self.joints = target
        self.gripper = float(np.clip(opening, 0, self.opening))

    def rejoin(self, joints) -> str | None:
        """Take up the arm where it is seen after a hole in what is known of it.

        A target that is not near the measured joints (J,) is replaced by them; the grip is kept.
        Returns the name of the limit of place that is broken there, or None.
        """
        if np.abs(self.joints - joints).max() <= NEAR:
            return None
        self.counts["rejoined"] += 1
        self.joints = np.clip(joints, self.low, self.high)
        return self.outside(self.joints)

    def outside(self, joints) -> str | None:
        """Name the limit of place that these joints (J,) break, or return None."""
        place, turned = self.kinematics.fk(joints)
        if (joints < self.low).any() or (joints > self.high).any():
            return "joint range"
        if (place < self.box[0] - 1e-9).any() or (place > self.box[1] + 1e-9).any():
            return "box"
        if self._tilt(turned) > self.limits.cone + 1e-9:
            return "cone"
        return None

    # ---- commands

    def step(self, action, measured=None) -> tuple[np.ndarray, float]:
        """Return the next target (J,) and opening for an action (7,) and the measured joints (J,).

        An action that is not seven finite numbers, or measured joints that are not J of them (None
        when they are stale), hold the last target.
        """
        action = numbers(action, 7)
        if action is None:
            return self.hold("nonfinite")
        measured = numbers(measured, len(self.low))
        if measured is None:
            return self.hold("stale")
        action = np.clip(action, -1e6, 1e6)
        base, turned = self.kinematics.fk(self.joints)
        there, facing = self.kinematics.fk(measured)
        place = self._next_place(action[:3], base, there)
        rotation = self._next_rotation(action[3:6], turned, facing)
        aim, *_ = self.kinematics.ik(place, rotation, self.joints)
        aim = self._clip(aim, self.low, self.high, "joint range")
        change = aim - self.joints
        fastest = np.abs(change).max() / self.max_joint_step
        if fastest > 1:
            self.counts["joint speed"] += 1
            change = change / fastest
        target = self._furthest(change, (base, turned), (there, facing))
        opening = (np.clip(action[6], -1, 1) + 1) / 2 * self.opening
        return target, self._grip(opening)

    def slide(self, goal, gripper, measured, speed=0.25) -> tuple[np.ndarray, float, bool]:
        """Take one slow step straight to the joints `goal` (J,), also from outside the box.

        Returns the target, the opening and whether the target has arrived. Waits where the measured
        arm does not follow.
        """
        goal = numbers(goal, len(self.low))
        measured = numbers(measured, len(self.low))
        if goal is None or measured is None:
            return *self.hold("stale"), False
        if np.abs(self.joints - measured).max() > 0.2:
            return *self.hold("leash"), False
        goal = np.clip(goal, self.low, self.high)
        change = goal - self.joints
        limit = speed * self.max_joint_step
        target = self.joints + change * min(1.0, limit / max(np.abs(change).max(), 1e-9))
        arrived = bool(np.allclose(target, goal, atol=1e-6))
        return np.clip(target, self.low, self.high), self._grip(gripper), arrived

    def hold(self, why: str) -> tuple[np.ndarray, float]:
        """Return the last target again, and count why."""
        self.counts[why] += 1
        return self.joints.copy(), self.gripper

    def sent(self, joints, gripper) -> np.ndarray:
        """Make what the driver really sent the last target; return it as an action (7,).

        This is the action that the replay stores. ValueError, and the old target, for what is no
        pose: it would be sent again.
        """
        joints = numbers(joints, len(self.low))
        opening = number(gripper)
        if joints is None or opening is None:
            raise ValueError("the driver answers that it sent what are no finite numbers")
        action = self._action_to(joints, opening)
        self.joints = joints
        self.gripper = opening
        return np.clip(action, -1, 1).astype(np.float32)

    def towards(self, joints, gripper) -> np.ndarray:
        """Return the action (7,) that leads to an operator's joints (J,) and opening.

        Longer than a full action where they are far away; NaN, on which `step` holds, for no pose.
        """
        joints = numbers(joints, len(self.low))
        opening = number(gripper)
        if joints is None or opening is None:
            return np.full(7, np.nan)
        return self._action_to(joints, opening)

    # ---- parts of a step

    def _action_to(self, joints, opening) -> np.ndarray:
        place, turned = self.kinematics.fk(self.joints)
        goal, goal_turned = self.kinematics.fk(joints)
        shift = (goal - place) * SLACK / self.limits.max_step
        turn = rotation_vector(goal_turned @ turned.T) * SLACK / self.limits.max_turn
        return np.array([*shift, *turn, 2 * opening / self.opening - 1])

    def _next_place(self, shift, base, there) -> np.ndarray:
        """Move the tool from `base`: one step, inside the box, on the leash from `there`."""
        most = self.limits.max_step / SLACK
        shift = self._cap(shift, 1.0, "step") * self.limits.max_step / SLACK
        place = self._clip(base + shift, self.box[0] + 1e-3, self.box[1] - 1e-3, "box")
        place = there + self._cap(place - there, self.limits.leash, "leash")
        return base + self._cap(place - base, most, "leash")

    def _next_rotation(self, turn, turned, facing) -> np.ndarray:
        """Turn the tool from `turned`: one step, inside the cone, on the leash from `facing`."""
        most = self.limits.max_turn / SLACK
        turn = self._cap(turn, 1.0, "step") * self.limits.max_turn / SLACK
        rotation = self._into_cone(rotation_matrix(turn) @ turned)
        twist = rotation_vector(rotation @ facing.T)
        if np.linalg.norm(twist) <= TWIST:
            return rotation
        rotation = rotation_matrix(self._cap(twist, TWIST, "leash")) @ facing
        back = rotation_vector(rotation @ turned.T)
        return rotation_matrix(self._cap(back, most, "leash")) @ turned

    def _furthest(self, change, last, seen) -> np.ndarray:
        """Return the target after the longest part of `change` (J,) that breaks no limit.

        last and seen are (place, rotation) of the last target and of the measured tool. IK trades
        place for a rotation out of reach, so both leashes are checked again: beyond one of them, a
        step may only come closer.
        """
        base, turned = last
        there, facing = seen
        leash = max(self.limits.leash + 1e-4, np.linalg.norm(base - there))
        twist = max(TWIST + 1e-4, angle_between(turned, facing))
        for share in SHARES:
            target = np.clip(self.joints + share * change, self.low, self.high)
            place, rotation = self.kinematics.fk(target)
            kept = (
                np.linalg.norm(place - base) <= self.limits.max_step
                and angle_between(rotation, turned) <= self.limits.max_turn
                and np.linalg.norm(place - there) <= leash
                and angle_between(rotation, facing) <= twist
            )
            if kept and not self.outside(target):
                return target
            self.counts["shortened"] += 1
        return self.joints.copy()

    def _grip(self, opening) -> float:
        opening = number(opening)
        if opening is None:
            return self.gripper
        change = np.clip(opening - self.gripper, -self.max_grip_step, self.max_grip_step)
        return float(np.clip(self.gripper + change, 0, self.opening))

    def _cap(self, vector, most, name) -> np.ndarray:
        length = np.linalg.norm(vector)
        if length > most * (1 + 1e-6):
            self.counts[name] += 1
        return vector * (most / length) if length > most else vector

    def _clip(self, value, low, high, name) -> np.ndarray:
        inside = np.clip(value, low, high)
        if np.abs(inside - value).max() > 1e-6:
            self.counts[name] += 1
        return inside

    def _tilt(self, turned) -> float:
        """Return the angle between the tool's axis and the cone's."""
        across = np.linalg.norm(np.cross(self.axis, turned[:, 2]))
        return float(np.arctan2(across, self.axis @ turned[:, 2]))

    def _into_cone(self, turned) -> np.ndarray:
        excess = self._tilt(turned) - (self.limits.cone - 5e-3)
        if excess <= 0:
            return turned
        self.counts["cone"] += 1
        back = np.cross(turned[:, 2], self.axis)
        return rotation_matrix(back / max(np.linalg.norm(back), 1e-9) * excess) @ turned


def angle_between(rotation, other) -> float:
    """Return the angle in radians between two rotations (3, 3)."""
    return float(np.linalg.norm(rotation_vector(rotation @ other.T)))


def numbers(values, size: int) -> np.ndarray | None:
    """Return values as finite floats (size,), or None for anything that is not that many numbers.

    Whatever a caller passes is possible here: integers beyond the range of floats, tensors that
    require grad, objects whose conversion raises. The guard holds on all of them.
    """
    try:
        array = np.array(values)
        if array.dtype.kind in "SUc":  # a text that reads as a number is none
            return None
        array = array.astype(float)
    except Exception:
        return None
    if array.shape != (size,) or not np.isfinite(array).all():
        return None
    return array


def number(value) -> float | None:
    """Return value as a finite float, or None."""
    array = numbers([value], 1)
    return None if array is None else float(array[0])
