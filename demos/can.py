"""A scripted Can demonstrator: grasp the can, carry it over the wall, put or drop it into its bin.

    action = CanDemonstrator(np.random.default_rng(0))(obs)         # obs (23,) -> action (7,)

Not here: the motions and their unevenness (motion.py).
"""

import numpy as np

from demos.motion import CLOSED, REACHING, Carrier, Motion, wrap

BIN = np.array([0.1975, 0.4025, 0.82])  # centre of the can's quarter, on its floor (PickPlace)


class CanDemonstrator(Carrier):
    """Play Can: action (7,) = demonstrator(obs (23,)). A script of ours, not a person."""

    SPEED = (0.7, 1.6)
    STEADY = {"descend": 0.6, "pause": 0.6}  # open fingers leave 15 mm on each side of the can
    CLEAR = 0.96  # the bins' walls end at 0.9
    CENTRE = 0.008
    DEPTH = (-0.01, 0.02)
    CLOSE_STEPS = (9, 15)
    MISS = 0.15
    MISS_OFFSET = (0.055, 0.075)  # the can is wider than the cube
    MISS_HEIGHT = (0.02, 0.06)
    CARE = 0.4
    AIM = 0.02
    ARRIVED = 0.04
    GRIP = (-0.6, 0.6)  # the can is round: each attempt draws the hand's angle
    LET_GO = (0.87, 0.94)  # height of the can when the fingers open

    def _begin_attempt(self) -> None:
        self.grip = self.rng.uniform(*self.GRIP)
        self.let_go = self.rng.uniform(*self.LET_GO)
        super()._begin_attempt()

    def _twist(self) -> float:
        if self.phase not in REACHING:
            return 0.0
        return self.turn * wrap(self.grip - self.eef_yaw, np.pi)

    def _goal(self) -> np.ndarray:
        return BIN.copy()

    def _lower(self) -> Motion:
        if self._lost() or self.object[2] < self.let_go or self.phase_steps > 40:
            self._enter("drop")
        target = self._goal() + self.aim
        target[2] = self.let_go - 0.02
        return self._carried(target), CLOSED
