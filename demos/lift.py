"""
A scripted Lift demonstrator: it reads only the observation, like a policy, and is as uneven as a group of people.

Each episode draws a style: how fast, from how high, straight or by way of a point above the cube, how well centred
and turned the grasp is, how long the fingers take, how much the hand shakes. Some attempts miss the cube, close on
nothing or stop short, open again, rise and retry. The constants below are the knobs: NOISE and MISS make cloning the
data hard, the ranges make it multi-modal.
"""
from __future__ import annotations

import numpy as np

NOISE = (0.05, 0.3)  # standard deviation of the noise added to each action; one draw per episode
WOBBLE = (0.0, 0.3)  # amplitude of a slow sideways sway
SPEED = (0.5, 1.6)  # proportional gain: action = gain * error / 5 cm
HOVER = (0.05, 0.14)  # height of the point above the cube, in metres
DIRECT = 0.35  # share of episodes that go straight to the cube, without a hover point
MISS = 0.35  # probability that an attempt aims beside the cube (the retry after it may miss again)
MISS_OFFSET = (0.035, 0.06)  # how far beside, in metres
CENTRE = 0.006  # standard deviation of the grasp's offset from the cube's centre, in metres
TURN = (0.0, 1.0)  # share of the angle to the cube's faces that the hand corrects
CLOSE_STEPS = (4, 10)  # steps given to the fingers
PAUSE_STEPS = (0, 8)  # steps of hesitation before they close
LIFT_SPEED = (0.4, 1.0)
TABLE = 0.8  # height of the table top

EEF, QUAT, FINGERS, CUBE, CUBE_QUAT = slice(0, 3), slice(3, 7), slice(7, 9), slice(9, 12), slice(12, 16)
OPEN, CLOSED = -1.0, 1.0


def _yaw(quaternion: np.ndarray) -> float:
    """Angle of the body's x axis about the vertical; quaternion is (x, y, z, w)."""
    x, y, z, w = quaternion
    return float(np.arctan2(2 * (x * y + z * w), 1 - 2 * (y * y + z * z)))


class LiftDemonstrator:
    """demonstrator = LiftDemonstrator(rng); action = demonstrator(obs). One object per episode."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.steps = rng, 0
        self.gain, self.hover, self.turn = rng.uniform(*SPEED), rng.uniform(*HOVER), rng.uniform(*TURN)
        self.noise, self.lift_speed = rng.uniform(*NOISE), rng.uniform(*LIFT_SPEED)
        self.direct = rng.random() < DIRECT
        self.wobble, self.wobble_rate = rng.uniform(*WOBBLE), rng.uniform(0.1, 0.4)
        self.wobble_angle = rng.uniform(0, 2 * np.pi)
        self.close_steps, self.pause_steps = rng.integers(*CLOSE_STEPS), rng.integers(*PAUSE_STEPS)
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        rng = self.rng
        self.offset = np.append(rng.normal(0, CENTRE, 2), rng.uniform(-0.012, 0.008))
        self.missing = rng.random() < MISS
        if self.missing:
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*MISS_OFFSET)
            self.offset[:2] += distance * np.array([np.cos(angle), np.sin(angle)])
            self.offset[2] = rng.uniform(0.0, 0.05)  # beside the cube, or just above it
        self._enter("descend" if self.direct else "hover")

    def _enter(self, phase: str) -> None:
        self.phase, self.phase_steps = phase, 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.steps, self.phase_steps = self.steps + 1, self.phase_steps + 1
        eef, cube = obs[EEF].astype(np.float64), obs[CUBE].astype(np.float64)
        action = np.zeros(7)
        action[:3], action[6] = getattr(self, "_" + self.phase)(eef, cube, obs)
        angle = _yaw(obs[CUBE_QUAT]) - _yaw(obs[QUAT])
        angle = (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4  # the cube looks the same every quarter turn
        if self.phase in ("hover", "descend"):
            action[5] = self.turn * angle / 0.5
        sway = self.wobble * np.sin(self.wobble_rate * self.steps)
        action[:2] += sway * np.array([np.cos(self.wobble_angle), np.sin(self.wobble_angle)])
        action[:3] += self.rng.normal(0, self.noise, 3)
        action[3:6] += self.rng.normal(0, 0.3 * self.noise, 3)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _towards(self, eef: np.ndarray, target: np.ndarray) -> np.ndarray:
        return self.gain * (target - eef) / 0.05

    def _hover(self, eef, cube, obs):
        target = cube + self.offset + [0, 0, self.hover]
        if np.linalg.norm(target - eef) < 0.025 or self.phase_steps > 60:
            self._enter("descend")
        return self._towards(eef, target), OPEN

    def _descend(self, eef, cube, obs):
        target = cube + self.offset
        error = target - eef
        if self.direct and np.linalg.norm(error[:2]) > 0.02:
            target = target + [0, 0, min(0.06, 1.5 * np.linalg.norm(error[:2]))]  # do not sweep the cube away
        if np.linalg.norm(error) < 0.014 or self.phase_steps > 60:
            self._enter("pause")
        return self._towards(eef, target), OPEN

    def _pause(self, eef, cube, obs):
        if self.phase_steps > self.pause_steps:
            self._enter("close")
        return self._towards(eef, cube + self.offset), OPEN

    def _close(self, eef, cube, obs):
        if self.phase_steps > self.close_steps:
            self._enter("lift" if obs[FINGERS][0] - obs[FINGERS][1] > 0.02 else "release")
        return np.zeros(3), CLOSED

    def _lift(self, eef, cube, obs):
        if eef[2] - cube[2] > 0.05:  # it slipped out
            self._enter("release")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED

    def _release(self, eef, cube, obs):
        if self.phase_steps > 6 and eef[2] > TABLE + 0.08:
            self._begin_attempt()
        return np.array([0.0, 0.0, 0.6]), OPEN
