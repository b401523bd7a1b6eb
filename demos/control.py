"""
What OGBench computes around the physics in a step of play, operation for operation and to the last bit, without its
objects (see benchmarks/README.md).

    direct(simulator)                           # after each reset: replaces simulator.set_control
    oracle.compute_plan = partial(plan, oracle)
    seen = look(simulator, task)                # all that following a plan and recording it take
    advance(simulator, action, seen)            # a step, nothing looked at
    observe(task, recording)                    # the observations of a whole trajectory at once

An action moves the gripper's pinch by (x, y, z), turns it about the vertical and opens or closes it; inverse kinematics
finds the joints. OGBench makes an object of every rotation on the way; here a rotation is four floats. Used where a
million steps are made (demos/ogbench.py); training steps the simulator too rarely to need it (envs.py).
"""
import math
from bisect import bisect

import numpy as np

CENTER = np.array([0.425, 0.0, 0.0])  # metres; observations count from here, in 10 cm


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
        aim = _times(_times(_about_z(float(action[3])), _about_z(_yaw(here.tolist()))), up)
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
    here, off, moved, turned, lines, angles = np.empty(4), np.empty(4), error[:3], error[3:], jacobian[:3], jacobian[3:]

    def solve(position, quaternion, joints, iterations=20, threshold=1e-4):
        data.qpos[:] = joints
        for _ in range(iterations):
            mujoco.mj_kinematics(model, data)
            np.subtract(position, place, out=moved)
            mujoco.mju_mat2Quat(here, turn)
            mujoco.mju_negQuat(here, here)
            mujoco.mju_mulQuat(off, quaternion, here)
            mujoco.mju_quat2Vel(turned, off, 1.0)
            if math.sqrt(max(moved.dot(moved), turned.dot(turned))) <= threshold:
                break
            mujoco.mj_comPos(model, data)  # for the Jacobian
            mujoco.mj_jacSite(model, data, lines, angles, site)
            update = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + damping, error)
            largest = max(map(abs, update.tolist()))
            if largest > ik._max_angle_change:
                update *= ik._max_angle_change / largest
            mujoco.mj_integratePos(model, data.qpos, update, 1.0)
        return data.qpos

    return solve


def look(simulator, task) -> dict:
    """What an oracle follows its plan by, under OGBench's names, and what observe() makes observations of."""
    import mujoco

    data, pinch, here = simulator._data, simulator._pinch_site_id, np.empty(4)
    mujoco.mju_mat2Quat(here, data.site_xmat[pinch])
    touch = np.linalg.norm(data.body("ur5e/robotiq/right_pad").cfrc_ext)
    opening = data.qpos[simulator._gripper_opening_joint_id] / 0.8
    seen = {"time": [data.time], "qpos": data.qpos.copy(), "qvel": data.qvel.copy(), "contact": [min(touch / 50, 1.0)],
            "proprio/effector_pos": data.site_xpos[pinch].copy(), "proprio/effector_yaw": [_yaw(here.tolist())],
            "proprio/gripper_opening": [min(max(opening, 0.0), 1.0)]}
    if task.goal.buttons:
        seen["button_states"], first = simulator._cur_button_states.copy(), 14 + 7 * len(task.goal.cubes)
        seen |= {f"privileged/button_{i}_pos": seen["qpos"][first + i, None] for i in range(len(task.goal.buttons))}
    return seen


def advance(simulator, action, seen) -> None:
    """A step from the state that was `seen`; action (5,) in [-1, 1]."""
    import mujoco

    simulator._prev_ob_info = seen  # a button is pressed when it gets from above to below a height
    simulator.set_control(action)
    mujoco.mj_step(simulator._model, simulator._data, nstep=simulator._n_steps)
    mujoco.mj_rnePostConstraint(simulator._model, simulator._data)  # contact forces
    simulator.post_step()


def observe(task, seen) -> np.ndarray:
    """The observations (T, D) of T states, from the columns of look()."""
    cubes, buttons, slides = map(len, task.goal)
    qpos, qvel, turn = seen["qpos"], seen["qvel"], seen["proprio/effector_yaw"]
    parts = [qpos[:, :6], qvel[:, :6], (seen["proprio/effector_pos"] - CENTER) * 10.0, np.cos(turn), np.sin(turn),
             seen["proprio/gripper_opening"] * 3.0, seen["contact"]]
    for i in range(cubes):
        place, rotation = np.split(qpos[:, 14 + 7 * i : 21 + 7 * i], [3], axis=1)
        turn = np.array([[_yaw(one)] for one in rotation.tolist()])  # one by one: an array's squares round differently
        parts += [(place - CENTER) * 10.0, rotation, np.cos(turn), np.sin(turn)]
    joints, speeds = qpos[:, 14 + 7 * cubes :, None], qvel[:, 14 + 6 * cubes :, None]
    for i in range(buttons):
        parts += [np.eye(2)[seen["button_states"][:, i]], joints[:, i] * 120.0, speeds[:, i]]
    for i, scale in zip(range(buttons, buttons + slides), (18.0, 15.0)):  # drawer, window
        parts += [joints[:, i] * scale, speeds[:, i]]
    return np.concatenate(parts, axis=1)


def plan(oracle, times, poses, grasps) -> np.ndarray:
    """PlanOracle.compute_plan: from keyframes to (steps, 5) poses of the pinch, with noise. All turns are vertical."""
    from scipy.ndimage import gaussian_filter1d

    steps, places, turns = [0.0], np.array([pose.translation() for pose in poses]), [pose.rotation() for pose in poses]
    while steps[-1] + oracle._env_dt < oracle._t_max:
        steps.append(steps[-1] + oracle._env_dt)
    between = [float((one.inverse() @ other).log()[2]) for one, other in zip(turns, turns[1:])]  # radians
    turns, yaws = [turn.wxyz.tolist() for turn in turns], []
    for time in steps:
        i = bisect(times, time) - 1
        share = min(max((time - times[i]) / (times[i + 1] - times[i]), 0.0), 1.0)
        yaws.append(_yaw(_times(turns[i], _about_z(share * between[i]))))
    columns = [*(np.interp(steps, times, column) for column in places.T), yaws, np.interp(steps, times, grasps)]
    noise = np.random.normal(0, 1, size=(len(steps), 5)) * np.array([0.05, 0.05, 0.05, 0.3, 1.0]) * oracle._noise
    return np.stack(columns, axis=1) + gaussian_filter1d(noise, axis=0, sigma=oracle._noise_smoothing)


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
