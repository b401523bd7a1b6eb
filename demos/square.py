"""A scripted Square demonstrator: grasp the nut by its handle, turn it to the peg, lower it over the peg."""
from __future__ import annotations

import numpy as np

from demos.motion import CLOSED, TWIST, Carrier, wrap

PEG = np.array([0.23, 0.10, 0.95])  # top of the square peg (robosuite's NutAssembly)
HANDLE = 0.06  # from the hole's centre to the grasp, along the nut's x axis; the handle is from 0.03 to 0.08
THREADED = 0.915  # the nut's height below which the peg holds it
SEATED = 0.868  # ... and below which robosuite calls it assembled (0.87), once the hand is away


class SquareDemonstrator(Carrier):
    """action (7,) = SquareDemonstrator(rng)(obs (23,)): one object per episode. Not a person: ours."""

    CLEAR = 0.95
    SPEED = (0.7, 1.6)
    NOISE = (0.02, 0.12)
    WOBBLE = (0.0, 0.08)  # the hole leaves 7 mm on each side of the peg
    CENTRE = 0.004
    DEPTH = (-0.008, 0.006)
    TURN = (0.8, 1.0)
    SYMMETRY = np.pi  # of the handle
    CLOSE_STEPS = (9, 16)  # the handle is thin; some rise too early all the same
    MISS = 0.05
    LEVEL = 0.5
    REACHED = 0.007
    DIRECT = 0.15
    HEIGHT = (1.0, 1.06)
    AIM = 0.002
    ARRIVED = 0.006
    SLIP = 0.05  # probability that the nut is set down beside the peg, on its edge, before another try
    SLIP_OFFSET = (0.012, 0.025)
    STEADY = {"descend": 0.6, "carry": 0.6, "lower": 0.4}
    FALL = 0.4  # share of episodes that let the threaded nut fall

    def __init__(self, rng: np.random.Generator):
        self.fall, self.tries = rng.random() < self.FALL, 0
        super().__init__(rng)

    def _begin_attempt(self) -> None:
        super()._begin_attempt()
        self._aim()

    def _aim(self) -> None:
        rng = self.rng
        self.aim = np.append(rng.normal(0, self.AIM, 2), 0.0)
        self.tries += 1
        if rng.random() < self.SLIP * self.CARE ** (self.tries - 1):
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*self.SLIP_OFFSET)
            self.aim[:2] += distance * np.array([np.cos(angle), np.sin(angle)])

    def _grasp_point(self) -> np.ndarray:
        return self.object + HANDLE * self.object_axis

    def _close(self):
        """Holds its place: the handle is thin."""
        return self._towards(self._grasp_point() + self.offset), super()._close()[1]

    def _lost(self) -> bool:
        """Slipped, or held by its ring: then the fingers are where the peg must go."""
        return super()._lost() or np.linalg.norm((self.eef - self._grasp_point())[:2]) > 0.035

    def _twist(self) -> float:
        if self.phase in ("carry", "lower"):
            return self.turn * wrap(-self.object_yaw, np.pi / 2) / TWIST  # the peg looks the same every quarter turn
        return super()._twist()

    def _goal(self) -> np.ndarray:
        return PEG.copy()

    def _over(self, target: np.ndarray) -> bool:
        return super()._over(target) and abs(wrap(self.object_yaw, np.pi / 2)) < 0.12

    def _lower(self):
        height = self.object[2]
        if self._lost() or height < (THREADED if self.fall else SEATED) or self.phase_steps > 60:
            self._enter("drop")
        elif self.phase_steps > 30 and height > THREADED:  # it sits on the peg's edge
            self._enter("raise")
        target = self._goal() + self.aim
        target[2] = height - 0.04
        return self._carried(target), CLOSED

    def _raise(self):
        if self._lost():
            self._enter("release")
        elif self.object[2] > self.height - 0.02 or self.phase_steps > 20:
            self._aim()
            self._enter("carry")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED
