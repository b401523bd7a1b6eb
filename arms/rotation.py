"""Rotation matrices from rotation vectors and back: the project's one helper for rotations.

    from arms.rotation import rotation_matrix, rotation_vector
    rotation = rotation_matrix([0.0, 0.0, 0.3])     # (3, 3), 0.3 rad about z
    vector = rotation_vector(rotation)              # (3,), axis times angle

Both take a few microseconds, several times less than scipy's Rotation: the IK calls them sixty
times per period.
Not here: quaternions, Euler angles.
"""

from __future__ import annotations

import functools

import numpy as np

from simulators import import_simulator


@functools.cache
def load_mujoco():
    """Import MuJoCo once, without a display; looking the module up costs more than a whole FK."""
    return import_simulator("mujoco", False)


def rotation_matrix(vector) -> np.ndarray:
    """Turn a rotation vector (3,), axis times angle in radians, into a matrix (3, 3).

    Rodrigues' formula.
    """
    angle = np.linalg.norm(vector)
    x, y, z = np.asarray(vector, float) / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_vector(rotation) -> np.ndarray:
    """Turn a matrix (3, 3) into a rotation vector (3,) in radians; exact also near half a turn."""
    mujoco = load_mujoco()
    quaternion = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation, dtype=np.float64).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
