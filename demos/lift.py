"""A scripted Lift demonstrator: grasp the cube, raise it. The motions and their unevenness are motion.py's."""
from __future__ import annotations

import numpy as np

from demos.motion import CLOSED, Grasper


class LiftDemonstrator(Grasper):
    """action (7,) = LiftDemonstrator(rng)(obs (19,)): one object per episode. Not a person: ours."""

    def _lift(self):
        if self._lost():
            self._enter("release")
        return np.array([0.0, 0.0, self.lift_speed]), CLOSED
