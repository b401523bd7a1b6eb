"""What the scripted robosuite demonstrators share: reach, grasp, carry, and human unevenness.

    expert = LiftDemonstrator(np.random.default_rng(0))
    action = expert(obs)                                     # (7,), one call per step of 1/20 s

A demonstrator reads only the observation, as a policy does. It is a small state machine: each phase
is a method that returns a velocity and a finger command, and may enter the next phase. Each episode
draws a style: how fast, from how high, straight or by way of a point above the object, how well
centred and turned the grasp is, how long the fingers take, how much the hand shakes. Some attempts
miss, close on nothing or stop short; the hand then opens, rises and tries again.

The constants of a class are its settings. NOISE and MISS make the data hard to clone, the ranges
make it multi-modal. All of them are ours. Positions are metres in the world frame, angles radians.
Not here: the tasks (lift.py, can.py, square.py).
"""

from collections.abc import Callable

import numpy as np

# robomimic's order of the observation
EEF = slice(0, 3)
QUAT = slice(3, 7)
FINGERS = slice(7, 9)
OPEN = -1.0
CLOSED = 1.0
REACHING = ("hover", "descend")  # phases that turn the hand
REACH = 0.05  # metres that an action of 1 asks of the controller
TWIST = 0.5  # radians, likewise

Motion = tuple[np.ndarray, float]  # what a phase returns: velocity (3,) in actions, finger command


def x_axis(quaternion: np.ndarray) -> np.ndarray:
    """Return the body's x axis (3,) in the world; quaternion is (x, y, z, w)."""
    x, y, z, w = quaternion
    return np.array([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)])


def tilt(quaternion: np.ndarray) -> np.ndarray:
    """Return how far the body's z axis is from pointing straight down.

    (2,): the sine of the angle by which it must turn about the world's x and y axes.
    """
    x, y, z, w = quaternion
    return np.array([2 * (x * w - y * z), 2 * (x * z + y * w)])


def yaw(quaternion: np.ndarray) -> float:
    """Return the angle of the body's x axis about the vertical."""
    axis = x_axis(quaternion)
    return float(np.arctan2(axis[1], axis[0]))


def wrap(angle: float, period: float) -> float:
    """Return the same angle modulo `period`, nearest to 0."""
    return (angle + period / 2) % period - period / 2


def sideways(angle: float) -> np.ndarray:
    """Return the horizontal unit vector (2,) in this direction."""
    return np.array([np.cos(angle), np.sin(angle)])


