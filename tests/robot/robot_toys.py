"""Toy arms, people and policies for the tests of the rig."""

import shlex
import time
from pathlib import Path

import numpy as np

from arms.driver import Driver
from arms.episodes import layout
from arms.keypad import ScriptedPad
from arms.operator import Leader
from arms.piper_model import KEYS
from arms.rig import Rig
from arms.senses import Pace, Senses
from arms.settings import open_driver, parse_args
from arms.sim import SimArm
from logbook import Interrupt

ROOT = Path(__file__).parent.parent.parent
JOINTS = KEYS[:6]
SIZES = shlex.split(
    "--preset cpu --task insert-usb --hidden 32 --layers 2 --flow-steps 2 --batch-size 16 "
    "--num-candidates 4 --pretrain-steps 20 --warmup-steps 25 --save-every 20 --device cpu"
)
TOY = [*SIZES, "--no-realtime"]


def still(obs):
    """A policy that stays where it is, four steps at a time."""
    return np.tile(np.array([0, 0, 0, 0, 0, 0, -0.5], np.float32), (4, 1))


def ahead(obs):
    """A policy that moves forward, four steps at a time."""
    return np.tile(np.array([0.5, 0, 0, 0, 0, 0, -0.5], np.float32), (4, 1))


class Scene:
    """A rig on the simulated arm at full speed, with a script for a person.

    `at` maps steps to what happens then.
    """

    def __init__(self, events=(), at=None, judged=False, limit=30, teleop=True):
        self.args = parse_args(["train", *TOY, "--episode-limit", str(limit)])
        driver, operator = open_driver(self.args)
        self.arm = driver.robot
        senses = Senses(driver, Pace(False))
        self.keypad = ScriptedPad(events)
        self.sent = []
        self.at = at or {}
        self.rig = Rig(
            self.args,
            driver,
            senses,
            self.keypad,
            operator if teleop else None,
            Interrupt(),
            judged,
        )
        self._send = self.arm.send_action
        self.arm.send_action = self.count
        self.task = layout("insert-usb", senses.sizes)

    def count(self, action):
        step = len(self.sent)
        self.sent.append([action[name] for name in JOINTS])
        if step in self.at:
            self.at[step](self)
        return self._send(action)


class Plain:
    """An arm that is no simulation: the ten members of the protocol, a profile and no more."""

    is_calibrated = True

    def __init__(self, realtime):
        self.inner = SimArm(task="peg", cameras=False, realtime=realtime)
        self.profile = self.inner.profile
        self.rest = self.profile.rest_joints
        self.kinematics = self.inner.kinematics
        self.sent = []
        self.reading = False
        self.overlaps = 0
        self.slow = 0.0
        self.action_features = self.inner.action_features
        self.observation_features = {
            name: kind
            for name, kind in self.inner.observation_features.items()
            if not name.startswith("object")
        }

    is_connected = property(lambda self: self.inner.is_connected)
    calibrate = configure = lambda self: None

    def connect(self, calibrate=True):
        self.inner.connect()

    def get_observation(self):
        self.reading = True
        time.sleep(self.slow)
        self.reading = False
        return self.inner.get_observation()

    def send_action(self, action):
        self.overlaps += self.reading
        self.sent.append([action[name] for name in JOINTS])
        return self.inner.send_action(action)

    def disconnect(self):
        self.inner.disconnect()


class Person(ScriptedPad):
    """Does `answer` whenever the arm waits for a key."""

    def __init__(self, answer, events=()):
        super().__init__(events)
        self.answer = answer

    def wait(self, seconds):
        self.answer(self)
        return self.poll()


def space(person):
    person.events.insert(0, "pause")


def rig_on(arm, args, pad, teleop=None, realtime=False, judged=False):
    """A rig on this arm."""
    driver = Driver(arm, arm.profile)
    operator = None if teleop is None else Leader(teleop, arm.profile)
    senses = Senses(driver, Pace(realtime))
    return Rig(args, driver, senses, pad, operator, Interrupt(), judged)


def plain(person, realtime=False, teleop=None):
    """A rig on a plain arm with this person at it, and the arm."""
    args = parse_args(["train", *TOY, "--episode-limit", "10"])
    args.realtime = realtime
    arm = Plain(realtime)
    return rig_on(arm, args, person, teleop, realtime), arm


def fail(error):
    raise error
