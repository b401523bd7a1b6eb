"""
What the scripted robosuite demonstrators share: reach, grasp, carry, and the unevenness of a group of people.

A demonstrator reads only the observation, like a policy. It is a small state machine: each phase is a method that
returns a velocity and a finger command and may enter the next phase. Each episode draws a style: how fast, from how
high, straight or by way of a point above the object, how well centred and turned the grasp is, how long the fingers
take, how much the hand shakes. Some attempts miss, close on nothing or stop short, open again, rise and retry.
The constants of a class are its knobs: NOISE and MISS make cloning the data hard, the ranges make it multi-modal.
All are ours; positions are metres in the world frame, angles radians, a step is 1/20 s.
Not here: the tasks (lift.py, can.py, square.py).
"""
from __future__ import annotations

import numpy as np

EEF, QUAT, FINGERS = slice(0, 3), slice(3, 7), slice(7, 9)  # robomimic's order of the observation
OPEN, CLOSED = -1.0, 1.0
REACHING = ("hover", "descend")  # phases that turn the hand
REACH, TWIST = 0.05, 0.5  # what an action of 1 asks of the controller: metres, radians


def x_axis(quaternion: np.ndarray) -> np.ndarray:
    """The body's x axis (3,) in the world; quaternion is (x, y, z, w)."""
    x, y, z, w = quaternion
    return np.array([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)])


def tilt(quaternion: np.ndarray) -> np.ndarray:
    """Sine of the angle by which the z axis must turn about the world's x and y axes (2,) to point straight down."""
    x, y, z, w = quaternion
    return np.array([2 * (x * w - y * z), 2 * (x * z + y * w)])


def yaw(quaternion: np.ndarray) -> float:
    """Angle of the body's x axis about the vertical."""
    axis = x_axis(quaternion)
    return float(np.arctan2(axis[1], axis[0]))


def wrap(angle: float, period: float) -> float:
    """The same angle modulo `period`, nearest to 0."""
    return (angle + period / 2) % period - period / 2


class Grasper:
    """
    demonstrator = Subclass(rng); action (7,) = demonstrator(obs (D,)). One object per episode, one stream per object.
    Phases: [hover,] descend, pause, close, then `lift` of the subclass, or release and another attempt.
    """

    OBJECT, OBJECT_QUAT = slice(9, 12), slice(12, 16)  # where the observation holds the object's pose
    NOISE = (0.05, 0.3)  # standard deviation of the noise added to each action; one draw per episode
    WOBBLE = (0.0, 0.3)  # amplitude of a slow sideways sway
    SPEED = (0.5, 1.6)  # proportional gain: action = gain * error / REACH
    HOVER = (0.05, 0.14)  # height of the point above the grasp
    DIRECT = 0.35  # share of episodes that go straight to the object, without a hover point
    MISS = 0.35  # probability that an attempt aims beside the object (the retry after it may miss again)
    MISS_OFFSET = (0.035, 0.06)  # how far beside
    MISS_HEIGHT = (0.0, 0.05)  # ... or just above
    REACHED = 0.014  # distance to the grasp at which the descent ends
    CENTRE = 0.006  # standard deviation of the grasp's offset from its ideal point
    DEPTH = (-0.012, 0.008)  # height of the grasp above its ideal point
    TURN = (0.0, 1.0)  # share of the angle to the object that the hand corrects
    CLOSE_STEPS = (4, 10)  # steps given to the fingers
    PAUSE_STEPS = (0, 8)  # steps of hesitation before they close
    LIFT_SPEED = (0.4, 1.0)
    LEVEL = 0.0  # share of its tilt that the hand takes back in a step while it reaches
    CARE = 1.0  # what each failed attempt leaves of MISS
    STEADY = {}  # phases in which the hand shakes less, with the share that is left
    SYMMETRY = np.pi / 2  # the object looks the same to the fingers after this turn
    CLEAR = 0.88  # height from which another attempt begins

    def __init__(self, rng: np.random.Generator):
        self.rng, self.steps, self.attempts = rng, 0, 0
        self.gain, self.hover, self.turn = rng.uniform(*self.SPEED), rng.uniform(*self.HOVER), rng.uniform(*self.TURN)
        self.noise, self.lift_speed = rng.uniform(*self.NOISE), rng.uniform(*self.LIFT_SPEED)
        self.direct = rng.random() < self.DIRECT
        self.wobble, self.wobble_rate = rng.uniform(*self.WOBBLE), rng.uniform(0.1, 0.4)
        self.wobble_angle = rng.uniform(0, 2 * np.pi)
        self.close_steps, self.pause_steps = rng.integers(*self.CLOSE_STEPS), rng.integers(*self.PAUSE_STEPS)
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        rng = self.rng
        self.offset = np.append(rng.normal(0, self.CENTRE, 2), rng.uniform(*self.DEPTH))
        if rng.random() < self.MISS * self.CARE**self.attempts:
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*self.MISS_OFFSET)
            self.offset[:2] += distance * np.array([np.cos(angle), np.sin(angle)])
            self.offset[2] = rng.uniform(*self.MISS_HEIGHT)
        self.attempts += 1
        self._enter("descend" if self.direct else "hover")

    def _enter(self, phase: str) -> None:
        self.phase, self.phase_steps = phase, 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.steps, self.phase_steps = self.steps + 1, self.phase_steps + 1
        self.eef, self.object = obs[EEF].astype(np.float64), obs[self.OBJECT].astype(np.float64)
        self.eef_yaw, self.object_yaw = yaw(obs[QUAT]), yaw(obs[self.OBJECT_QUAT])
        self.object_axis = x_axis(obs[self.OBJECT_QUAT])
        self.opening = obs[FINGERS][0] - obs[FINGERS][1]
        action = np.zeros(7)
        action[:3], action[6] = getattr(self, "_" + self.phase)()
        action[5] = self._twist()
        if self.phase in REACHING:
            action[3:5] = self.LEVEL * tilt(obs[QUAT]) / TWIST
        shake = self.STEADY.get(self.phase, 1.0)
        sway = shake * self.wobble * np.sin(self.wobble_rate * self.steps)
        action[:2] += sway * np.array([np.cos(self.wobble_angle), np.sin(self.wobble_angle)])
        action[:3] += self.rng.normal(0, shake * self.noise, 3)
        action[3:6] += self.rng.normal(0, 0.3 * shake * self.noise, 3)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _towards(self, target: np.ndarray) -> np.ndarray:
        return self.gain * (target - self.eef) / REACH

    def _twist(self) -> float:
        """Turns the fingers to the object while reaching for it."""
        if self.phase not in REACHING:
            return 0.0
        return self.turn * wrap(self.object_yaw - self.eef_yaw, self.SYMMETRY) / TWIST

    def _grasp_point(self) -> np.ndarray:
        return self.object

    def _hover(self):
        target = self._grasp_point() + self.offset + [0, 0, self.hover]
        if np.linalg.norm(target - self.eef) < 0.025 or self.phase_steps > 60:
            self._enter("descend")
        return self._towards(target), OPEN

    def _descend(self):
        target = self._grasp_point() + self.offset
        error = target - self.eef
        if self.direct and np.linalg.norm(error[:2]) > 0.02:
            target = target + [0, 0, min(0.06, 1.5 * np.linalg.norm(error[:2]))]  # do not sweep the object away
        if np.linalg.norm(error) < self.REACHED or self.phase_steps > 60:
            self._enter("pause")
        return self._towards(target), OPEN

    def _pause(self):
        if self.phase_steps > self.pause_steps:
            self._enter("close")
        return self._towards(self._grasp_point() + self.offset), OPEN

    def _close(self):
        if self.phase_steps > self.close_steps:
            self._enter("lift" if self.opening > 0.02 else "release")
        return np.zeros(3), CLOSED

    def _lost(self) -> bool:
        """The object slipped out of the fingers."""
        return self.eef[2] - self._grasp_point()[2] > 0.05

    def _release(self):
        if self.phase_steps > 6 and self.eef[2] > self.CLEAR:
            self._begin_attempt()
        return np.array([0.0, 0.0, 0.6]), OPEN


