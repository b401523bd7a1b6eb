"""
The same arm without hardware: the Piper's kinematics in MuJoCo, a table and two tasks, behind the real arm's protocol.

    arm = SimArm(task="peg", seed=0)                       # "cube": pick it up; realtime=False: as fast as it goes
    arm.connect()
    arm.reset(seed=7)
    sent = arm.send_action({"joint_1.pos": 0.1, ..., "gripper.pos": 0.0})      # rad, metres; returns what was sent
    arm.get_observation()["object.x"], arm.success()

One control period (1/15 s) takes 2 ms, two pictures by a software renderer 20 ms more. With realtime=True simulated
time follows the clock, as an arm does; otherwise every send_action advances one period and an episode is a function of
(reset seed, actions), bitwise. Objects start within Table III's ranges (Insert USB, Pick Cube).
peg: a square peg, clamped in the hand for good, goes 2 cm into a socket that is `clearance` metres wider on each side.
cube: a 4 cm cube is lifted by 8 cm.
Ours, since no arm has them: reset, success, observe, object.*, and the faults freeze_state, freeze_cameras, unplug.
Not here: the safety guard and the loop (robot.py), the scripted expert (teleop.py), the real arm (piper.py).
"""
from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time

import numpy as np

import arms
import envs
from arms.kinematics import JOINTS, OPENING, Kinematics, limits, mjcf
from logbook import UserError

PERIOD, SUBSTEPS = 1 / 15, 32  # seconds of control; physics steps in it
SPEED = np.radians(110.0)  # of the servos, rad/s: half of what the Piper's can do
TABLE = -0.10  # height of the table below the arm's mounting plane, metres
DOWN = np.diag([-1.0, 1.0, -1.0])  # the tool points down, the fingers slide along y
PEG, PEG_LENGTH, SOCKET, DEPTH = 0.008, 0.04, 0.03, 0.02  # half width; beyond the TCP; height; of a success
CUBE, LIFTED = 0.02, 0.08  # half width; height of a success
RANGES = {"peg": (0.05, 0.05), "cube": (0.25, 0.10)}  # Table III: where the object may start, metres in x and y
STARTS = {"peg": ((0.30, 0.0, 0.01), 2 * PEG), "cube": ((0.30, 0.0, 0.03), 0.06)}  # TCP and opening at the start
GRIPS = {"peg": (2 * PEG, 2 * PEG), "cube": (0.0, OPENING)}  # the fingers clamp the peg, whatever is commanded
CAMERAS = ("front", "wrist")
KEYS = tuple(f"{name}.pos" for name in (*JOINTS, "gripper"))
OBJECT = ("object.x", "object.y", "object.z", "object.yaw")  # the cube's centre, the middle of the hole's entrance


def _scene(task: str, clearance: float) -> str:
    """MJCF of the arm in its task."""
    hole, outer = PEG + clearance, 0.03
    middle, width = (hole + outer) / 2, (outer - hole) / 2
    walls = "".join(f'<geom type="box" pos="{x} {y} {SOCKET / 2}" size="{w} {h} {SOCKET / 2}" rgba=".2 .4 .7 1"/>'
                    for x, y, w, h in ((middle, 0, width, outer), (-middle, 0, width, outer),
                                       (0, middle, hole, width), (0, -middle, hole, width)))
    body = {"peg": f'<body name="object" mocap="true" pos="0.3 0 {TABLE}">{walls}</body>',
            "cube": f'<body name="object" pos="0.3 0 {TABLE + CUBE}"><freejoint/><geom type="box" density="300" '
                    f'size="{CUBE} {CUBE} {CUBE}" friction="1 0.05 0.001" rgba=".8 .2 .2 1"/></body>'}[task]
    peg = (f'<geom class="hand" name="peg" type="box" pos="0 0 {PEG_LENGTH / 2 - 0.01}" '
           f'size="{PEG} {PEG} {PEG_LENGTH / 2 + 0.01}" friction="0.4 0.05 0.001" rgba=".9 .7 .1 1"/>')
    eye = '<camera name="wrist" pos="0.07 0 -0.06" xyaxes="0 1 0 0.8 0 0.6" fovy="70"/>'
    world = ('<light pos="0.3 0.5 1.5" dir="0 -0.3 -1" castshadow="false"/>'
             '<light pos="0.8 -0.4 1.2" dir="-0.4 0.3 -1" castshadow="false"/>'
             f'<geom type="box" name="table" pos="0.3 0 {TABLE - 0.02}" size="0.35 0.4 0.02" rgba=".6 .5 .4 1"/>'
             f'<camera name="front" pos="0.75 0 0.15" xyaxes="0 1 0 -0.45 0 0.9" fovy="35"/>{body}')
    options = (f'<option timestep="{PERIOD / SUBSTEPS!r}" integrator="implicitfast" cone="elliptic" impratio="10"/>'
               '<statistic center="0.3 0 0" extent="0.6"/><visual><global offwidth="640" offheight="640"/>'
               '<quality shadowsize="0" offsamples="0"/></visual>')
    return mjcf(hand=eye + (peg if task == "peg" else ""), world=world, options=options)


