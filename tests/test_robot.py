"""The arm without an arm: the guard against hostile commands, the keypad on a pseudo-terminal, deadlines."""
import errno
import os
import pty
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arms import senses
from arms.keypad import TerminalPad, events, open_keypad
from arms.kinematics import Kinematics, rotation_vector
from arms.senses import PERIOD, Pace, rotation_matrix
from logbook import UserError
from arms.guard import OPEN, SLACK, TWIST, Guard

DOWN = np.diag([-1.0, 1.0, -1.0])
LIMITS = dict(cone=np.radians(30), max_step=0.015, max_turn=np.radians(4), max_joint_speed=np.radians(90), leash=0.04)


class Rough(Kinematics):
    """An IK of one step with the Jacobian of another pose: cheap and wrong, and the guard may not rely on it."""

    def __init__(self):
        super().__init__()
        columns = [self._difference(HOME, HOME + 1e-6 * row) * 1e6 for row in np.eye(6)]
        self.inverse = np.linalg.inv(np.stack(columns, 1))

    def _difference(self, start, end):
        (place, turned), (there, there_turned) = self.fk(start), self.fk(end)
        return np.concatenate([there - place, rotation_vector(there_turned @ turned.T)])

    def ik(self, position, rotation, start):
        place, turned = self.fk(start)
        missing = np.concatenate([position - place, rotation_vector(rotation @ turned.T)])
        return start + self.inverse @ missing, 0.0, 0.0


KINEMATICS = Kinematics()
HOME = KINEMATICS.ik((0.30, 0.0, 0.01), DOWN, np.radians([0, 100, -60, 0, 45, 0]))[0]
ROUGH = Rough()
BOX = np.array([[0.20, -0.075, -0.12], [0.40, 0.075, 0.03]])


def make_guard(kinematics=KINEMATICS, box=BOX):
    guard = Guard(kinematics, box, DOWN[:, 2], **LIMITS)
    guard.start(HOME, 0.02)
    return guard


def violated(before, after, gripper_before, gripper, box=BOX):
    """Which limit the step from joints to joints breaks: computed from FK alone, not by the guard."""
    (place, turned), (there, there_turned) = KINEMATICS.fk(before), KINEMATICS.fk(after)
    angle = np.arccos(np.clip((np.trace(there_turned @ turned.T) - 1) / 2, -1, 1))
    tilt = np.arccos(np.clip(there_turned[:, 2] @ [0, 0, -1], -1, 1))
    checks = {"finite": not np.isfinite(after).all() or not np.isfinite(gripper),
              "range": (after < KINEMATICS.limits[:, 0]).any() or (after > KINEMATICS.limits[:, 1]).any(),
              "box": (there < box[0] - 1e-6).any() or (there > box[1] + 1e-6).any(),
              "cone": tilt > LIMITS["cone"] + 1e-6,
              "step": np.linalg.norm(there - place) > LIMITS["max_step"] + 1e-9,
              "turn": angle > LIMITS["max_turn"] + 1e-6,
              "speed": np.abs(after - before).max() > LIMITS["max_joint_speed"] * PERIOD + 1e-9,
              "gripper": not 0 <= gripper <= OPEN or abs(gripper - gripper_before) > OPEN / 4 + 1e-9}
    return [name for name, wrong in checks.items() if wrong]


# ---- the guard

number = st.one_of(st.floats(), st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e308, 1.0, -1.0]), st.floats(-2, 2))
actions = st.one_of(st.lists(number, min_size=7, max_size=7), st.lists(number, max_size=9), st.none(), st.text())
measured = st.one_of(st.none(), st.lists(number, min_size=6, max_size=6), st.just("follow"), st.just("lag"))


@settings(max_examples=40)
@given(st.lists(st.tuples(actions, measured), min_size=1, max_size=25))
def test_no_command_leaves_the_limits_whatever_comes_in(commands):
    """NaN, infinities, wrong shapes, jumps of the command and of the measurement, stale observations."""
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
    """Bursts in one direction, noise, corners of the box, garbage; the arm follows, lags, is held fast or lies."""
    rng, guard, real, broken = np.random.default_rng(0), make_guard(ROUGH), HOME.copy(), 0
    for count in range(100_000):
        if count % 50 == 0:
            drift, size, follow = rng.normal(size=7), 10 ** rng.uniform(-2, 3), rng.choice([1.0, 0.5, 0.0])
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
        assert guard.counts[name] > 100, name                       # the run met every limit


def test_an_ordinary_action_runs_as_asked_and_is_reported_so():
    guard, wanted = make_guard(), np.array([0.4, -0.3, 0.2, 0.1, -0.2, 0.3, -0.5])
    for _ in range(3):
        place, turned = KINEMATICS.fk(guard.joints)
        target, gripper = guard.step(wanted, guard.joints)
        there, there_turned = KINEMATICS.fk(target)
        np.testing.assert_allclose(there - place, wanted[:3] * 0.015 / SLACK, atol=1e-5)
        np.testing.assert_allclose(there_turned, rotation_matrix(wanted[3:6] * np.radians(4) / SLACK) @ turned,
                                   atol=1e-5)
        np.testing.assert_allclose(guard.sent(target, gripper), wanted, atol=2e-3)
    assert not guard.counts


