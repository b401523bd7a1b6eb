"""What stands between a policy and an arm: every command within the limits of place, speed and force.

    from arms.guard import Guard
    guard = Guard(kinematics, box, axis, cone=0.5, max_step=0.015, max_turn=0.07, max_joint_speed=1.5, leash=0.04)
    guard.start(joints, gripper)                          # the first target is the measured pose
    joints, gripper = guard.step(action, measured)        # a policy's action (7,) -> the next target
    applied = guard.sent(joints, gripper)                 # what the driver made of it, in action units again

It knows the tool's centre point and the joints: not the elbow, cables, the table or people. SI units.
Not here: the loop, the driver, the watchdog (robot.py), FK and IK (kinematics.py).
"""
import collections

import numpy as np

from arms.kinematics import rotation_vector
from arms.senses import PERIOD, rotation_matrix
from logbook import UserError

OPEN = 0.07                                    # gripper opening in metres at action +1
SLACK = 1.02                                   # limits are this much wider than what a full action asks for
TWIST = 0.35                                   # radians between the commanded and the measured rotation (ours)
NEAR = 0.05                                    # radians of a joint that sag and contact explain (ours)


class Guard:
    """Turns policy actions into joint targets that keep every limit; scales and counts, never raises once started.

    A target is inside the joint ranges, its tool inside `box` (2, 3) metres and within `cone` radians of `axis` (3,);
    from one target to the next no joint, no shift and no turn exceeds its limit. The target also stays on a leash:
    where the measured tool lags further behind, in place or in rotation, as in contact, it walks back to it. If IK or
    rounding would break a limit, the step is shortened until none is; a step of zero is always allowed, because the
    last target was.
    """

    def __init__(self, kinematics, box, axis, *, cone, max_step, max_turn, max_joint_speed, leash):
        self.kinematics, self.box, self.axis = kinematics, np.asarray(box, float), np.asarray(axis, float)
        self.cone, self.max_step, self.max_turn, self.leash = cone, max_step, max_turn, leash
        self.max_joint_step, self.low, self.high = max_joint_speed * PERIOD, *np.asarray(kinematics.limits).T
        self.max_grip_step = OPEN / 4                                      # closes in a quarter of a second
        self.counts, self.joints, self.gripper = collections.Counter(), None, 0.0

    def start(self, joints, gripper):
        """The first target is the measured pose: joints (6,), gripper. UserError if that is outside the limits."""
        target = np.clip(joints, self.low, self.high)
        if not _finite(joints, 6) or not np.isfinite(gripper) or np.abs(target - joints).max() > NEAR:
            raise UserError(f"the arm reports joints {np.round(joints, 3)}, outside its own ranges: check its zero")
        if wrong := self.outside(target):
            place, box = self.kinematics.fk(target)[0] * 100, self.box * 100
            raise UserError(f"the arm starts outside its limits ({wrong}): tool at {np.round(place, 1)} cm, box "
                            f"{np.round(box[0], 1)} to {np.round(box[1], 1)} cm. Move it inside by hand, or --recover")
        self.joints, self.gripper = target, float(np.clip(gripper, 0, OPEN))

    def rejoin(self, joints):
        """After a hole in what is known: a target not near the measured joints (6,) becomes these, the grip is kept.
        Returns the name of the limit of place that is broken there, or None."""
        if np.abs(self.joints - joints).max() <= NEAR:
            return None
        self.counts["rejoined"] += 1
        self.joints = np.clip(joints, self.low, self.high)
        return self.outside(self.joints)

    def outside(self, joints):
        """Name of the limit of place that these joints (6,) break, or None."""
        place, turn = self.kinematics.fk(joints)
        if (joints < self.low).any() or (joints > self.high).any():
            return "joint range"
        if (place < self.box[0] - 1e-9).any() or (place > self.box[1] + 1e-9).any():
            return "box"
        return "cone" if self._tilt(turn) > self.cone + 1e-9 else None

    def step(self, action, measured=None):
        """action (7,), measured joints (6,) or None when they are stale -> target joints (6,), gripper opening."""
        if not _finite(action, 7):
            return self.hold("nonfinite")
        if not _finite(measured, 6):
            return self.hold("stale")
        action = np.clip(np.asarray(action, float), -1e6, 1e6)
        base, turned = self.kinematics.fk(self.joints)
        shift = self._cap(action[:3], 1.0, "step") * self.max_step / SLACK
        turn = self._cap(action[3:6], 1.0, "step") * self.max_turn / SLACK
        place = self._clip(base + shift, self.box[0] + 1e-3, self.box[1] - 1e-3, "box")
        there, facing = self.kinematics.fk(measured)
        place = there + self._cap(place - there, self.leash, "leash")
        place = base + self._cap(place - base, self.max_step / SLACK, "leash")
        turn = self._into_cone(rotation_matrix(turn) @ turned)
        if np.linalg.norm(twist := rotation_vector(turn @ facing.T)) > TWIST:
            turn = rotation_matrix(self._cap(twist, TWIST, "leash")) @ facing
            turn = rotation_matrix(self._cap(rotation_vector(turn @ turned.T), self.max_turn / SLACK, "leash")) @ turned
        aim, *_ = self.kinematics.ik(place, turn, self.joints)
        aim = self._clip(aim, self.low, self.high, "joint range")
        change = aim - self.joints
        fastest = np.abs(change).max() / self.max_joint_step
        if fastest > 1:
            self.counts["joint speed"] += 1
            change = change / fastest
        target = self._furthest(change, base, turned, there)
        opening = (np.clip(action[6], -1, 1) + 1) / 2 * OPEN
        return target, self._grip(opening)

    def slide(self, goal, gripper, measured, speed=0.25):
        """One slow step straight to joints `goal` (6,), to rest or into the box too -> joints, gripper, arrived."""
        goal = np.clip(goal, self.low, self.high)
        if not _finite(goal, 6) or not _finite(measured, 6):
            return *self.hold("stale"), False
        if np.abs(self.joints - measured).max() > 0.2:               # wait where the measured arm does not follow
            return *self.hold("leash"), False
        change, limit = goal - self.joints, speed * self.max_joint_step
        target = self.joints + change * min(1.0, limit / max(np.abs(change).max(), 1e-9))
        return np.clip(target, self.low, self.high), self._grip(gripper), bool(np.allclose(target, goal, atol=1e-6))

    def hold(self, why):
        """The last target again, counted."""
        self.counts[why] += 1
        return self.joints.copy(), self.gripper

    def sent(self, joints, gripper):
        """What the driver really sent becomes the last target. Returns it in action units (7,): the replay's action.

        ValueError, and the old target, where that is no place: it would be sent again.
        """
        if not _finite([*joints, gripper], 7):
            raise ValueError(f"the driver says it sent {[*joints, gripper]}")
        (place, turned), (new_place, new_turned) = self.kinematics.fk(self.joints), self.kinematics.fk(joints)
        shift = (new_place - place) * SLACK / self.max_step
        turn = rotation_vector(new_turned @ turned.T) * SLACK / self.max_turn
        self.joints, self.gripper = np.array(joints, float), float(gripper)
        return np.clip([*shift, *turn, 2 * gripper / OPEN - 1], -1, 1).astype(np.float32)

    def towards(self, joints, gripper):
        """The action (7,) that leads to a tele-operator's joints (6,) and opening; far away: longer than a step."""
        if not _finite(joints, 6):
            return np.full(7, np.nan)                                      # on which `step` holds
        (place, turned), (goal, goal_turned) = self.kinematics.fk(self.joints), self.kinematics.fk(joints)
        turn = rotation_vector(goal_turned @ turned.T)
        shift = (goal - place) * SLACK / self.max_step
        return np.array([*shift, *turn * SLACK / self.max_turn, 2 * gripper / OPEN - 1])

    def _furthest(self, change, base, turned, there):
        leash = max(self.leash + 1e-4, np.linalg.norm(base - there))       # IK trades place for a rotation out of reach
        for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.05):
            target = np.clip(self.joints + share * change, self.low, self.high)
            place, turn = self.kinematics.fk(target)
            angle = np.linalg.norm(rotation_vector(turn @ turned.T))
            near = np.linalg.norm(place - base) <= self.max_step and np.linalg.norm(place - there) <= leash
            if near and angle <= self.max_turn and not self.outside(target):
                return target
            self.counts["shortened"] += 1
        return self.joints.copy()

    def _grip(self, opening):
        if not np.isfinite(opening):
            return self.gripper
        return float(np.clip(self.gripper + np.clip(opening - self.gripper, -self.max_grip_step, self.max_grip_step),
                             0, OPEN))

    def _cap(self, vector, most, name):
        length = np.linalg.norm(vector)
        if length > most * (1 + 1e-6):
            self.counts[name] += 1
        return vector * (most / length) if length > most else vector

    def _clip(self, value, low, high, name):
        inside = np.clip(value, low, high)
        if np.abs(inside - value).max() > 1e-6:
            self.counts[name] += 1
        return inside

    def _tilt(self, turned):
        return float(np.arctan2(np.linalg.norm(np.cross(self.axis, turned[:, 2])), self.axis @ turned[:, 2]))

    def _into_cone(self, turned):
        excess = self._tilt(turned) - (self.cone - 5e-3)
        if excess <= 0:
            return turned
        self.counts["cone"] += 1
        back = np.cross(turned[:, 2], self.axis)
        return rotation_matrix(back / max(np.linalg.norm(back), 1e-9) * excess) @ turned


def _finite(values, size):
    try:
        values = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return False
    return values.shape == (size,) and bool(np.isfinite(values).all())