@functools.cache
def can_draw() -> bool:
    """Does OpenGL work here? Asked once, of another process: a bad driver may crash. MUJOCO_GL=disable means no."""
    if arms.MUJOCO_GL == "disable":
        return False
    code = ("import envs; mujoco = envs._import('mujoco', True); mujoco.Renderer("
            "mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).render()")
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    environment |= {"PYTHONPATH": os.path.dirname(os.path.abspath(envs.__file__))}
    try:
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                              timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class SimArm:
    """
    task: "peg" or "cube"; seed: of the resets that get none; cameras: True, False or None (if OpenGL works); size: of
    the square pictures, pixels; clearance: of the peg in its hole, metres on each side. Connecting resets.
    `rest` (6,) are the joints a shutdown moves to, `kinematics` the arm's own; `episode` counts the resets.
    """

    name = "sim"

    def __init__(self, task: str = "peg", seed: int = 0, cameras: bool | None = None, realtime: bool = True,
                 size: int = 128, clearance: float = 0.0015):
        if task not in RANGES:
            raise UserError(f"the simulated arm has no task '{task}'; choose {', '.join(RANGES)}")
        clearance = float(clearance)
        if not 0 < clearance < 0.02:
            raise UserError(f"clearance is metres, between 0 and 0.02, got {clearance}")
        draw = can_draw() if cameras is None else cameras
        self._mujoco = envs._import("mujoco", draw)
        self._model = self._mujoco.MjModel.from_xml_string(_scene(task, clearance))
        self._data, self._renderer, self._size = self._mujoco.MjData(self._model), None, int(size)
        self._cameras = CAMERAS if draw else ()
        self._object, self._hand = self._model.body("object").id, self._model.site("tcp").id
        self.task, self.realtime, self.kinematics, self.episode = task, realtime, Kinematics(), 0
        self._rng, self._lock = np.random.default_rng(seed), threading.RLock()
        self._range, (start, self._opening) = limits(), STARTS[task]
        self.home = self.kinematics.ik(start, DOWN, np.radians([0, 100, -60, 0, 45, 0]))[0]  # (6,) radians
        self.rest = np.radians([0.0, 60.0, -60.0, 0.0, 30.0, 0.0])  # folded back above the table
        self._connected = self._unplugged = False

    @property
    def observation_features(self) -> dict:
        pictures = {name: (self._size, self._size, 3) for name in self._cameras}
        return dict.fromkeys((*KEYS, "stamp", *OBJECT, *(f"{name}.stamp" for name in self._cameras)), float) | pictures

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(KEYS, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def target(self) -> np.ndarray:
        """Where the servos are told to be, (7,): six joints, opening. What send_action returned last."""
        return self._target.copy()

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        with self._lock:
            self._connected, self._unplugged = True, False
            self.reset()

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def disconnect(self) -> None:
        """The arm holds; the pictures' memory is given back."""
        with self._lock:
            self._connected = False
            if self._renderer is not None:
                self._renderer.close()
            self._renderer = None

    def get_observation(self) -> dict:
        """Joints, gripper, stamp, object.*, and with OpenGL `front` and `wrist` (size, size, 3) uint8 with stamps."""
        with self._lock:
            self._check()
            self._follow_clock()
            if not self._state_frozen:
                self._state = self.observe()
            if self._cameras and (self._pictures is None or not self._cameras_frozen):
                self._pictures = self._draw()
            return dict(self._state) | {key: value if isinstance(value, float) else value.copy()
                                        for key, value in (self._pictures or {}).items()}

    def send_action(self, action: dict) -> dict:
        """
        New targets of the servos, every key of action_features; clipped to the joint ranges and returned. What is not
        finite raises ValueError and moves nothing. Without realtime, one control period passes.
        """
        with self._lock:
            self._check()
            target = np.array([action[key] for key in KEYS], dtype=np.float64)
            if not np.isfinite(target).all():
                raise ValueError(f"targets must be finite, got {action}")
            self._follow_clock()
            self._target[:6] = np.clip(target[:6], *self._range.T)
            self._target[6] = np.clip(target[6], *GRIPS[self.task])
            if not self.realtime:
                self._advance(SUBSTEPS)
            return dict(zip(KEYS, self._target.tolist(), strict=True))

    # ---- simulation only
    def reset(self, seed: int | None = None) -> None:
        """The arm at its start, the object somewhere in its range; the same seed gives the same episode, bitwise."""
        with self._lock:
            rng = self._rng if seed is None else np.random.default_rng(seed)
            model, data = self._model, self._data
            self._mujoco.mj_resetData(model, data)
            data.qpos[:6], data.qpos[6:8] = self.home, self._opening / 2
            self._target = np.array([*self.home, self._opening])
            place = np.array(STARTS[self.task][0][:2]) + rng.uniform(-0.5, 0.5, 2) * RANGES[self.task]
            if self.task == "peg":
                data.mocap_pos[0, :2] = place
            else:
                turn = rng.uniform(-0.3, 0.3)
                data.qpos[8:10], data.qpos[11:15] = place, (np.cos(turn / 2), 0, 0, np.sin(turn / 2))
            data.ctrl[:] = np.append(self._target[:6], self._target[6] / 2)
            self._mujoco.mj_forward(model, data)
            self._state_frozen = self._cameras_frozen = False
            self._clock, self._pictures, self._state, self.episode = time.monotonic(), None, None, self.episode + 1
            self._state = self.observe()

    def success(self) -> bool:
        """The peg is 2 cm inside the hole; the cube is 8 cm above the table."""
        with self._lock:
            data = self._data
            if self.task == "cube":
                return bool(data.xpos[self._object, 2] - TABLE - CUBE > LIFTED)
            tip = data.site_xpos[self._hand] + PEG_LENGTH * data.site_xmat[self._hand].reshape(3, 3)[:, 2]
            inside = np.abs(tip[:2] - data.xpos[self._object, :2]).max() < PEG
            return bool(inside and tip[2] < TABLE + SOCKET - DEPTH)

    def observe(self) -> dict:
        """The true state now, without pictures, faults and the passing of time: what a person in the room sees."""
        with self._lock:
            data, place = self._data, self._data.xpos[self._object].copy()
            place[2] += SOCKET if self.task == "peg" else 0.0
            turn = data.xmat[self._object]
            values = [*data.qpos[:6], data.qpos[6] + data.qpos[7], time.monotonic(), *place,
                      np.arctan2(turn[3], turn[0])]
            return dict(zip((*KEYS, "stamp", *OBJECT), map(float, values), strict=True))

    def freeze_state(self, frozen: bool = True) -> None:
        """A fault: the measured state and its stamp stay what they are, as when an arm's feedback stops."""
        self._state_frozen = frozen

    def freeze_cameras(self, frozen: bool = True) -> None:
        """A fault: the pictures and their stamps stay what they are."""
        self._cameras_frozen = frozen

    def unplug(self, unplugged: bool = True) -> None:
        """A fault: every call raises ConnectionError; the arm holds its last target."""
        self._unplugged = unplugged

    def _check(self) -> None:
        if not self._connected:
            raise ConnectionError("the simulated arm is not connected: call connect() first")
        if self._unplugged:
            raise ConnectionError("the simulated arm does not answer: its cable is unplugged")

    def _follow_clock(self) -> None:
        """In real time the arm has moved on since the last call; a pause of more than half a second is skipped."""
        now, step = time.monotonic(), PERIOD / SUBSTEPS
        if self.realtime:
            late = min(now - self._clock, 0.5)
            count = int(late / step)
            self._clock = now - (late - count * step)
            self._advance(count)

    def _advance(self, count: int) -> None:
        """The servos' set points move to the targets no faster than the motors turn; the physics follows."""
        data, model, step = self._data, self._model, self._mujoco.mj_step
        most, goal = SPEED * PERIOD / SUBSTEPS, np.append(self._target[:6], self._target[6] / 2)
        most = np.append(np.full(6, most), 0.15 * PERIOD / SUBSTEPS)  # each finger: 15 cm/s
        for _ in range(count):
            data.ctrl[:] += np.clip(goal - data.ctrl, -most, most)
            step(model, data)

    def _draw(self) -> dict:
        if self._renderer is None:
            try:
                self._renderer = self._mujoco.Renderer(self._model, self._size, self._size)
            except Exception as error:
                raise UserError(f"cannot draw, OpenGL did not start ({error}); use cameras=False or install a software "
                                "renderer: apt-get install libegl1 libgl1-mesa-dri") from error
        pictures = {}
        for name in self._cameras:
            self._renderer.update_scene(self._data, camera=name)
            pictures |= {name: self._renderer.render(), f"{name}.stamp": time.monotonic()}
        return pictures