class Grasper:
    """Reach for an object and grasp it: action (7,) = demonstrator(obs (D,)).

    One demonstrator plays one episode and draws from one stream. Its phases are hover (skipped in
    some episodes), descend, pause, close, and then either the subclass's lift, or release and
    another attempt.
    """

    OBJECT = slice(9, 12)  # where the observation holds the object's position
    OBJECT_QUAT = slice(12, 16)  # ... and its rotation
    NOISE = (0.05, 0.3)  # standard deviation of the noise on each action; one draw per episode
    WOBBLE = (0.0, 0.3)  # amplitude of a slow sideways sway
    SPEED = (0.5, 1.6)  # proportional gain: action = gain * error / REACH
    HOVER = (0.05, 0.14)  # height of the point above the grasp
    DIRECT = 0.35  # share of episodes that go straight to the object, without a hover point
    MISS = 0.35  # probability that an attempt aims beside the object, retries included
    MISS_OFFSET = (0.035, 0.06)  # how far beside
    MISS_HEIGHT = (0.0, 0.05)  # how far above
    REACHED = 0.014  # distance to the grasp at which the descent ends
    CENTRE = 0.006  # standard deviation of the grasp's offset from its ideal point
    DEPTH = (-0.012, 0.008)  # height of the grasp above its ideal point
    TURN = (0.0, 1.0)  # share of the angle to the object that the hand corrects
    CLOSE_STEPS = (4, 10)  # steps given to the fingers
    PAUSE_STEPS = (0, 8)  # steps of hesitation before they close
    LIFT_SPEED = (0.4, 1.0)
    LEVEL = 0.0  # share of its tilt that the hand takes back in a step while it reaches
    CARE = 1.0  # factor on MISS after each failed attempt
    STEADY: dict[str, float] = {}  # factor on the hand's shaking, by phase
    SYMMETRY = np.pi / 2  # the object looks the same to the fingers after this turn
    CLEAR = 0.88  # height from which another attempt begins

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.steps = 0
        self.attempts = 0
        self.phases = self._phases()
        self.gain = rng.uniform(*self.SPEED)
        self.hover = rng.uniform(*self.HOVER)
        self.turn = rng.uniform(*self.TURN)
        self.noise = rng.uniform(*self.NOISE)
        self.lift_speed = rng.uniform(*self.LIFT_SPEED)
        self.direct = rng.random() < self.DIRECT
        self.wobble = rng.uniform(*self.WOBBLE)
        self.wobble_rate = rng.uniform(0.1, 0.4)
        self.wobble_angle = rng.uniform(0, 2 * np.pi)
        self.close_steps = rng.integers(*self.CLOSE_STEPS)
        self.pause_steps = rng.integers(*self.PAUSE_STEPS)
        self._begin_attempt()

    def _phases(self) -> dict[str, Callable[[], Motion]]:
        """Return the method of each phase; subclasses add theirs."""
        return {
            "hover": self._hover,
            "descend": self._descend,
            "pause": self._pause,
            "close": self._close,
            "lift": self._lift,
            "release": self._release,
        }

    def _begin_attempt(self) -> None:
        rng = self.rng
        self.offset = np.append(rng.normal(0, self.CENTRE, 2), rng.uniform(*self.DEPTH))
        if rng.random() < self.MISS * self.CARE**self.attempts:
            angle = rng.uniform(0, 2 * np.pi)
            distance = rng.uniform(*self.MISS_OFFSET)
            self.offset[:2] += distance * sideways(angle)
            self.offset[2] = rng.uniform(*self.MISS_HEIGHT)
        self.attempts += 1
        self._enter("descend" if self.direct else "hover")

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.phase_steps = 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.steps += 1
        self.phase_steps += 1
        self._look(obs)
        action = np.zeros(7)
        action[:3], action[6] = self.phases[self.phase]()
        action[5] = self._twist()
        if self.phase in REACHING:
            action[3:5] = self.LEVEL * tilt(obs[QUAT]) / TWIST
        shake = self.STEADY.get(self.phase, 1.0)
        sway = shake * self.wobble * np.sin(self.wobble_rate * self.steps)
        action[:2] += sway * sideways(self.wobble_angle)
        action[:3] += self.rng.normal(0, shake * self.noise, 3)
        action[3:6] += self.rng.normal(0, 0.3 * shake * self.noise, 3)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _look(self, obs: np.ndarray) -> None:
        """Read hand, object and fingers from the observation."""
        self.eef = obs[EEF].astype(np.float64)
        self.eef_yaw = yaw(obs[QUAT])
        self.object = obs[self.OBJECT].astype(np.float64)
        self.object_yaw = yaw(obs[self.OBJECT_QUAT])
        self.object_axis = x_axis(obs[self.OBJECT_QUAT])
        self.opening = obs[FINGERS][0] - obs[FINGERS][1]

    def _towards(self, target: np.ndarray) -> np.ndarray:
        return self.gain * (target - self.eef) / REACH

    def _twist(self) -> float:
        """Turn the fingers to the object while the hand reaches for it."""
        if self.phase not in REACHING:
            return 0.0
        return self.turn * wrap(self.object_yaw - self.eef_yaw, self.SYMMETRY) / TWIST

    def _grasp_point(self) -> np.ndarray:
        return self.object

    def _hover(self) -> Motion:
        target = self._grasp_point() + self.offset + [0, 0, self.hover]
        if np.linalg.norm(target - self.eef) < 0.025 or self.phase_steps > 60:
            self._enter("descend")
        return self._towards(target), OPEN

    def _descend(self) -> Motion:
        target = self._grasp_point() + self.offset
        error = target - self.eef
        aside = np.linalg.norm(error[:2])
        if self.direct and aside > 0.02:  # come from above: do not sweep the object away
            target = target + [0, 0, min(0.06, 1.5 * aside)]
        if np.linalg.norm(error) < self.REACHED or self.phase_steps > 60:
            self._enter("pause")
        return self._towards(target), OPEN

    def _pause(self) -> Motion:
        if self.phase_steps > self.pause_steps:
            self._enter("close")
        return self._towards(self._grasp_point() + self.offset), OPEN

    def _close(self) -> Motion:
        if self.phase_steps > self.close_steps:
            self._enter("lift" if self.opening > 0.02 else "release")
        return np.zeros(3), CLOSED

    def _lift(self) -> Motion:
        raise NotImplementedError

    def _lost(self) -> bool:
        """Tell whether the object slipped out of the fingers."""
        return self.eef[2] - self._grasp_point()[2] > 0.05

    def _release(self) -> Motion:
        if self.phase_steps > 6 and self.eef[2] > self.CLEAR:
            self._begin_attempt()
        return np.array([0.0, 0.0, 0.6]), OPEN


