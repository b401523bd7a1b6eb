"""The guard against hostile commands: no command leaves the limits, whatever comes in.

python -m pytest tests/robot/test_guard.py
"""

import collections
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arms.guard import SLACK, TWIST, Guard, Limits
from arms.kinematics import Kinematics
from arms.piper_model import LENGTH, OFFSET, OPENING, TOOL, TURN, limits, mjcf, piper_profile
from arms.piper_model import TWIST as TWIST_DEGREES
from arms.rotation import rotation_matrix, rotation_vector
from arms.senses import PERIOD
from logbook import UserError

DOWN = np.diag([-1.0, 1.0, -1.0])
LIMITS = Limits()


class Rough(Kinematics):
    """An IK of one step with the Jacobian of another pose: cheap and wrong, and the guard may not
    rely on it.
    """

    def __init__(self):
        super().__init__(mjcf(), [f"joint_{i}" for i in range(1, 7)], limits())
        columns = [self._difference(HOME, HOME + 1e-6 * row) * 1e6 for row in np.eye(6)]
        self.inverse = np.linalg.inv(np.stack(columns, 1))

    def _difference(self, start, end):
        (place, turned), (there, there_turned) = self.fk(start), self.fk(end)
        return np.concatenate([there - place, rotation_vector(there_turned @ turned.T)])

    def ik(self, position, rotation, start):
        place, turned = self.fk(start)
        missing = np.concatenate([position - place, rotation_vector(rotation @ turned.T)])
        return start + self.inverse @ missing, 0.0, 0.0


KINEMATICS = piper_profile().kinematics()
HOME = KINEMATICS.ik((0.30, 0.0, 0.01), DOWN, np.radians([0, 100, -60, 0, 45, 0]))[0]
ROUGH = Rough()
BOX = np.array([[0.20, -0.075, -0.12], [0.40, 0.075, 0.03]])


def make_guard(kinematics=KINEMATICS, box=BOX):
    guard = Guard(kinematics, box, DOWN[:, 2], LIMITS, OPENING)
    guard.start(HOME, 0.02)
    return guard


def violated(before, after, gripper_before, gripper, box=BOX):
    """Which limit the step from joints to joints breaks, computed from FK alone."""
    (place, turned), (there, there_turned) = KINEMATICS.fk(before), KINEMATICS.fk(after)
    angle = np.arccos(np.clip((np.trace(there_turned @ turned.T) - 1) / 2, -1, 1))
    tilt = np.arccos(np.clip(there_turned[:, 2] @ [0, 0, -1], -1, 1))
    low, high = KINEMATICS.limits.T
    checks = {
        "finite": not np.isfinite(after).all() or not np.isfinite(gripper),
        "range": (after < low).any() or (after > high).any(),
        "box": (there < box[0] - 1e-6).any() or (there > box[1] + 1e-6).any(),
        "cone": tilt > LIMITS.cone + 1e-6,
        "step": np.linalg.norm(there - place) > LIMITS.max_step + 1e-9,
        "turn": angle > LIMITS.max_turn + 1e-6,
        "speed": np.abs(after - before).max() > LIMITS.max_joint_speed * PERIOD + 1e-9,
        "gripper": not 0 <= gripper <= OPENING
        or abs(gripper - gripper_before) > OPENING / 4 + 1e-9,
    }
    return [name for name, wrong in checks.items() if wrong]


# ---- the guard

number = st.one_of(
    st.floats(),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e308, 1.0, -1.0]),
    st.floats(-2, 2),
)
actions = st.one_of(
    st.lists(number, min_size=7, max_size=7), st.lists(number, max_size=9), st.none(), st.text()
)
measured = st.one_of(
    st.none(), st.lists(number, min_size=6, max_size=6), st.just("follow"), st.just("lag")
)


@settings(max_examples=40)
@given(st.lists(st.tuples(actions, measured), min_size=1, max_size=25))
def test_no_command_leaves_the_limits_whatever_comes_in(commands):
    """NaN, infinities, wrong shapes, jumps of the command and of the measurement, stale
    observations.
    """
    guard = make_guard(ROUGH)
    for action, seen in commands:
        before, opening = guard.joints, guard.gripper
        seen = {"follow": before, "lag": HOME}.get(seen, seen) if isinstance(seen, str) else seen
        target, gripper = guard.step(action, seen)
        assert violated(before, target, opening, gripper) == []
        applied = guard.sent(target, gripper)
        assert np.isfinite(applied).all() and np.abs(applied).max() <= 1 and applied.shape == (7,)


