"""What an arm is asked 15 times a second: absolute deadlines and one vector for the policy.

    from arms.senses import PERIOD, Pace, Senses
    pace = Pace(realtime=True)
    senses = Senses(driver, pace, observe="auto")    # or "state", "vision"
    view = senses.read()                             # a View, or None: senses.fault says why

The vector holds the joint angles, the gripper's opening, the tool's place and the first two
columns of its rotation (9 numbers from FK, ours), then either the simulator's object.* floats or
the features of the cameras' pictures. An arm is stale after 100 ms, a camera after 200 ms.
Reading takes what the driver takes and 0.1 ms.
Not here: the loop (rig.py), what makes features of pictures (vision.py, language.py).
"""

from __future__ import annotations

import collections
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from logbook import UserError

PERIOD = 1 / 15  # seconds; the paper's control rate
STATE_AGE = 0.1  # seconds after which the arm's state is stale
CAMERA_AGE = 0.2  # ... and a picture
NO_CAMERA = (
    "this arm offers no camera, and --observe vision or a --backbone needs one: a real arm takes "
    "--options front=/dev/video0 wrist=..., the simulated one draws with OpenGL (apt-get install "
    "libegl1 libgl1-mesa-dri; MUJOCO_GL must not be 'disable')"
)


class Pace:
    """Absolute deadlines, one per PERIOD. A missed one is set anew and never caught up.

    Without realtime nothing waits, and time is the number of periods.
    """

    def __init__(self, realtime: bool):
        self.realtime = realtime
        self.ticks = 0
        self.overruns = 0
        self.periods: collections.deque[float] = collections.deque(maxlen=100_000)

    def start(self) -> None:
        """Begin the first period now."""
        self.last = time.monotonic()
        self.deadline = self.last

    def now(self) -> float:
        """Return the seconds that stamps are compared with."""
        return time.monotonic() if self.realtime else self.ticks * PERIOD

    def wait(self) -> None:
        """Wait for the end of this period; call it right after a command.

        After a command that came late a whole period passes, so that the next one does not follow
        at once and the next view shows what the command did.
        """
        self.ticks += 1
        if not self.realtime:
            return
        self.deadline += PERIOD
        now = time.monotonic()
        if now > self.deadline:
            self.overruns += 1
            self.deadline = now + PERIOD
        time.sleep(max(self.deadline - now, PERIOD / 4))
        now = time.monotonic()
        self.periods.append(now - self.last)
        self.last = now

    def report(self) -> dict[str, float]:
        """Return median, 99th percentile and longest period so far in ms, and overruns."""
        if not self.periods:
            return {}
        p50, p99, longest = 1000 * np.percentile(self.periods, [50, 99, 100])
        return {
            "period_p50": p50,
            "period_p99": p99,
            "period_max": longest,
            "overruns": self.overruns,
        }


class View(NamedTuple):
    """One fresh observation: vector (D,) for the policy, measured joints (J,) and opening."""

    vector: np.ndarray
    joints: np.ndarray
    gripper: float


class Stale(Exception):
    """A source has said nothing new for too long; the message names it."""


class Senses:
    """Make a View of the driver's dict, or None and a reason in `fault`.

    driver: see driver.py. eyes(cameras) returns what has features(pictures) and sizes(cameras); it
    is called only where pictures are looked at. sizes: the columns of the vector, {key: width}.
    """

    def __init__(
        self,
        driver,
        pace: Pace,
        observe: str = "auto",
        eyes: Callable[[list[str]], object] | None = None,
    ):
        self.driver = driver
        self.pace = pace
        self.kinematics = driver.kinematics
        self.fault = ""
        self._seen: dict[str, tuple] = {}  # per source: its last mark, and when that was new
        features = driver.observation_features
        cameras = sorted(name for name, kind in features.items() if isinstance(kind, tuple))
        objects = sorted(name for name in features if name.startswith("object."))
        if observe == "vision" and not cameras:
            raise UserError(NO_CAMERA)
        vision = observe == "vision" or (observe == "auto" and bool(cameras) and not objects)
        self.cameras = cameras if vision else []
        self.objects = [] if vision else objects
        self.sizes = {"joints": len(driver.profile.joints), "gripper": 1, "eef": 9}
        if self.objects:
            self.sizes["object"] = len(objects)
        if self.cameras:
            self.eyes = (eyes or random_encoder)(self.cameras)
            self.sizes |= self.eyes.sizes(self.cameras)

    def read(self, source=None, pictures: bool = True) -> View | None:
        """Ask the driver once, whatever it raises.

        source: what has get_observation(), default the driver. Without pictures the vector is no
        input for a policy that sees, and old pictures do not matter.
        """
        try:
            raw = (source or self.driver).get_observation()
            view = self._view(raw, pictures)
        except UserError:
            raise
        except Stale as stale:
            self.fault = str(stale)
            return None
        except Exception as error:  # drivers' errors are of any kind; a dropped picture is None
            self.fault = f"no usable observation ({type(error).__name__}: {error})"
            return None
        if not np.isfinite(view.vector).all():
            self.fault = "a value is not finite"
            return None
        return view

    def _view(self, raw: dict, pictures: bool) -> View:
        joints, gripper = self.driver.profile.from_driver(raw)
        self._refuse_stale_state(raw)
        if pictures:
            for name in self.cameras:
                self._refuse_stale_picture(name, raw)
        place, turned = self.kinematics.fk(joints)
        parts = [joints, [gripper], place, turned[:, :2].T.ravel()]
        parts.append([raw[name] for name in self.objects])
        if self.cameras and pictures:
            seen = self.eyes.features({name: raw[name] for name in self.cameras})
            parts.append(seen.cpu().numpy())
        vector = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
        return View(vector, joints, gripper)

    def _refuse_stale_state(self, raw: dict) -> None:
        """An arm without a stamp (LeRobot's have none) is as fresh as its reading.

        Standing still it shows the same numbers, so they cannot tell a frozen arm.
        """
        stamp = raw.get("stamp")
        if stamp is None:
            return
        age = self._age("stamp", stamp, stamp)
        if age > STATE_AGE:
            raise Stale(f"the arm is silent or frozen: nothing new for {1000 * age:.0f} ms")

    def _refuse_stale_picture(self, name: str, raw: dict) -> None:
        """A camera without a stamp is judged by its pixels."""
        stamp = raw.get(f"{name}.stamp")
        mark = stamp
        if stamp is None:
            mark = zlib.crc32(np.ascontiguousarray(raw[name]))
        age = self._age(name, mark, stamp)
        if age > CAMERA_AGE:
            raise Stale(f"camera {name} is silent or frozen: nothing new for {1000 * age:.0f} ms")

    def _age(self, name: str, mark, stamp: float | None) -> float:
        """Return the seconds since this source last showed another mark."""
        if stamp is not None and not np.isfinite(stamp):
            return np.inf  # equal to nothing, it would look new for ever
        now = self.pace.now()
        last, since = self._seen.get(name, (None, now))
        if last != mark:
            self._seen[name] = (mark, now)
            since = now
        age = now - since
        if stamp is not None and self.pace.realtime:
            age = max(age, now - stamp)
        return age


def random_encoder(cameras: list[str]):
    """Return the frozen ResNet-10 with random weights."""
    from arms.vision import Encoder

    return Encoder()