class Carrier(Grasper):
    """Grasp an object, carry it over its goal, lower it and let go; try again where that fails.

    A subclass says where the goal is. The phases after the grasp are lift, carry, lower and drop.
    """

    OBJECT = slice(16, 19)  # after the object's pose relative to the hand
    OBJECT_QUAT = slice(19, 23)
    PACE = (0.65, 1.0)  # the fastest the hand moves; above 1 the controller would clip single axes
    HEIGHT = (1.0, 1.08)  # of the object while it is carried
    CUT = 0.35  # share of episodes that move sideways while still rising
    CARE = 0.6
    AIM = 0.01  # standard deviation of the aim over the goal
    ARRIVED = 0.02  # distance over the goal at which lowering begins

    def __init__(self, rng: np.random.Generator):
        self.pace = rng.uniform(*self.PACE)
        self.height = rng.uniform(*self.HEIGHT)
        self.cut = rng.random() < self.CUT
        super().__init__(rng)

    def _phases(self) -> dict[str, Callable[[], Motion]]:
        return super()._phases() | {
            "carry": self._carry,
            "lower": self._lower,
            "drop": self._drop,
        }

    def _begin_attempt(self) -> None:
        self.aim = np.append(self.rng.normal(0, self.AIM, 2), 0.0)
        super()._begin_attempt()

    def _towards(self, target: np.ndarray) -> np.ndarray:
        velocity = super()._towards(target)
        return velocity * min(1.0, self.pace / (np.linalg.norm(velocity) + 1e-9))

    def _carried(self, target: np.ndarray) -> np.ndarray:
        """Return the velocity that brings the object, not the hand, to the target."""
        return self._towards(self.eef + target - self.object)

    def _goal(self) -> np.ndarray:
        raise NotImplementedError

    def _lift(self) -> Motion:
        margin = 0.06 if self.cut else 0.02
        if self._lost() or self.phase_steps > 60:
            self._enter("release")
        elif self.object[2] > self.height - margin:
            self._enter("carry")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED

    def _carry(self) -> Motion:
        target = self._goal() + self.aim
        target[2] = self.height
        if self._lost():
            self._enter("release")
        elif self._over(target) or self.phase_steps > 160:
            self._enter("lower")
        return self._carried(target), CLOSED

    def _over(self, target: np.ndarray) -> bool:
        return np.linalg.norm((target - self.object)[:2]) < self.ARRIVED

    def _lower(self) -> Motion:
        raise NotImplementedError

    def _drop(self) -> Motion:
        """Let go and rise; where that did not finish the task, try again."""
        if self.phase_steps > 25 and self.eef[2] > self.CLEAR:
            self._begin_attempt()
        rise = 0.0 if self.phase_steps < 4 else 0.6
        return np.array([0.0, 0.0, rise]), OPEN