def test_what_is_reported_is_what_ran_when_the_box_cuts_it_short():
    guard = make_guard()
    for _ in range(6):
        place = KINEMATICS.fk(guard.joints)[0]
        applied = guard.sent(*guard.step([0, 0, 1, 0, 0, 0, 0], guard.joints))
        ran = (KINEMATICS.fk(guard.joints)[0] - place) * SLACK / 0.015
        np.testing.assert_allclose(applied[:3], ran, atol=1e-6)
    assert guard.counts["box"] and abs(applied[2]) < 0.01 and KINEMATICS.fk(guard.joints)[0][2] <= 0.03


def test_the_wall_of_the_box_does_not_stop_motion_along_it():
    guard = make_guard()
    for _ in range(5):
        guard.sent(*guard.step([0, 0, 1, 0, 0, 0, 0], guard.joints))
    start = KINEMATICS.fk(guard.joints)[0]
    for _ in range(3):
        guard.sent(*guard.step([1, 0, 1, 0, 0, 0, 0], guard.joints))
    assert KINEMATICS.fk(guard.joints)[0][0] - start[0] > 0.02


def test_the_leash_brings_the_command_back_to_an_arm_that_is_held_fast():
    """In contact the commanded tool never gets further ahead than the leash, and the force stays bounded."""
    guard = make_guard()
    for _ in range(30):
        guard.sent(*guard.step([0, 0, -1, 0, 0, 0, 0], HOME))
        assert np.linalg.norm(KINEMATICS.fk(guard.joints)[0] - KINEMATICS.fk(HOME)[0]) <= 0.04 + 1e-4
    assert guard.counts["leash"] > 20
    drives = [*np.eye(6)[3:], *-np.eye(6)[3:], *np.random.default_rng(0).choice([-1, 0, 1], (20, 6))]
    for drive in drives:                                              # a rotation out of reach is no way out either
        guard = make_guard(box=np.array([[0.1, -0.2, -0.2], [0.5, 0.2, 0.1]]))
        for _ in range(60):
            guard.sent(*guard.step([*drive, 0], HOME))
            (place, turned), (there, facing) = KINEMATICS.fk(guard.joints), KINEMATICS.fk(HOME)
            assert np.linalg.norm(place - there) <= 0.04 + 1.1e-4
            assert np.linalg.norm(rotation_vector(turned @ facing.T)) <= TWIST + 1e-3
    guard = make_guard()
    for _ in range(30):
        guard.sent(*guard.step([0, 0, -1, 0, 0, 0, 0], HOME))
    pushed = HOME + [0.1, 0, 0, 0, 0, 0]                              # pushed away: the command follows
    gap = [np.linalg.norm(KINEMATICS.fk(guard.joints)[0] - KINEMATICS.fk(pushed)[0])]
    for _ in range(10):
        guard.sent(*guard.step(np.zeros(7), pushed))
        gap.append(np.linalg.norm(KINEMATICS.fk(guard.joints)[0] - KINEMATICS.fk(pushed)[0]))
    assert gap[0] > 0.045 and gap[-1] <= 0.04 + 1e-3


def test_stale_or_broken_input_holds_the_last_target():
    guard = make_guard()
    for action, seen, why in ((np.full(7, np.nan), HOME, "nonfinite"), (np.ones(6), HOME, "nonfinite"),
                              (np.ones(7), None, "stale"), (np.ones(7), np.full(6, np.inf), "stale")):
        target, gripper = guard.step(action, seen)
        np.testing.assert_array_equal(target, HOME)
        assert gripper == 0.02 and guard.counts[why] > 0


def test_the_start_is_the_measured_pose_and_outside_is_refused_with_the_way_out():
    guard = Guard(KINEMATICS, BOX + [1.0, 0, 0], DOWN[:, 2], **LIMITS)
    with pytest.raises(UserError, match=r"box.*--recover"):
        guard.start(HOME, 0.02)
    with pytest.raises(UserError, match="own ranges"):
        make_guard().start(HOME + 4, 0.02)
    np.testing.assert_array_equal(make_guard().joints, HOME)


def test_sliding_is_slow_arrives_and_waits_for_an_arm_that_does_not_follow():
    guard, goal = make_guard(), HOME + [0.3, 0, 0, 0, 0, 0]
    for count in range(1000):
        before = guard.joints
        target, gripper, arrived = guard.slide(goal, 0.02, before)
        assert np.abs(target - before).max() <= 0.25 * LIMITS["max_joint_speed"] * PERIOD + 1e-9
        guard.sent(target, gripper)
        if arrived:
            break
    np.testing.assert_allclose(guard.joints, goal, atol=1e-6)
    assert 5 < count < 50
    assert not guard.slide(HOME, 0.02, goal + 0.5)[2] and np.allclose(guard.slide(HOME, 0.02, goal + 0.5)[0], goal)


