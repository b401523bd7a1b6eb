"""
The Piper's kinematics: one mesh-free MJCF from the maker's DH numbers, used by the simulated arm and by the real one.

    from arms.kinematics import Kinematics
    kinematics = Kinematics()
    position, rotation = kinematics.fk(joints)                        # (6,) rad -> (3,) m, (3, 3) in the base frame
    joints, position_error, rotation_error = kinematics.ik(position, rotation, start=joints)

One FK takes 10 us, an IK along a path 0.3 ms. The tool centre point (TCP) is the point midway between the fingertips,
`tool` metres beyond the flange along the flange's z axis; the fingers slide along its y axis. Base frame: x forward,
y left, z up, origin on the mounting plane.
Not here: dynamics and tasks (sim.py), limits of the workspace and of speeds (robot.py's Guard), meshes.
"""
from __future__ import annotations

import functools

import numpy as np

import envs

LENGTH = (0.0, 0.0, 0.28503, -0.02198, 0.0, 0.0)  # modified DH: a, metres
TWIST = (0.0, -90.0, 0.0, 90.0, -90.0, 90.0)  # alpha, degrees
OFFSET = (0.123, 0.0, 0.0, 0.25075, 0.0, 0.091)  # d, metres; the last one ends at the flange
TURN = {1: (0.0, -172.22, -102.78, 0.0, 0.0, 0.0),  # theta at zero, degrees; the maker's `dh_is_offset`: 1 is newer,
        0: (0.0, -174.22, -100.78, 0.0, 0.0, 0.0)}  # 0 older, about 10 mm away at the flange
RANGE = ((-150, 150), (0, 180), (-170, 0), (-100, 100), (-70, 70), (-120, 120))  # degrees
TOOL = 0.1358  # metres from the flange to the TCP of AgileX's parallel gripper
OPENING = 0.07  # metres between the fingers when open
JOINTS = tuple(f"joint_{i}" for i in range(1, 7))
STIFFNESS = (800, 800, 800, 150, 150, 100)  # of the simulated servos, N m / rad
TORQUE = (60, 60, 60, 20, 20, 20)  # what they can give, N m
ARMATURE = (0.5, 0.5, 0.5, 0.08, 0.08, 0.05)  # rotor inertia as the joint feels it, kg m^2


def limits() -> np.ndarray:
    """Joint limits (6, 2) in radians."""
    return np.radians(np.array(RANGE, dtype=np.float64))


def mjcf(hand: str = "", world: str = "", options: str = "", dh_is_offset: int = 1, tool: float = TOOL) -> str:
    """
    The arm as MJCF text. `hand` goes into the body at the TCP (the hand), `world` beside the arm
    and after it, so that the arm's joints stay the first ones, `options` in front.
    Bodies link_1..link_6, hand, finger_left, finger_right; joints joint_1..joint_6, then two slides that move together;
    seven position servos, the last in metres of one finger; gravity is compensated on every body of the arm.
    """
    if dh_is_offset not in TURN:
        raise ValueError(f"dh_is_offset is 0 (older arms) or 1, got {dh_is_offset!r}")
    opening, closing = "", ""
    for i, ((low, high), turn) in enumerate(zip(RANGE, TURN[dh_is_offset], strict=True)):
        twist, end = np.radians(TWIST[i]), (LENGTH[i + 1], OFFSET[i + 1]) if i < 5 else (0.0, 0.0)
        place = f"{LENGTH[i]} {-np.sin(twist) * OFFSET[i]!r} {np.cos(twist) * OFFSET[i]!r}"
        x, y = np.radians(TWIST[i]) / 2, np.radians(turn) / 2
        quaternion = (np.cos(x) * np.cos(y), np.sin(x) * np.cos(y), -np.sin(x) * np.sin(y), np.cos(x) * np.sin(y))
        shape = f"0 0 0 {end[0]} {'0 ' + repr(-end[1]) if i == 4 else repr(-end[1]) + ' 0' if i == 2 else '0 0.001'}"
        opening += (f'<body name="link_{i + 1}" pos="{place}" quat="{" ".join(map(repr, map(float, quaternion)))}" '
                    f'gravcomp="1"><joint name="joint_{i + 1}" axis="0 0 1" range="{low} {high}" '
                    f'armature="{ARMATURE[i]}" damping="1"/>'
                    f'<geom type="capsule" size="0.03" fromto="{shape}" contype="0" conaffinity="0" '
                    'rgba=".9 .9 .9 1"/>')
        closing += "</body>"
    palm = max(tool - 0.055, 0.01) / 2
    fingers = "".join(
        f'<body name="finger_{side}" gravcomp="1"><joint name="finger_{side}" type="slide" axis="0 {sign} 0" '
        f'range="0 {OPENING / 2}" armature="0.2" damping="20"/><geom class="hand" name="finger_{side}" type="box" '
        f'pos="0 {sign * 0.006} -0.025" size="0.009 0.006 0.03" friction="2 0.05 0.001" rgba=".2 .2 .2 1"/></body>'
        for side, sign in (("left", 1), ("right", -1)))
    servos = "".join(f'<position name="{name}" joint="{name}" kp="{kp}" dampratio="1" forcerange="{-force} {force}"/>'
                     for name, kp, force in zip(JOINTS, STIFFNESS, TORQUE, strict=True))
    servos += '<position name="gripper" joint="finger_left" kp="1500" dampratio="1" forcerange="-40 40"/>'
    return f"""<mujoco model="piper">
<compiler angle="degree" autolimits="true"/>{options}
<default><default class="hand"><geom contype="2" conaffinity="1" density="300"/></default></default>
<worldbody>
<geom type="cylinder" size="0.05 0.04" pos="0 0 0.04" contype="0" conaffinity="0" rgba=".3 .3 .3 1"/>
{opening}
<geom class="hand" name="palm" type="box" pos="0 0 {palm}" size="0.02 0.045 {palm}"/>
<body name="hand" pos="0 0 {tool}" gravcomp="1"><site name="tcp" size="0.002"/>{hand}{fingers}</body>
{closing}
{world}</worldbody>
<equality><joint joint1="finger_right" joint2="finger_left"/></equality>
<actuator>{servos}</actuator></mujoco>"""


