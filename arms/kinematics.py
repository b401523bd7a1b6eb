"""Forward and inverse kinematics of any arm that MuJoCo can read, as its profile describes it.

    from arms.kinematics import Kinematics
    kinematics = Kinematics(mjcf_text, ["joint_1", ..., "joint_6"], limits)    # limits (J, 2) rad
    position, rotation = kinematics.fk(joints)        # (J,) rad -> (3,) m, (3, 3) in the base frame
    joints, position_error, rotation_error = kinematics.ik(position, rotation, start=joints)

One FK takes 10 us, one IK along a path 0.3 ms. The tool centre point (TCP) is a site of the model.
Not here: workspaces (guard.py), profiles and their units (profile.py), the Piper (piper_model.py).
Shapes: J joints, from the base to the tool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arms.rotation import load_mujoco, rotation_vector


class Kinematics:
    """FK and IK of the tool centre point. It owns its model and data: one object per thread.

    model: MJCF or URDF text. joints: names of the J joints in the model. limits (J, 2) in
    radians. tool: the site that is the TCP. turn_weight: how many metres an error of one
    radian counts as in the IK; below 1 for arms of five joints, which cannot reach every rotation
    and should then keep the place.
    """

    def __init__(
        self,
        model: str,
        joints: Sequence[str],
        limits,
        tool: str = "tcp",
        turn_weight: float = 1.0,
    ):
        mujoco = load_mujoco()
        self._mujoco = mujoco
        self._model = mujoco.MjModel.from_xml_string(model)
        self._data = mujoco.MjData(self._model)
        self.joints = tuple(joints)
        self.limits = np.array(limits, dtype=np.float64)
        self._qpos = np.array([self._model.joint(name).qposadr[0] for name in joints])
        self._dofs = np.array([self._model.joint(name).dofadr[0] for name in joints])
        self._site = self._model.site(tool).id
        self._weights = np.array([1.0] * 3 + [turn_weight] * 3)
        self._linear = np.zeros((3, self._model.nv))
        self._angular = np.zeros((3, self._model.nv))

    def fk(self, joints) -> tuple[np.ndarray, np.ndarray]:
        """Return position (3,) in metres and rotation (3, 3) of the TCP for joints (J,) in radians.

        Joints beyond their limits are fine; ValueError for another count or what is not finite.
        """
        joints = np.asarray(joints, dtype=np.float64)
        if joints.shape != self._qpos.shape or not np.isfinite(joints).all():
            raise ValueError(f"joints are {len(self._qpos)} finite angles, got {joints}")
        self._data.qpos[self._qpos] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        position = self._data.site_xpos[self._site].copy()
        rotation = self._data.site_xmat[self._site].reshape(3, 3).copy()
        return position, rotation

    def ik(
        self, position, rotation, start, iterations: int = 60, tolerance: float = 1e-6
    ) -> tuple[np.ndarray, float, float]:
        """Solve for joints (J,) by damped least squares from `start` (J,), inside the limits.

        position (3,) in metres, rotation (3, 3). Returns the joints and what is missing to the
        target in metres and radians: a target out of reach leaves an error and never raises.
        ValueError for a target that is not finite. The solution is the one continuous with
        `start`.
        """
        position = np.asarray(position, dtype=np.float64)
        rotation = np.asarray(rotation, dtype=np.float64)
        if not (np.isfinite(position).all() and np.isfinite(rotation).all()):
            raise ValueError(f"the target pose is not finite: {position}, {rotation}")
        joints = np.clip(np.asarray(start, dtype=np.float64), *self.limits.T)
        best = joints
        best_error = np.inf
        damping = 1e-4
        for _ in range(iterations):
            error = self._error(joints, position, rotation)
            size = np.linalg.norm(error)
            if size < best_error:
                best = joints
                best_error = size
                damping = max(damping / 4, 1e-8)
            else:  # overshot: back, with more damping
                joints = best
                damping = damping * 8
                error = self._error(joints, position, rotation)
            if best_error < tolerance or damping > 1e3:
                break
            joints = self._step(joints, error, damping)
        missing = self._error(best, position, rotation) / self._weights
        return best, float(np.linalg.norm(missing[:3])), float(np.linalg.norm(missing[3:]))

    def _error(self, joints, position, rotation) -> np.ndarray:
        """Return what is missing to the target (6,): metres, then weighted radians."""
        here, turned = self.fk(joints)
        error = np.concatenate([position - here, rotation_vector(rotation @ turned.T)])
        return error * self._weights

    def _step(self, joints, error, damping) -> np.ndarray:
        """Take one damped step; the other joints make up for one at the end of its range."""
        self._mujoco.mj_comPos(self._model, self._data)
        self._mujoco.mj_jacSite(self._model, self._data, self._linear, self._angular, self._site)
        jacobian = np.vstack([self._linear, self._angular])[:, self._dofs]
        # in one memory order everywhere, so that BLAS rounds alike
        jacobian = np.ascontiguousarray(jacobian) * self._weights[:, None]
        free = np.ones(len(joints), dtype=bool)
        low, high = self.limits.T
        for _ in range(len(joints)):
            used = jacobian * free
            change = used.T @ np.linalg.solve(used @ used.T + damping * np.eye(6), error)
            change *= min(1.0, 0.5 / (np.abs(change).max() + 1e-12))
            target = joints + change
            below = (target < low) & (joints <= low)
            above = (target > high) & (joints >= high)
            stuck = free & (below | above)
            if not stuck.any():
                break
            free &= ~stuck
        return np.clip(target, low, high)