def test_sliding_is_a_straight_line_of_all_joints():
    """Not the quick ones first: the place in between is nowhere that anybody looked at."""
    guard, goal, arrived = make_guard(), HOME + [0.6, 0, 0, 0, 0.1, -0.3], False
    while not arrived:
        target, gripper, arrived = guard.slide(goal, 0.02, guard.joints)
        guard.sent(target, gripper)
        share = (target - HOME)[0] / 0.6
        np.testing.assert_allclose(target - HOME, share * (goal - HOME), atol=1e-9)


# ---- the keypad

@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    yield ours, theirs
    for descriptor in (ours, theirs):
        try:
            os.close(descriptor)
        except OSError:
            pass


def test_every_key_of_a_terminal_is_latched_and_the_terminal_restored(terminal):
    import termios
    ours, theirs = terminal
    mode = termios.tcgetattr(theirs)
    with TerminalPad(theirs) as keypad:
        assert keypad.poll() is None
        os.write(ours, b"s0d q\x1b[Az")                            # an arrow key and z are nobody's
        time.sleep(0.05)
        assert [keypad.poll() for _ in range(6)] == ["success", "fail", "discard", "pause", "quit", None]
        assert termios.tcgetattr(theirs)[3] != mode[3]
    assert termios.tcgetattr(theirs)[3] == mode[3]


def test_a_stop_overtakes_what_was_pressed_before_and_a_question_forgets_it(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        os.write(ours, b" " * 30 + b"x")
        time.sleep(0.05)
        assert [keypad.poll(), keypad.poll()] == ["stop", None]
        os.write(ours, b"  sq")
        time.sleep(0.05)
        keypad.forget()
        assert [keypad.poll(), keypad.poll()] == ["quit", None]
        os.write(ours, b" ")
        assert keypad.wait(5) == "pause"


def test_a_terminal_that_disappears_is_noticed(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        os.close(ours)
        assert keypad.poll() is None and keypad.gone


def test_waiting_for_a_key_ends_with_the_key_or_the_time(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        since = time.monotonic()
        assert keypad.wait(0.2) is None and 0.2 <= time.monotonic() - since < 1
        os.write(ours, b"1")
        assert keypad.wait(5) == "success"


def test_escape_alone_stops_and_capitals_count():
    assert events(b"\x1b") == ["stop"] and events(b"S\x1bOPF") == ["success", "fail"] and events(b"\xff\x1b[15~1") == \
        ["success"]


def test_a_function_key_that_comes_in_two_parts_is_no_label_and_swallows_no_stop(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        found = []
        for part in (b"\x1b[", b"15", b"~f"):                       # F5, then f
            os.write(ours, part)
            time.sleep(0.02)
            found += [keypad.poll(), keypad.poll()]
        assert found == [None] * 4 + ["fail", None]
        os.write(ours, b"\x1b[")
        time.sleep(0.02)
        assert keypad.poll() is None
        time.sleep(0.35)                                           # nothing more of it comes: then x is an x
        os.write(ours, b"x")
        time.sleep(0.02)
        assert keypad.poll() == "stop"


def test_a_keypad_that_somebody_else_holds_is_an_error_in_one_line(terminal, monkeypatch):
    class Held:
        def __init__(self, path):
            self.path, self.fd = path, terminal[1]

        def grab(self):
            raise OSError(errno.EBUSY, "Device or resource busy")

        def close(self):
            self.fd = None
    evdev = SimpleNamespace(InputDevice=Held, ecodes=SimpleNamespace(KEY={}))
    monkeypatch.setitem(sys.modules, "evdev", evdev)
    keypad = open_keypad("/dev/input/by-id/pedal")
    with pytest.raises(UserError, match="pedal for this program alone .Device or resource busy"), keypad:
        pass
    assert keypad.device.fd is None


def test_a_keypad_that_is_not_there_is_an_error_in_one_line(tmp_path):
    reader, writer = os.pipe()
    with pytest.raises(UserError, match="terminal"), TerminalPad(reader):
        pass
    with pytest.raises(UserError, match="evdev|cannot open"):
        open_keypad(str(tmp_path / "none"))


# ---- deadlines

def test_deadlines_are_absolute_and_missed_ones_are_counted_not_caught_up(monkeypatch):
    clock, pace, waits = [100.0], Pace(realtime=True), []

    def sleep(seconds):
        clock[0] += seconds
    monkeypatch.setattr(senses, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    pace.start()
    for count in range(12):
        sleep({4: 0.15, 8: 0.06}.get(count, 0.01))                 # one that missed its deadline, one that nearly did
        command = clock[0]
        pace.wait()
        waits.append(clock[0] - command)
    assert clock[0] - 100 == pytest.approx(12 * PERIOD + 0.15)          # nothing else adds up
    assert waits[4] == pytest.approx(PERIOD) and waits[8] == pytest.approx(PERIOD / 4)  # whole after a late command
    report = pace.report()
    assert report["overruns"] == 1 and report["period_max"] == pytest.approx(1000 * (0.15 + PERIOD))
    assert report["period_p50"] == pytest.approx(1000 * PERIOD)
