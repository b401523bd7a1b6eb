"""
OGBench's control law, operation for operation and to the last bit, without its objects (see benchmarks/README.md).

    direct(simulator)      # after each reset: replaces simulator.set_control

An action moves the gripper's pinch by (x, y, z), turns it about the vertical and opens or closes it; inverse kinematics
finds the joints. OGBench makes an object of every rotation on the way; here a rotation is four floats. Used where a
million steps are made (demos/ogbench.py); training steps the simulator too rarely to need it (envs.py).
"""
import math

import numpy as np


def direct(simulator) -> None:
    """Replaces the simulator's set_control(action), action (5,) in [-1, 1]."""
    import mujoco

    data, pinch, opening = simulator._data, simulator._pinch_site_id, simulator._gripper_opening_joint_id
    place, turn, here = data.site_xpos[pinch], data.site_xmat[pinch], np.empty(4)
    joints, arm, gripper = simulator._arm_joint_ids, simulator._arm_actuator_ids, simulator._gripper_actuator_ids
    low, high = simulator._workspace_bounds
    down, flange = simulator._effector_down_rotation, simulator._T_pa  # the second as seen from the pinch
    down, wrist, offset = down.wxyz.tolist(), flange.rotation().wxyz.tolist(), [0.0, *flange.translation().tolist()]
    up, solve = _inverse(down), _inverse_kinematics(simulator._ik)

    def set_control(action):
        action = simulator.unnormalize_action(action)
        mujoco.mju_mat2Quat(here, turn)
        aim = _times(_times(_about_z(action[3]), _about_z(_yaw(here.tolist()))), up)
        aim = _times(_about_z(_yaw(aim)), down)  # only the turn about the vertical stays
        moved = place + action[:3]
        np.clip(moved, low, high, out=moved)
        moved += _times(_times(aim, offset), _inverse(aim))[1:]  # from the pinch to the flange
        opened = min(max(data.qpos[opening] / 0.8, 0.0), 1.0) + action[4]
        data.ctrl[arm] = solve(moved, np.array(_times(aim, wrist)), data.qpos[joints])
        data.ctrl[gripper] = 255.0 * min(max(opened, 0.0), 1.0)

    simulator.set_control = set_control


def _inverse_kinematics(ik):
    """OGBench's damped least squares: position (3,), quaternion (4,), joints (6,) -> joints (6,)"""
    import mujoco

    model, data, (site,), damping = ik._model, ik._data, ik._site_ids, ik._damping
    place, turn, jacobian, error = data.site_xpos[site], data.site_xmat[site], np.empty((6, model.nv)), np.empty(6)
    here, off = np.empty(4), np.empty(4)

    def solve(position, quaternion, joints, iterations=20, threshold=1e-4):
        data.qpos[:] = joints
        for _ in range(iterations):
            mujoco.mj_kinematics(model, data)
            np.subtract(position, place, out=error[:3])
            mujoco.mju_mat2Quat(here, turn)
            mujoco.mju_negQuat(here, here)
            mujoco.mju_mulQuat(off, quaternion, here)
            mujoco.mju_quat2Vel(error[3:], off, 1.0)
            if all(math.sqrt(part.dot(part)) <= threshold for part in (error[:3], error[3:])):
                break
            mujoco.mj_comPos(model, data)  # for the Jacobian
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
            update = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + damping, error)
            largest = np.abs(update).max()
            if largest > ik._max_angle_change:
                update *= ik._max_angle_change / largest
            mujoco.mj_integratePos(model, data.qpos, update, 1.0)
        return data.qpos

    return solve


# Rotations as quaternions (w, x, y, z), summed in OGBench's order.
def _times(first, second):
    w0, x0, y0, z0 = first
    w1, x1, y1, z1 = second
    return (-x0 * x1 - y0 * y1 - z0 * z1 + w0 * w1, x0 * w1 + y0 * z1 - z0 * y1 + w0 * x1,
            -x0 * z1 + y0 * w1 + z0 * x1 + w0 * y1, x0 * y1 - y0 * x1 + z0 * w1 + w0 * z1)


def _inverse(rotation):
    w, x, y, z = rotation
    return w, -x, -y, -z


def _about_z(angle: float):
    squared = angle * angle
    if squared < 1e-10:
        return 1.0 - squared / 8.0 + squared * squared / 384.0, 0.0, 0.0, (
            0.5 - squared / 48.0 + squared * squared / 3840.0) * angle
    size = math.sqrt(squared)
    return float(np.cos(0.5 * size)), 0.0, 0.0, float(np.sin(0.5 * size) / size) * angle


def _yaw(rotation) -> float:
    w, x, y, z = rotation
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2)))
