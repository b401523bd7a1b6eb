"""The Piper without hardware: in MuJoCo, with a table and two tasks, as a LeRobot robot.

    arm = SimArm(task="peg", seed=0)          # or "cube"; realtime=False: at full speed
    arm.connect()
    arm.reset(seed=7)
    sent = arm.send_action({"joint_1.pos": 0.1, ..., "gripper.pos": 0.0})      # rad, metres
    arm.get_observation()["object.x"], arm.success()

One control period (1/15 s) takes 2 ms, two pictures by a software renderer 20 ms more. With
realtime=True simulated time follows the clock, as with an arm. Otherwise every send_action advances
one period, and an episode is a function of (reset seed, actions), bitwise. Objects start within
Table III's ranges (Insert USB, Pick Cube).

peg: a square peg, clamped in the hand for good, goes 2 cm into a socket that is `clearance` metres
wider on each side. cube: a 4 cm cube is lifted by 8 cm.

Ours, since no arm has them: reset, success, observe, object.*, and the faults freeze_state,
freeze_cameras and unplug.
Not here: the guard (guard.py), the loop (rig.py), the scripted operator (teleop.py), the real arm
(piper.py), the model (piper_model.py).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import arms
import simulators
from arms.piper_model import KEYS, OPENING, limits, mjcf, piper_profile
from arms.senses import PERIOD
from logbook import UserError

SUBSTEPS = 32  # physics steps in a period
SPEED = np.radians(110.0)  # of the servos, rad/s: half of what the Piper's can do
FINGER_SPEED = 0.15  # of each finger, m/s
TABLE = -0.10  # height of the table below the arm's mounting plane, metres
DOWN = np.diag([-1.0, 1.0, -1.0])  # the tool points down, the fingers slide along y
REST = (0.0, 60.0, -60.0, 0.0, 30.0, 0.0)  # degrees: folded back above the table
PEG = 0.008  # half width of the peg, metres
PEG_LENGTH = 0.04  # of the peg beyond the TCP
SOCKET = 0.03  # height of the socket
DEPTH = 0.02  # of a success
CUBE = 0.02  # half width of the cube
LIFTED = 0.08  # height of a success
RANGES = {
    "peg": (0.05, 0.05),
    "cube": (0.25, 0.10),
}  # Table III: of the object's start, metres, x and y
STARTS = {"peg": (0.30, 0.0, 0.01), "cube": (0.30, 0.0, 0.03)}  # TCP at the start
OPENINGS = {"peg": 2 * PEG, "cube": 0.06}  # of the gripper at the start
GRIPS = {
    "peg": (2 * PEG, 2 * PEG),
    "cube": (0.0, OPENING),
}  # the fingers clamp the peg, whatever is sent
CAMERAS = ("front", "wrist")
OBJECT = (
    "object.x",
    "object.y",
    "object.z",
    "object.yaw",
)  # cube's centre; middle of the hole's entrance

WALL = '<geom type="box" pos="{x} {y} {z}" size="{width} {depth} {z}" rgba=".2 .4 .7 1"/>'
CUBE_BODY = (
    f'<body name="object" pos="0.3 0 {TABLE + CUBE}"><freejoint/><geom type="box" density="300" '
    f'size="{CUBE} {CUBE} {CUBE}" friction="1 0.05 0.001" rgba=".8 .2 .2 1"/></body>'
)
PEG_GEOM = (
    f'<geom class="hand" name="peg" type="box" pos="0 0 {PEG_LENGTH / 2 - 0.01}" '
    f'size="{PEG} {PEG} {PEG_LENGTH / 2 + 0.01}" friction="0.4 0.05 0.001" rgba=".9 .7 .1 1"/>'
)
WRIST = '<camera name="wrist" pos="0.07 0 -0.06" xyaxes="0 1 0 0.8 0 0.6" fovy="70"/>'
ROOM = (
    '<light pos="0.3 0.5 1.5" dir="0 -0.3 -1" castshadow="false"/>'
    '<light pos="0.8 -0.4 1.2" dir="-0.4 0.3 -1" castshadow="false"/>'
    f'<geom type="box" name="table" pos="0.3 0 {TABLE - 0.02}" size="0.35 0.4 0.02" '
    'rgba=".6 .5 .4 1"/>'
    '<camera name="front" pos="0.75 0 0.15" xyaxes="0 1 0 -0.45 0 0.9" fovy="35"/>'
)
OPTIONS = (
    f'<option timestep="{PERIOD / SUBSTEPS!r}" integrator="implicitfast" cone="elliptic" '
    'impratio="10"/><statistic center="0.3 0 0" extent="0.6"/><visual><global offwidth="640" '
    'offheight="640"/><quality shadowsize="0" offsamples="0"/></visual>'
)
DRAWING = (
    "import simulators; mujoco = simulators.import_simulator('mujoco', True); "
    "model = mujoco.MjModel.from_xml_string('<mujoco/>'); mujoco.Renderer(model, 16, 16).render()"
)


def scene(task: str, clearance: float) -> str:
    """Return the MJCF of the arm in its task."""
    if task == "cube":
        return mjcf(hand=WRIST, world=ROOM + CUBE_BODY, options=OPTIONS)
    return mjcf(hand=WRIST + PEG_GEOM, world=ROOM + _socket(clearance), options=OPTIONS)


def _socket(clearance: float) -> str:
    """Return four walls around a square hole."""
    hole = PEG + clearance
    outer = 0.03
    middle = (hole + outer) / 2
    thickness = (outer - hole) / 2
    places = (
        (middle, 0, thickness, outer),
        (-middle, 0, thickness, outer),
        (0, middle, hole, thickness),
        (0, -middle, hole, thickness),
    )
    walls = [
        WALL.format(x=x, y=y, z=SOCKET / 2, width=width, depth=depth)
        for x, y, width, depth in places
    ]
    return f'<body name="object" mocap="true" pos="0.3 0 {TABLE}">{"".join(walls)}</body>'


@functools.cache
def can_draw() -> bool:
    """Return whether OpenGL works here; MUJOCO_GL=disable means no.

    Asked once, of another process, because a bad driver may crash.
    """
    if arms.MUJOCO_GL == "disable":
        return False
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    environment["PYTHONPATH"] = str(Path(simulators.__file__).parent.parent)
    command = [sys.executable, "-c", DRAWING]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


class SimArm:
    """A Piper on a table, behind the ten members of a LeRobot robot. Connecting resets it.

    task: "peg" or "cube". seed: of the resets that get none. cameras: True, False or None (if
    OpenGL works). size: of the square pictures, in pixels. clearance: of the peg in its hole,
    metres on each side. `home` (6,) are the joints at the start in radians; `episode` counts the
    resets.
    """

    name = "sim"

    def __init__(
        self,
        task: str = "peg",
        seed: int = 0,
        cameras: bool | None = None,
        realtime: bool = True,
        size: int = 128,
        clearance: float = 0.0015,
    ):
        if task not in RANGES:
            raise UserError(f"the simulated arm has no task '{task}'; choose {', '.join(RANGES)}")
        clearance = float(clearance)
        if not 0 < clearance < 0.02:
            raise UserError(f"clearance is metres, between 0 and 0.02, got {clearance}")
        draw = can_draw() if cameras is None else cameras
        self.task = task
        self.realtime = realtime
        self.episode = 0
        self.profile = piper_profile(rest=REST)
        self.kinematics = self.profile.kinematics()
        self._mujoco = simulators.import_simulator("mujoco", draw)
        self._model = self._mujoco.MjModel.from_xml_string(scene(task, clearance))
        self._data = self._mujoco.MjData(self._model)
        self._renderer = None
        self._size = int(size)
        self._cameras = CAMERAS if draw else ()
        self._object = self._model.body("object").id
        self._hand = self._model.site("tcp").id
        self._rng = np.random.default_rng(seed)
        self._lock = threading.RLock()
        self._range = limits()
        near = np.radians([0, 100, -60, 0, 45, 0])
        self.home = self.kinematics.ik(STARTS[task], DOWN, near)[0]
        self._connected = False
        self._unplugged = False

    @property
    def observation_features(self) -> dict:
        stamps = [f"{name}.stamp" for name in self._cameras]
        features = dict.fromkeys((*KEYS, "stamp", *OBJECT, *stamps), float)
        return features | dict.fromkeys(self._cameras, (self._size, self._size, 3))

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(KEYS, float)

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def target(self) -> np.ndarray:
        """Where the servos are told to be, (7,): six joints and the opening."""
        return self._target.copy()

    def connect(self, calibrate: bool = True) -> None:
        """Begin, with a reset."""
        with self._lock:
            self._connected = True
            self._unplugged = False
            self.reset()

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def disconnect(self) -> None:
        """Hold, and give back the memory of the pictures."""
        with self._lock:
            self._connected = False
            if self._renderer is not None:
                self._renderer.close()
            self._renderer = None

    def get_observation(self) -> dict:
        """Return joints, gripper, stamp and object.*, and with OpenGL pictures and their stamps.

        The pictures `front` and `wrist` are (size, size, 3) uint8.
        """
        with self._lock:
            self._require()
            self._follow_clock()
            if not self._state_frozen:
                self._state = self.observe()
            if self._cameras and (self._pictures is None or not self._cameras_frozen):
                self._pictures = self._draw()
            observation = dict(self._state)
            for key, value in (self._pictures or {}).items():
                observation[key] = value if isinstance(value, float) else value.copy()
            return observation

    def send_action(self, action: dict) -> dict:
        """Set new targets of the servos, every key of action_features; return them as clipped.

        ValueError, and no motion, for a target that is not finite. Without realtime one control
        period passes.
        """
        with self._lock:
            self._require()
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
        """Put the arm at its start and the object somewhere in its range.

        The same seed gives the same episode, bitwise.
        """
        with self._lock:
            rng = self._rng if seed is None else np.random.default_rng(seed)
            data = self._data
            opening = OPENINGS[self.task]
            self._mujoco.mj_resetData(self._model, data)
            data.qpos[:6] = self.home
            data.qpos[6:8] = opening / 2
            self._target = np.array([*self.home, opening])
            place = np.array(STARTS[self.task][:2]) + rng.uniform(-0.5, 0.5, 2) * RANGES[self.task]
            if self.task == "peg":
                data.mocap_pos[0, :2] = place
            else:
                turn = rng.uniform(-0.3, 0.3)
                data.qpos[8:10] = place
                data.qpos[11:15] = (np.cos(turn / 2), 0, 0, np.sin(turn / 2))
            data.ctrl[:] = np.append(self._target[:6], self._target[6] / 2)
            self._mujoco.mj_forward(self._model, data)
            self._state_frozen = False
            self._cameras_frozen = False
            self._clock = time.monotonic()
            self._pictures = None
            self.episode += 1
            self._state = self.observe()

    def success(self) -> bool:
        """Return whether the peg is 2 cm inside the hole, or the cube 8 cm above the table."""
        with self._lock:
            data = self._data
            place = data.xpos[self._object]
            if self.task == "cube":
                return bool(place[2] - TABLE - CUBE > LIFTED)
            axis = data.site_xmat[self._hand].reshape(3, 3)[:, 2]
            tip = data.site_xpos[self._hand] + PEG_LENGTH * axis
            inside = np.abs(tip[:2] - place[:2]).max() < PEG
            return bool(inside and tip[2] < TABLE + SOCKET - DEPTH)

    def observe(self) -> dict:
        """Return the true state now, as a person in the room sees it.

        Without pictures and faults, and no time passes.
        """
        with self._lock:
            data = self._data
            place = data.xpos[self._object].copy()
            if self.task == "peg":
                place[2] += SOCKET
            turn = data.xmat[self._object]
            opening = data.qpos[6] + data.qpos[7]
            yaw = np.arctan2(turn[3], turn[0])
            values = [*data.qpos[:6], opening, time.monotonic(), *place, yaw]
            return dict(zip((*KEYS, "stamp", *OBJECT), map(float, values), strict=True))

    def freeze_state(self, frozen: bool = True) -> None:
        """Simulate a fault: the measured state and its stamp stay, as when feedback stops."""
        self._state_frozen = frozen

    def freeze_cameras(self, frozen: bool = True) -> None:
        """Simulate a fault: the pictures and their stamps stay what they are."""
        self._cameras_frozen = frozen

    def unplug(self, unplugged: bool = True) -> None:
        """Simulate a fault: every call raises ConnectionError; the arm holds its last target."""
        self._unplugged = unplugged

    def _require(self) -> None:
        if not self._connected:
            raise ConnectionError("the simulated arm is not connected: call connect() first")
        if self._unplugged:
            raise ConnectionError("the simulated arm does not answer: its cable is unplugged")

    def _follow_clock(self) -> None:
        """In real time, catch up with the clock; a pause of more than half a second is skipped."""
        if not self.realtime:
            return
        now = time.monotonic()
        step = PERIOD / SUBSTEPS
        late = min(now - self._clock, 0.5)
        count = int(late / step)
        self._clock = now - (late - count * step)
        self._advance(count)

    def _advance(self, count: int) -> None:
        """Move the servos' set points to the targets as fast as motors turn."""
        data = self._data
        most = np.append(np.full(6, SPEED * PERIOD / SUBSTEPS), FINGER_SPEED * PERIOD / SUBSTEPS)
        goal = np.append(self._target[:6], self._target[6] / 2)
        for _ in range(count):
            data.ctrl[:] += np.clip(goal - data.ctrl, -most, most)
            self._mujoco.mj_step(self._model, data)

    def _draw(self) -> dict:
        if self._renderer is None:
            try:
                self._renderer = self._mujoco.Renderer(self._model, self._size, self._size)
            except Exception as error:
                raise UserError(
                    f"cannot draw, OpenGL did not start ({error}); use cameras=False or install a "
                    "software renderer: apt-get install libegl1 libgl1-mesa-dri"
                ) from error
        pictures = {}
        for name in self._cameras:
            self._renderer.update_scene(self._data, camera=name)
            pictures[name] = self._renderer.render()
            pictures[f"{name}.stamp"] = time.monotonic()
        return pictures