@pytest.mark.parametrize("corner", [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
def test_driven_into_every_corner_of_the_box_and_of_the_cone_it_stays_inside(corner):
    guard = make_guard(ROUGH)
    for count in range(60):
        before, opening = guard.joints, guard.gripper
        target, gripper = guard.step([*corner, *np.roll(corner, count // 15), 1], before)
        assert violated(before, target, opening, gripper) == []
        guard.sent(target, gripper)
    assert guard.counts["box"] and guard.counts["shortened"]


@pytest.mark.slow
def test_a_hundred_thousand_hostile_commands_break_no_limit():
    """Bursts in one direction, noise, corners of the box, garbage; the arm follows, lags, is held
    fast or lies.
    """
    rng, guard, real, broken = np.random.default_rng(0), make_guard(ROUGH), HOME.copy(), 0
    for count in range(100_000):
        if count % 50 == 0:
            drift, size, follow = (
                rng.normal(size=7),
                10 ** rng.uniform(-2, 3),
                rng.choice([1.0, 0.5, 0.0]),
            )
        action = drift * size + rng.normal(size=7)
        kind = rng.random()
        if kind < 0.02:
            action[rng.integers(7)] = rng.choice([np.nan, np.inf, -np.inf])
        seen = None if kind > 0.98 else real + rng.normal(size=6) * 3 if kind > 0.96 else real
        before, opening = guard.joints, guard.gripper
        target, gripper = guard.step(action, seen)
        broken += bool(violated(before, target, opening, gripper))
        guard.sent(target, gripper)
        real = real + follow * (target - real)
    assert broken == 0
    for name in ("nonfinite", "stale", "box", "cone", "step", "joint speed", "leash", "shortened"):
        assert guard.counts[name] > 100, name  # the run met every limit


def test_an_ordinary_action_runs_as_asked_and_is_reported_so():
    guard, wanted = make_guard(), np.array([0.4, -0.3, 0.2, 0.1, -0.2, 0.3, -0.5])
    for _ in range(3):
        place, turned = KINEMATICS.fk(guard.joints)
        target, gripper = guard.step(wanted, guard.joints)
        there, there_turned = KINEMATICS.fk(target)
        np.testing.assert_allclose(there - place, wanted[:3] * 0.015 / SLACK, atol=1e-5)
        np.testing.assert_allclose(
            there_turned, rotation_matrix(wanted[3:6] * np.radians(4) / SLACK) @ turned, atol=1e-5
        )
        np.testing.assert_allclose(guard.sent(target, gripper), wanted, atol=2e-3)
    assert not guard.counts


def test_what_is_reported_is_what_ran_when_the_box_cuts_it_short():
    guard = make_guard()
    for _ in range(6):
        place = KINEMATICS.fk(guard.joints)[0]
        applied = guard.sent(*guard.step([0, 0, 1, 0, 0, 0, 0], guard.joints))
        ran = (KINEMATICS.fk(guard.joints)[0] - place) * SLACK / 0.015
        np.testing.assert_allclose(applied[:3], ran, atol=1e-6)
    assert (
        guard.counts["box"] and abs(applied[2]) < 0.01 and KINEMATICS.fk(guard.joints)[0][2] <= 0.03
    )


def test_the_wall_of_the_box_does_not_stop_motion_along_it():
    guard = make_guard()
    for _ in range(5):
        guard.sent(*guard.step([0, 0, 1, 0, 0, 0, 0], guard.joints))
    start = KINEMATICS.fk(guard.joints)[0]
    for _ in range(3):
        guard.sent(*guard.step([1, 0, 1, 0, 0, 0, 0], guard.joints))
    assert KINEMATICS.fk(guard.joints)[0][0] - start[0] > 0.02


def test_the_leash_brings_the_command_back_to_an_arm_that_is_held_fast():
    """In contact the commanded tool never gets further ahead than the leash, and the force stays
    bounded.
    """
    guard = make_guard()
    for _ in range(30):
        guard.sent(*guard.step([0, 0, -1, 0, 0, 0, 0], HOME))
        assert (
            np.linalg.norm(KINEMATICS.fk(guard.joints)[0] - KINEMATICS.fk(HOME)[0]) <= 0.04 + 1e-4
        )
    assert guard.counts["leash"] > 20
    drives = [
        *np.eye(6)[3:],
        *-np.eye(6)[3:],
        *np.random.default_rng(0).choice([-1, 0, 1], (20, 6)),
    ]
    for drive in drives:  # a rotation out of reach is no way out either
        guard = make_guard(box=np.array([[0.1, -0.2, -0.2], [0.5, 0.2, 0.1]]))
        for _ in range(60):
            guard.sent(*guard.step([*drive, 0], HOME))
            (place, turned), (there, facing) = KINEMATICS.fk(guard.joints), KINEMATICS.fk(HOME)
            assert np.linalg.norm(place - there) <= 0.04 + 1.1e-4
            assert np.linalg.norm(rotation_vector(turned @ facing.T)) <= TWIST + 1e-3
    guard = make_guard()
    for _ in range(30):
        guard.sent(*guard.step([0, 0, -1, 0, 0, 0, 0], HOME))
    pushed = HOME + [0.1, 0, 0, 0, 0, 0]  # pushed away: the command follows
    gap = [np.linalg.norm(KINEMATICS.fk(guard.joints)[0] - KINEMATICS.fk(pushed)[0])]
    for _ in range(10):
        guard.sent(*guard.step(np.zeros(7), pushed))
        gap.append(np.linalg.norm(KINEMATICS.fk(guard.joints)[0] - KINEMATICS.fk(pushed)[0]))
    assert gap[0] > 0.045 and gap[-1] <= 0.04 + 1e-3


def test_stale_or_broken_input_holds_the_last_target():
    guard = make_guard()
    for action, seen, why in (
        (np.full(7, np.nan), HOME, "nonfinite"),
        (np.ones(6), HOME, "nonfinite"),
        (np.ones(7), None, "stale"),
        (np.ones(7), np.full(6, np.inf), "stale"),
    ):
        target, gripper = guard.step(action, seen)
        np.testing.assert_array_equal(target, HOME)
        assert gripper == 0.02 and guard.counts[why] > 0


def test_the_start_is_the_measured_pose_and_outside_is_refused_with_the_way_out():
    guard = Guard(KINEMATICS, BOX + [1.0, 0, 0], DOWN[:, 2], LIMITS, OPENING)
    with pytest.raises(UserError, match=r"box.*--recover"):
        guard.start(HOME, 0.02)
    with pytest.raises(UserError, match="own ranges"):
        make_guard().start(HOME + 4, 0.02)
    np.testing.assert_array_equal(make_guard().joints, HOME)


def test_sliding_is_slow_arrives_and_waits_for_an_arm_that_does_not_follow():
    guard, goal = make_guard(), HOME + [0.3, 0, 0, 0, 0, 0]
    for step in range(1000):  # noqa: B007
        before = guard.joints
        target, gripper, arrived = guard.slide(goal, 0.02, before)
        assert np.abs(target - before).max() <= 0.25 * LIMITS.max_joint_speed * PERIOD + 1e-9
        guard.sent(target, gripper)
        if arrived:
            break
    np.testing.assert_allclose(guard.joints, goal, atol=1e-6)
    assert 5 < step < 50
    assert not guard.slide(HOME, 0.02, goal + 0.5)[2] and np.allclose(
        guard.slide(HOME, 0.02, goal + 0.5)[0], goal
    )


def test_sliding_is_a_straight_line_of_all_joints():
    """Not the quick ones first: the place in between is nowhere that anybody looked at."""
    guard, goal, arrived = make_guard(), HOME + [0.6, 0, 0, 0, 0.1, -0.3], False
    while not arrived:
        target, gripper, arrived = guard.slide(goal, 0.02, guard.joints)
        guard.sent(target, gripper)
        share = (target - HOME)[0] / 0.6
        np.testing.assert_allclose(target - HOME, share * (goal - HOME), atol=1e-9)


# ---- whatever is passed


class Explosive:
    """Its conversion raises: at once, or only the second time."""

    def __init__(self, calls=0):
        self.calls = calls

    def __float__(self):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("boom")
        return 0.5


OBJECTS = [
    None,
    "joints",
    {},
    object(),
    [10**400] * 7,
    [10**400] * 6,
    torch.ones(7, requires_grad=True),
    torch.ones(6, requires_grad=True),
    [Explosive()] * 7,
    [Explosive(7)] * 7,
    [Explosive(6)] * 6,
    [[1.0], [1.0, 2.0]],
    [1j] * 7,
    np.ones((7, 1)),
    np.array(["x"] * 7),
    b"1234567",
]


@pytest.mark.parametrize("action", OBJECTS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("seen", [HOME, *OBJECTS], ids=lambda one: type(one).__name__)
def test_the_guard_holds_on_whatever_it_is_passed_and_never_raises(action, seen):
    guard = make_guard()
    for target, gripper, *_ in (
        guard.step(action, seen),
        guard.slide(seen, action, action),
        guard.step(guard.towards(seen, action), HOME),
    ):
        assert np.abs(target - HOME).max() < 0.2 and 0 <= gripper <= OPENING


@pytest.mark.parametrize("joints", OBJECTS, ids=lambda one: type(one).__name__)
def test_what_a_driver_answers_is_no_target_unless_it_is_a_pose(joints):
    guard = make_guard()
    with pytest.raises(ValueError, match="no finite numbers"):
        guard.sent(joints, 0.02)
    with pytest.raises(ValueError, match="no finite numbers"):
        guard.sent(HOME, joints)
    np.testing.assert_array_equal(guard.joints, HOME)


# ---- the leashes, by a kinematics of its own


def dh_pose(joints):
    """The tool's place and rotation as a product of modified DH transforms, without MuJoCo."""
    pose = np.eye(4)
    rows = zip(LENGTH, TWIST_DEGREES, OFFSET, TURN[1], joints)
    for length, twist, offset, turn, joint in rows:
        angle = joint + np.radians(turn)
        twist = np.radians(twist)
        c, s = np.cos(angle), np.sin(angle)
        ca, sa = np.cos(twist), np.sin(twist)
        pose = pose @ [
            [c, -s, 0, length],
            [s * ca, c * ca, -sa, -sa * offset],
            [s * sa, c * sa, ca, ca * offset],
            [0, 0, 0, 1],
        ]
    return pose[:3, 3] + TOOL * pose[:3, 2], pose[:3, :3]


def angle_of(rotation):
    """The angle of a rotation matrix, exact for small ones, too."""
    skew = rotation - rotation.T
    sine = np.linalg.norm([skew[2, 1], skew[0, 2], skew[1, 0]]) / 2
    return np.arctan2(sine, (np.trace(rotation) - 1) / 2)


def leashes_broken(before, after, seen):
    """Which leash the step breaks: beyond it, a target may only come closer to what was seen."""
    place, turned = dh_pose(before)
    there, facing = dh_pose(seen)
    new_place, new_turned = dh_pose(after)
    far = max(LIMITS.leash, np.linalg.norm(place - there))
    twist = max(TWIST, angle_of(turned @ facing.T))
    broken = []
    if np.linalg.norm(new_place - there) > far + 2e-4:
        broken.append("place leash")
    if angle_of(new_turned @ facing.T) > twist + 2e-4:
        broken.append("turn leash")
    return broken


def hostile_run(calls, seed=0, kinematics=ROUGH):
    """Drive a guard with anything at all; return what was broken and the time of each step."""
    rng = np.random.default_rng(seed)
    guard = make_guard(kinematics)
    real = HOME.copy()
    broken = collections.Counter()
    seconds = np.empty(calls)
    for count in range(calls):
        if count % 50 == 0:
            drift = rng.normal(size=7)
            size = 10 ** rng.uniform(-2, 3)
            follow = rng.choice([1.0, 0.5, 0.0])
        action = drift * size + rng.normal(size=7)
        seen = real
        kind = rng.random()
        if kind < 0.05:
            action = OBJECTS[rng.integers(len(OBJECTS))]
        elif kind < 0.10:
            seen = OBJECTS[rng.integers(len(OBJECTS))]
        elif kind < 0.30:  # it teleports, anywhere
            seen = rng.uniform(guard.low, guard.high)
        elif kind < 0.50:  # it is turned out of the command, or pushed
            seen = guard.joints + rng.normal(size=6) * rng.choice([0.05, 0.3, 1.0])
        before = guard.joints
        opening = guard.gripper
        start = time.perf_counter()
        target, gripper = guard.step(action, seen)
        seconds[count] = time.perf_counter() - start
        broken.update(violated(before, target, opening, gripper))
        if isinstance(seen, np.ndarray) and seen.shape == (6,):
            broken.update(leashes_broken(before, target, seen))
        guard.sent(target, gripper)
        real = real + follow * (target - real)
    return broken, seconds


@pytest.mark.parametrize("kinematics", [ROUGH, KINEMATICS], ids=["rough", "exact"])
def test_no_limit_breaks_however_the_measurement_jumps(kinematics):
    """Box, cone, step, turn, speed and both leashes; the leashes by another kinematics."""
    broken, seconds = hostile_run(3000, kinematics=kinematics)
    assert not broken and np.median(seconds) < 5e-3