@functools.cache
def _mujoco():
    """Imported once: the import machinery is slower than the whole FK."""
    return envs._import("mujoco", False)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) in radians of a rotation matrix (3, 3); exact also near half a turn."""
    mujoco = _mujoco()
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation, dtype=np.float64).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


class Kinematics:
    """
    FK and IK of the tool centre point; owns its own model and data, so use one object per thread.
    dh_is_offset: 1 for newer arms, 0 for older ones, as the maker's SDK asks; tool: metres from the flange to the TCP.
    """

    def __init__(self, dh_is_offset: int = 1, tool: float = TOOL):
        self._mujoco = mujoco = _mujoco()
        self._model = mujoco.MjModel.from_xml_string(mjcf(dh_is_offset=dh_is_offset, tool=tool))
        self._data = mujoco.MjData(self._model)
        self._site, self.limits = self._model.site("tcp").id, limits()  # (6, 2) radians
        self._linear, self._angular = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))

    def fk(self, joints) -> tuple[np.ndarray, np.ndarray]:
        """joints (6,) radians, also beyond the limits -> position (3,) metres, rotation (3, 3) of the TCP."""
        joints = np.asarray(joints, dtype=np.float64)
        if joints.shape != (6,) or not np.isfinite(joints).all():
            raise ValueError(f"joints are 6 finite angles, got {joints}")
        self._data.qpos[:6] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[self._site].copy(), self._data.site_xmat[self._site].reshape(3, 3).copy()

    def ik(self, position, rotation, start, iterations: int = 60, tolerance: float = 1e-6):
        """
        Damped least squares from `start` (6,), inside the limits: position (3,) metres, rotation (3, 3) ->
        joints (6,), position error in metres, rotation error in radians. What cannot be reached leaves an error, never
        raises; a target that is not finite raises ValueError. The solution is the one continuous with `start`.
        """
        position, rotation = np.asarray(position, dtype=np.float64), np.asarray(rotation, dtype=np.float64)
        if not (np.isfinite(position).all() and np.isfinite(rotation).all()):
            raise ValueError(f"the target pose is not finite: {position}, {rotation}")
        joints = np.clip(np.asarray(start, dtype=np.float64), *self.limits.T)
        best, best_error, damping = joints, np.inf, 1e-4
        for _ in range(iterations):
            error = self._error(joints, position, rotation)
            size = np.linalg.norm(error)
            if size < best_error:
                best, best_error, damping = joints, size, max(damping / 4, 1e-8)
            else:  # overshot: back, with more damping
                joints, damping = best, damping * 8
                error = self._error(joints, position, rotation)
            if best_error < tolerance or damping > 1e3:
                break
            joints = self._step(joints, error, damping)
        error = self._error(best, position, rotation)
        return best, float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:]))

    def _error(self, joints, position, rotation) -> np.ndarray:
        """What is missing to the target (6,): metres, then radians, in the base frame."""
        here, turned = self.fk(joints)
        return np.concatenate([position - here, rotation_vector(rotation @ turned.T)])

    def _step(self, joints, error, damping) -> np.ndarray:
        """One damped step; a joint that would leave its range stays at the end of it and the others make up for it."""
        self._mujoco.mj_comPos(self._model, self._data)
        self._mujoco.mj_jacSite(self._model, self._data, self._linear, self._angular, self._site)
        jacobian, free = np.vstack([self._linear[:, :6], self._angular[:, :6]]), np.ones(6, dtype=bool)
        for _ in range(6):
            used = jacobian * free
            change = used.T @ np.linalg.solve(used @ used.T + damping * np.eye(6), error)
            change *= min(1.0, 0.5 / (np.abs(change).max() + 1e-12))
            target = joints + change
            stuck = free & (((target < self.limits[:, 0]) & (joints <= self.limits[:, 0]))
                            | ((target > self.limits[:, 1]) & (joints >= self.limits[:, 1])))
            if not stuck.any():
                break
            free &= ~stuck
        return np.clip(target, *self.limits.T)
