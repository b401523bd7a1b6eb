"""A scripted Square demonstrator: grasp the nut by its handle, turn it, lower it over the peg.

    action = SquareDemonstrator(np.random.default_rng(0))(obs)      # obs (23,) -> action (7,)

Not here: the motions and their unevenness (motion.py).
"""

from collections.abc import Callable

import numpy as np

from demos.motion import CLOSED, TWIST, Carrier, Motion, sideways, wrap

PEG = np.array([0.23, 0.10, 0.95])  # top of the square peg (robosuite's NutAssembly)
HANDLE = 0.06  # from the hole's centre to the grasp along the nut's x axis; it spans 0.03 to 0.08
THREADED = 0.915  # the nut's height below which the peg holds it
SEATED = 0.868  # ... and below which robosuite counts it as assembled (0.87) once the hand is away


class SquareDemonstrator(Carrier):
    """Play Square: action (7,) = demonstrator(obs (23,)). A script of ours, not a person."""

    CLEAR = 0.95
    SPEED = (0.7, 1.6)
    NOISE = (0.02, 0.12)
    WOBBLE = (0.0, 0.08)  # the hole leaves 7 mm on each side of the peg
    CENTRE = 0.004
    DEPTH = (-0.008, 0.006)
    TURN = (0.8, 1.0)
    SYMMETRY = np.pi  # of the handle
    CLOSE_STEPS = (9, 16)  # the handle is thin; even so, some hands rise too early
    MISS = 0.05
    LEVEL = 0.5
    REACHED = 0.007
    DIRECT = 0.15
    HEIGHT = (1.0, 1.06)
    AIM = 0.002
    ARRIVED = 0.006
    SLIP = 0.05  # probability of setting the nut down beside the peg, on its edge, before a retry
    SLIP_OFFSET = (0.012, 0.025)
    STEADY = {"descend": 0.6, "carry": 0.6, "lower": 0.4}
    FALL = 0.4  # share of episodes that let the threaded nut fall

    def __init__(self, rng: np.random.Generator):
        self.fall = rng.random() < self.FALL
        self.tries = 0
        super().__init__(rng)

    def _phases(self) -> dict[str, Callable[[], Motion]]:
        return super()._phases() | {"raise": self._raise}

    def _begin_attempt(self) -> None:
        super()._begin_attempt()
        self._take_aim()

    def _take_aim(self) -> None:
        rng = self.rng
        self.aim = np.append(rng.normal(0, self.AIM, 2), 0.0)
        self.tries += 1
        if rng.random() < self.SLIP * self.CARE ** (self.tries - 1):
            angle = rng.uniform(0, 2 * np.pi)
            distance = rng.uniform(*self.SLIP_OFFSET)
            self.aim[:2] += distance * sideways(angle)

    def _grasp_point(self) -> np.ndarray:
        return self.object + HANDLE * self.object_axis

    def _close(self) -> Motion:
        """Hold the hand in place while the fingers close: the handle is thin."""
        hold = self._towards(self._grasp_point() + self.offset)
        _, fingers = super()._close()
        return hold, fingers

    def _lost(self) -> bool:
        """Tell whether the nut slipped, or is held by its ring, where the peg must go."""
        aside = np.linalg.norm((self.eef - self._grasp_point())[:2])
        return super()._lost() or aside > 0.035

    def _twist(self) -> float:
        if self.phase in ("carry", "lower"):  # the peg looks the same after every quarter turn
            return self.turn * wrap(-self.object_yaw, np.pi / 2) / TWIST
        return super()._twist()

    def _goal(self) -> np.ndarray:
        return PEG.copy()

    def _over(self, target: np.ndarray) -> bool:
        return super()._over(target) and abs(wrap(self.object_yaw, np.pi / 2)) < 0.12

    def _lower(self) -> Motion:
        height = self.object[2]
        released_at = THREADED if self.fall else SEATED
        if self._lost() or height < released_at or self.phase_steps > 60:
            self._enter("drop")
        elif self.phase_steps > 30 and height > THREADED:  # it sits on the peg's edge
            self._enter("raise")
        target = self._goal() + self.aim
        target[2] = height - 0.04
        return self._carried(target), CLOSED

    def _raise(self) -> Motion:
        if self._lost():
            self._enter("release")
        elif self.object[2] > self.height - 0.02 or self.phase_steps > 20:
            self._take_aim()
            self._enter("carry")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED
