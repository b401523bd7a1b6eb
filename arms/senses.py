"""What an arm is asked 15 times a second: absolute deadlines, fresh observations, one vector for the policy.

    from arms.senses import PERIOD, Pace, Senses, rotation_matrix
    pace = Pace(realtime=True)
    senses = Senses(arm, kinematics, pace, "auto")            # "state", "vision"
    view = senses.read(arm)                                   # a View, or None; then senses.fault says why

The vector: joint angles 6, gripper opening 1, tool place and first two columns of its rotation 9 (from FK, ours), then
the simulator's object.* floats or features of the cameras' pictures. Stale: arm > 100 ms, camera > 200 ms.
Not here: the loop (robot.py), what makes the features (vision.py, language.py).
"""
import collections
import time
import zlib
from typing import NamedTuple

import numpy as np

from logbook import UserError

PERIOD = 1 / 15                                # seconds; the paper's control rate
JOINTS = tuple(f"joint_{i}.pos" for i in range(1, 7))
STATE_AGE, CAMERA_AGE = 0.1, 0.2               # seconds after which an observation is stale


class Pace:
    """Absolute deadlines, one per PERIOD; a missed one is set anew, never caught up. Not realtime: time is a count."""

    def __init__(self, realtime):
        self.realtime, self.ticks, self.overruns, self.periods = realtime, 0, 0, collections.deque(maxlen=100_000)

    def start(self):
        """The first period begins now."""
        self.last = self.deadline = time.monotonic()

    def now(self):
        return time.monotonic() if self.realtime else self.ticks * PERIOD

    def wait(self):
        """Until the end of this period, and a whole one where its command came late; called right after a command."""
        self.ticks += 1
        if not self.realtime:
            return
        self.deadline += PERIOD
        now = time.monotonic()
        if now > self.deadline:                # the command came late: the next one must not follow at once, nor a
            self.overruns += 1                 # look that would show no motion yet
            self.deadline = now + PERIOD
        time.sleep(max(self.deadline - now, PERIOD / 4))
        now = time.monotonic()
        self.periods.append(now - self.last)
        self.last = now

    def report(self):
        """Milliseconds: median, 99th percentile and longest period so far, and how many deadlines were missed."""
        if not self.periods:
            return {}
        p50, p99, longest = 1000 * np.percentile(self.periods, [50, 99, 100])
        return {"period_p50": p50, "period_p99": p99, "period_max": longest, "overruns": self.overruns}


class View(NamedTuple):
    """One fresh observation: vector (D,) for the policy, measured joints (6,) and gripper opening."""

    vector: np.ndarray
    joints: np.ndarray
    gripper: float


class Senses:
    """From a driver's dict to a View, or to None and a reason in `fault` when a part is missing, stale or broken.

    eyes(cameras): what has features(pictures) and sizes(cameras), made only where pictures are looked at.
    """

    def __init__(self, robot, kinematics, pace, observe="auto", eyes=None):
        self.kinematics, self.pace, self.fault, self.seen = kinematics, pace, "", {}
        features = robot.observation_features
        cameras = sorted(name for name, kind in features.items() if isinstance(kind, tuple))
        objects = sorted(name for name in features if name.startswith("object."))
        if observe == "vision" and not cameras:
            raise UserError("this arm offers no camera, and --observe vision or a --backbone needs one: a real arm "
                            "takes --options front=/dev/video0 wrist=..., the simulated one draws with OpenGL (apt-get "
                            "install libegl1 libgl1-mesa-dri; MUJOCO_GL must not be 'disable')")
        vision = observe == "vision" or (observe == "auto" and bool(cameras) and not objects)
        self.cameras, self.objects = (cameras, []) if vision else ([], objects)
        self.sizes = {"joints": 6, "gripper": 1, "eef": 9} | ({"object": len(objects)} if self.objects else {})
        if self.cameras:
            from arms.vision import Encoder
            self.eyes = (eyes or (lambda _: Encoder()))(cameras)
            self.sizes |= self.eyes.sizes(cameras)

    def read(self, robot, look=True):
        """One call of the driver, whatever it raises. Without a look at the pictures no policy can use the vector."""
        try:
            raw = robot.get_observation()
            joints, gripper = np.array([raw[name] for name in JOINTS], float), float(raw["gripper.pos"])
            for name, limit in (("stamp", STATE_AGE), *((camera, CAMERA_AGE) for camera in self.cameras * look)):
                if (age := self._age(name, raw)) > limit:
                    return self._lost(f"{'the arm' if name == 'stamp' else 'camera ' + name} is silent or frozen: "
                                      f"nothing new for {1000 * age:.0f} ms")
            place, turned = self.kinematics.fk(joints)
            parts = [joints, [gripper], place, turned[:, :2].T.ravel(), [raw[name] for name in self.objects]]
            if self.cameras and look:
                parts += [self.eyes.features({name: raw[name] for name in self.cameras}).cpu().numpy()]
            vector = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
        except UserError:
            raise
        except Exception as error:                    # cv2's and can's are of no usual kind; a dropped picture is None
            return self._lost(f"no usable observation ({type(error).__name__}: {error})")
        return View(vector, joints, gripper) if np.isfinite(vector).all() else self._lost("a value is not finite")

    def _age(self, name, raw):
        """
        Seconds since this source last said something new. A camera without a stamp is judged by its pixels; an arm
        without one, as LeRobot's have none, is as fresh as its reading: standing still it shows the same numbers.
        """
        stamp = raw.get("stamp" if name == "stamp" else f"{name}.stamp")
        if name == "stamp" and stamp is None:
            return 0.0
        if stamp is not None and not np.isfinite(stamp):
            return np.inf                             # equal to nothing, it would look new for ever
        mark = zlib.crc32(np.ascontiguousarray(raw[name])) if stamp is None else stamp
        now = self.pace.now()
        if self.seen.get(name, (None,))[0] != mark:
            self.seen[name] = (mark, now)
        age = now - self.seen[name][1]
        return max(age, now - stamp) if self.pace.realtime and stamp is not None else age

    def _lost(self, why):
        self.fault = why


def rotation_matrix(vector):
    """Axis times angle (3,) rad -> rotation (3, 3), by Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    x, y, z = np.asarray(vector, float) / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
