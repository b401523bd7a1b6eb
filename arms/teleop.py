"""
Someone who moves the simulated arm: a scripted expert in the place of a person with a leader arm.

    expert = ScriptedExpert(arm, seed=0)
    arm.send_action(expert.get_action())                  # fifteen times a second, through robot.py's Guard

Like any tele-operator it offers get_action() -> the next joint targets. It sees the true state of the simulation, goes
on from the last target of the arm by at most 1.4 cm per call, and is uneven in the way people are: each episode draws a
pace, a height, a way round and a steadiness of hand, some attempts aim beside the goal, notice, rise and try again. If
somebody else moved the arm meanwhile, a new attempt begins from there. All constants are ours.
Not here: the leader arm of a real set-up (piper.py: PiperLeader), the arm (sim.py).
"""
from __future__ import annotations

import numpy as np

from arms.sim import CUBE, DEPTH, DOWN, KEYS, OPENING, PEG, PEG_LENGTH, SOCKET, TABLE

PACE = (0.007, 0.014)  # metres per call on the way
SLOW = (0.003, 0.006)  # ... while inserting or grasping
TILT = 0.006  # radians added to the hand's tilt per call, about each axis; a fifth of the tilt goes back each time
SHAKE = (0.0003, 0.0012)  # standard deviation of the hand's tremor, metres; one draw per episode
ROUND = 0.35  # share of episodes with a detour on the way
AIM = {"peg": 0.0012, "cube": 0.005}  # standard deviation of the aim, metres
MISS = {"peg": 0.35, "cube": 0.3}  # probability that an attempt aims beside the goal; half of it at the next one
BESIDE = {"peg": (0.004, 0.008), "cube": (0.03, 0.05)}  # how far beside, metres


def turned(rotation: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) after a small turn by a rotation vector (3,), by Rodrigues' formula."""
    angle = np.linalg.norm(vector) + 1e-12
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross) @ rotation


class ScriptedExpert:
    """arm: a SimArm; noise: factor of tremor, aim and misses, 0 is a perfect hand; seed: of everything drawn."""

    def __init__(self, arm, noise: float = 1.0, seed: int = 0):
        self.arm, self.noise, self.rng = arm, float(noise), np.random.default_rng(seed)
        self.episode = self.meant = None

    def get_action(self) -> dict:
        """The next joint targets (rad) and opening (m), as send_action takes them."""
        seen = self.arm.observe()
        measured = np.array([seen[key] for key in KEYS[:6]])
        self.tool = self.arm.kinematics.fk(measured)[0]
        self.object = np.array([seen["object.x"], seen["object.y"], seen["object.z"]])
        self.opening = seen["gripper.pos"]
        joints = self.arm.target[:6]
        self.here = self.arm.kinematics.fk(joints)[0]
        if self.episode != self.arm.episode:
            self._begin_episode()
        elif np.linalg.norm(self.here - self.meant) > 0.03:
            self._begin_attempt()  # somebody else moved the arm
        self.calls += 1
        target, pace, opening = getattr(self, "_" + self.phase)()
        step = target - self.here
        step *= min(1.0, pace / (np.linalg.norm(step) + 1e-9))
        self.meant = self.here + step + self.noise * self.shake * self.rng.normal(size=3)
        self.tilt = 0.8 * self.tilt + self.noise * TILT * self.rng.normal(size=3)
        joints = self.arm.kinematics.ik(self.meant, turned(DOWN, self.tilt), joints, tolerance=1e-5)[0]
        return dict(zip(KEYS, [*joints.tolist(), float(np.clip(opening, 0, OPENING))], strict=True))

    def _begin_episode(self) -> None:
        rng, self.episode, self.tilt, self.attempts = self.rng, self.arm.episode, np.zeros(3), 0
        self.pace, self.slow, self.shake = rng.uniform(*PACE), rng.uniform(*SLOW), rng.uniform(*SHAKE)
        self.height, self.wait = rng.uniform(0.008, 0.03), int(rng.integers(3, 8))
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        rng, task = self.rng, self.arm.task
        self.aim = self.noise * rng.normal(0, AIM[task], 2)
        if rng.random() < self.noise * MISS[task] / 2**self.attempts:
            angle = rng.uniform(0, 2 * np.pi)
            self.aim = rng.uniform(*BESIDE[task]) * np.array([np.cos(angle), np.sin(angle)])
        self.detour = rng.uniform(-0.04, 0.04, 3) * [1, 1, 0.3] + [0, 0, 0.01] if rng.random() < ROUND else None
        self.attempts += 1
        self._enter("approach")

    def _enter(self, phase: str) -> None:
        self.phase, self.calls = phase, 0

    def _near(self, target, distance: float) -> bool:
        return np.linalg.norm(target - self.tool) < distance

    def _goal(self, above: float) -> np.ndarray:
        """TCP (3,) for the peg's tip `above` the hole's entrance, or for the fingers `above` the cube's centre."""
        reach = PEG_LENGTH if self.arm.task == "peg" else 0.0
        return self.object + [*self.aim, above + reach]

    def _approach(self):
        """Over the goal, some of the time by way of a detour."""
        peg = self.arm.task == "peg"
        target, close = self._goal(self.height if peg else 0.03 + self.height), 0.004 if peg else 0.012
        if self.detour is not None:
            target, close = target + self.detour, 0.02
        if self._near(target, close) or self.calls > 50:
            if self.detour is None:
                self._enter("lower")
            self.detour = None
        return target, self.pace, 2 * PEG if peg else OPENING - 0.005

    def _lower(self):
        """The peg into the hole until it is in or rests on the rim; the open fingers round the cube."""
        if self.arm.task == "cube":
            target = self._goal(0.0)
            if self._near(target, 0.008) or self.calls > 40:
                self._enter("close")
            return target, self.slow * 2, OPENING - 0.005
        depth = TABLE + SOCKET - (self.tool[2] - PEG_LENGTH)
        wanted = TABLE + SOCKET - (self.here[2] - PEG_LENGTH)
        if wanted - depth > 0.008 and depth < 0.004 or self.calls > 40:
            self._begin_attempt()
            self._enter("rise")
        return self._goal(-DEPTH - 0.005), self.slow if self.calls > 1 else self.pace, 2 * PEG

    def _rise(self):
        if self.calls > 3:
            self._enter("approach")
        return self.tool + [0, 0, 0.02], self.pace, 2 * PEG if self.arm.task == "peg" else OPENING - 0.005

    def _close(self):
        if self.calls > self.wait:
            self._enter("lift" if self.opening > CUBE else "rise")
            if self.phase == "rise":
                self._begin_attempt()
                self._enter("rise")
        return self._goal(0.0) if self.calls < 2 else self.here, self.slow, 0.0

    def _lift(self):
        if self.tool[2] - self.object[2] > 0.04:
            self._begin_attempt()
        return np.array([*self.tool[:2], TABLE + 0.16]), self.pace, 0.0
