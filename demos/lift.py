"""A scripted Lift demonstrator: grasp the cube, raise it.

    action = LiftDemonstrator(np.random.default_rng(0))(obs)        # obs (19,) -> action (7,)

Not here: the motions and their unevenness (motion.py).
"""

import numpy as np

from demos.motion import CLOSED, Grasper, Motion


class LiftDemonstrator(Grasper):
    """Play Lift: action (7,) = demonstrator(obs (19,)). A script of ours, not a person."""

    def _lift(self) -> Motion:
        if self._lost():
            self._enter("release")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED
