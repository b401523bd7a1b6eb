"""A scripted operator for the simulated arm, in the place of a person with a leader arm.

    expert = ScriptedExpert(arm, seed=0)
    arm.send_action(expert.get_action())       # fifteen times a second, through the Guard

Like any tele-operator it offers get_action() -> the next joint targets. It sees the true state of
the simulation and goes on from the arm's last target by at most 1.4 cm per call. It is uneven in
the way people are: each episode draws a pace, a height, a detour and a steadiness of hand; some
attempts aim beside the goal, notice it, rise and try again. If somebody else moved the arm
meanwhile, a new attempt begins from there. One call takes 1 ms. All constants are ours.
Not here: the leader arm of a real set-up (piper.py: PiperLeader), the simulated arm (sim.py).
"""

from __future__ import annotations

import numpy as np

from arms.piper_model import KEYS, OPENING
from arms.rotation import rotation_matrix
from arms.sim import CUBE, DEPTH, DOWN, PEG, PEG_LENGTH, SOCKET, TABLE

PACE = (0.007, 0.014)  # metres per call on the way
SLOW = (0.003, 0.006)  # ... while inserting or grasping
TILT = (
    0.006  # rad added to the hand's tilt per call, about each axis; a fifth of the tilt goes back
)
SHAKE = (0.0003, 0.0012)  # standard deviation of the hand's tremor, metres; one draw per episode
DETOUR = 0.35  # share of episodes with a detour on the way
AIM = {"peg": 0.0012, "cube": 0.005}  # standard deviation of the aim, metres
MISS = {
    "peg": 0.35,
    "cube": 0.3,
}  # probability of aiming beside the goal; half of it at the next try
BESIDE = {"peg": (0.004, 0.008), "cube": (0.03, 0.05)}  # how far beside, metres


class ScriptedExpert:
    """Play a task of the simulated arm as a person would.

    arm: a SimArm. noise: factor of tremor, aim and misses; 0 is a perfect hand. seed: of all draws.
    """

    def __init__(self, arm, noise: float = 1.0, seed: int = 0):
        self.arm = arm
        self.noise = float(noise)
        self.rng = np.random.default_rng(seed)
        self.episode = None  # the arm's reset that is being played
        self.meant = None  # where the last call wanted the tool

    def get_action(self) -> dict:
        """Return the next joint targets (rad) and opening (m), as send_action takes them."""
        joints = self._look()
        if self.episode != self.arm.episode:
            self._begin_episode()
        elif np.linalg.norm(self.here - self.meant) > 0.03:
            self._begin_attempt()  # somebody else moved the arm
        self.calls += 1
        target, pace, opening = self.phase()
        step = target - self.here
        step *= min(1.0, pace / (np.linalg.norm(step) + 1e-9))
        self.meant = self.here + step + self.noise * self.shake * self.rng.normal(size=3)
        self.tilt = 0.8 * self.tilt + self.noise * TILT * self.rng.normal(size=3)
        rotation = rotation_matrix(self.tilt) @ DOWN
        joints = self.arm.kinematics.ik(self.meant, rotation, joints, tolerance=1e-5)[0]
        values = [*joints.tolist(), float(np.clip(opening, 0, OPENING))]
        return dict(zip(KEYS, values, strict=True))

    def _look(self) -> np.ndarray:
        """See tool, object and opening as they are; return the arm's last target (6,)."""
        seen = self.arm.observe()
        measured = np.array([seen[key] for key in KEYS[:6]])
        self.tool = self.arm.kinematics.fk(measured)[0]
        self.object = np.array([seen["object.x"], seen["object.y"], seen["object.z"]])
        self.opening = seen["gripper.pos"]
        joints = self.arm.target[:6]
        self.here = self.arm.kinematics.fk(joints)[0]
        return joints

    def _begin_episode(self) -> None:
        rng = self.rng
        self.episode = self.arm.episode
        self.tilt = np.zeros(3)
        self.attempts = 0
        self.pace = rng.uniform(*PACE)
        self.slow = rng.uniform(*SLOW)
        self.shake = rng.uniform(*SHAKE)
        self.height = rng.uniform(0.008, 0.03)
        self.patience = int(rng.integers(3, 8))
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        rng = self.rng
        task = self.arm.task
        self.aim = self.noise * rng.normal(0, AIM[task], 2)
        if rng.random() < self.noise * MISS[task] / 2**self.attempts:
            angle = rng.uniform(0, 2 * np.pi)
            self.aim = rng.uniform(*BESIDE[task]) * np.array([np.cos(angle), np.sin(angle)])
        self.detour = None
        if rng.random() < DETOUR:
            self.detour = rng.uniform(-0.04, 0.04, 3) * [1, 1, 0.3] + [0, 0, 0.01]
        self.attempts += 1
        self._enter(self._approach)

    def _enter(self, phase) -> None:
        """Go on with a phase: a method that returns target (3,), pace and opening."""
        self.phase = phase
        self.calls = 0

    def _goal(self, above: float) -> np.ndarray:
        """Return the TCP (3,) for the peg's tip `above` the hole's entrance, or above the cube."""
        beyond = PEG_LENGTH if self.arm.task == "peg" else 0.0
        return self.object + [*self.aim, above + beyond]

    def _near(self, target, distance: float) -> bool:
        return np.linalg.norm(target - self.tool) < distance

    def _approach(self):
        """Move over the goal, in some episodes by way of a detour."""
        if self.arm.task == "peg":
            target = self._goal(self.height)
            close = 0.004
            opening = 2 * PEG
        else:
            target = self._goal(0.03 + self.height)
            close = 0.012
            opening = OPENING - 0.005
        if self.detour is not None:
            target = target + self.detour
            close = 0.02
        if self._near(target, close) or self.calls > 50:
            if self.detour is None:
                self._enter(self._lower)
            self.detour = None
        return target, self.pace, opening

    def _lower(self):
        """Lower the open fingers round the cube, or the peg until it is in or rests on the rim."""
        if self.arm.task == "cube":
            target = self._goal(0.0)
            if self._near(target, 0.008) or self.calls > 40:
                self._enter(self._close)
            return target, self.slow * 2, OPENING - 0.005
        depth = TABLE + SOCKET - (self.tool[2] - PEG_LENGTH)
        wanted = TABLE + SOCKET - (self.here[2] - PEG_LENGTH)
        on_the_rim = wanted - depth > 0.008 and depth < 0.004
        if on_the_rim or self.calls > 40:
            self._begin_attempt()
            self._enter(self._rise)
        pace = self.slow if self.calls > 1 else self.pace
        return self._goal(-DEPTH - 0.005), pace, 2 * PEG

    def _rise(self):
        """Rise a little before the next attempt."""
        if self.calls > 3:
            self._enter(self._approach)
        opening = 2 * PEG if self.arm.task == "peg" else OPENING - 0.005
        return self.tool + [0, 0, 0.02], self.pace, opening

    def _close(self):
        """Close the fingers, then lift, or rise where nothing is between them."""
        if self.calls > self.patience:
            if self.opening > CUBE:
                self._enter(self._lift)
            else:
                self._begin_attempt()
                self._enter(self._rise)
        target = self._goal(0.0) if self.calls < 2 else self.here
        return target, self.slow, 0.0

    def _lift(self):
        """Lift; begin again where the cube stays behind."""
        if self.tool[2] - self.object[2] > 0.04:
            self._begin_attempt()
        return np.array([*self.tool[:2], TABLE + 0.16]), self.pace, 0.0