class Carrier(Grasper):
    """
    Grasps, lifts to a height of its own, carries the object over its goal, lowers it and lets go; retries what fails.
    A subclass says where the goal is. Phases after the grasp: lift, carry, lower, drop.
    """

    OBJECT, OBJECT_QUAT = slice(16, 19), slice(19, 23)  # after its pose relative to the hand
    PACE = (0.65, 1.0)  # the fastest the hand moves; above 1 the controller would clip single axes
    HEIGHT = (1.0, 1.08)  # of the object while it is carried
    CUT = 0.35  # share of episodes that move sideways while still rising
    CARE = 0.6
    AIM = 0.01  # standard deviation of the aim over the goal
    ARRIVED = 0.02  # distance over the goal at which lowering begins

    def __init__(self, rng: np.random.Generator):
        self.pace, self.height = rng.uniform(*self.PACE), rng.uniform(*self.HEIGHT)
        self.cut = rng.random() < self.CUT
        super().__init__(rng)

    def _begin_attempt(self) -> None:
        self.aim = np.append(self.rng.normal(0, self.AIM, 2), 0.0)
        super()._begin_attempt()

    def _towards(self, target: np.ndarray) -> np.ndarray:
        velocity = super()._towards(target)
        return velocity * min(1.0, self.pace / (np.linalg.norm(velocity) + 1e-9))

    def _carried(self, target: np.ndarray) -> np.ndarray:
        """The velocity that brings the object, not the hand, to the target."""
        return self._towards(self.eef + target - self.object)

    def _goal(self) -> np.ndarray:
        raise NotImplementedError

    def _lift(self):
        if self._lost() or self.phase_steps > 60:
            self._enter("release")
        elif self.object[2] > self.height - (0.06 if self.cut else 0.02):
            self._enter("carry")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED

    def _carry(self):
        target = self._goal() + self.aim
        target[2] = self.height
        if self._lost():
            self._enter("release")
        elif self._over(target) or self.phase_steps > 160:
            self._enter("lower")
        return self._carried(target), CLOSED

    def _over(self, target: np.ndarray) -> bool:
        return np.linalg.norm((target - self.object)[:2]) < self.ARRIVED

    def _lower(self):
        raise NotImplementedError

    def _drop(self):
        """Lets go and rises; if that did not do it, tries again."""
        if self.phase_steps > 25 and self.eef[2] > self.CLEAR:
            self._begin_attempt()
        return np.array([0.0, 0.0, 0.0 if self.phase_steps < 4 else 0.6]), OPEN
