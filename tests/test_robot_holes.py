"""Where the loop has a hole, what follows is as slow as all else: a slow policy, a stopped process, a pushed arm."""
import contextlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from arms.kinematics import Kinematics
from arms.senses import JOINTS, PERIOD, Pace, Senses
from arms.teleop import ScriptedExpert
from logbook import UserError
import robot
from robot import LATE
from test_robot_care import ROOT, TOY, Person, ahead, plain, space


def clocked(rig):
    """The moments of the loop's own commands, without the watchdog's."""
    moments, send = [], rig._send
    rig._send = lambda *target: moments.append(time.monotonic()) or send(*target)
    return moments


@pytest.mark.realtime
@pytest.mark.parametrize("seconds, least", [(0.06, PERIOD / 4), (0.1, PERIOD), (0.25, PERIOD)])
def test_after_a_slow_policy_a_whole_period_follows_every_late_command(seconds, least):
    rig, _ = plain(Person(space), realtime=True)

    def act(obs):
        time.sleep(seconds)
        return np.tile(np.array([0.7, 0.7, 0, 0, 0, 0, -0.5], np.float32), (4, 1))
    with rig:
        moments = clocked(rig)
        take = rig.episode(act, 0)
        gaps = np.diff(moments)
    assert take.steps == 10 and gaps.min() > 0.9 * least, gaps
    places = np.array(take.pieces[0]["obs"])[:, 7:10]
    moved = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert moved[4:].min() > 0.004 * least / PERIOD, moved          # metres: what a command did is in the next view


@pytest.mark.realtime
def test_what_an_operators_arm_answers_late_is_not_executed(capfd):
    class Leader:
        calls = 0

        def get_action(self):
            self.calls += 1
            time.sleep((LATE + 0.1) * (self.calls == 4))
            return dict(zip((*JOINTS, "gripper.pos"), [*arm.rest, 0.03], strict=True))
    late, arm = plain(Person(space), realtime=True, teleop=Leader())
    with late:
        take = late.episode(None, 0)
    assert take.dropped == 1 and [len(piece["action"]) for piece in take.pieces] == [3, 7]
    assert "HOLDING: the operator's arm took 1." in capfd.readouterr().err and late.guard.counts["late"] == 1


@pytest.mark.realtime
def test_after_a_stop_of_the_process_nothing_of_the_old_chunk_runs(capfd):
    """It is stopped while it waits for a deadline, where no policy is late."""
    rig, arm = plain(Person(space), realtime=True)
    calls = []

    def act(obs):
        calls.append(time.monotonic())
        if len(calls) == 2:
            script = f"sleep 0.03; kill -STOP {os.getpid()}; sleep {LATE + 0.5}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", script])
        return ahead(obs)
    with rig:
        moments = clocked(rig)
        take = rig.episode(act, 0)
    second = [moment - calls[1] for moment in moments if calls[1] <= moment < calls[2]]
    assert calls[2] - calls[1] > LATE and len(second) == 1 and second[0] < LATE
    assert take.dropped == 1 and [len(piece["action"]) for piece in take.pieces] == [4, 6]
    assert "HOLDING: this program stood still for 1." in capfd.readouterr().err and rig.guard.counts["late"] == 1


class Carried:
    """Makes a plain arm deaf and blind, as in its teach mode, while somebody turns its first joint by so many rad."""

    def __init__(self, arm, turn):
        self.arm, self.turn, self.asked = arm, turn, 0
        self.get, self.send, self.away = arm.get_observation, arm.send_action, False
        arm.get_observation, arm.send_action = self.see, self.obey

    def see(self):
        if self.away:
            raise RuntimeError("it is in teach mode")
        return self.get()

    def obey(self, action):
        if self.away:
            raise RuntimeError("it is in teach mode")
        return self.send(action)

    def act(self, obs):
        """One step at a time; at the fifth it is carried away, and comes back between a look and the next command."""
        self.asked += 1
        self.away = self.asked == 5
        return ahead(obs)[:1]

    def back(self, rig):
        send, looks = rig._send, []

        def later(*target):
            looks.append(self.away)
            if sum(looks) == 4:
                inner = self.arm.inner
                inner._data.qpos[0] += self.turn
                inner._target[0] += self.turn
                inner._mujoco.mj_forward(inner._model, inner._data)
                self.away = False
            return send(*target)
        rig._send = later


@pytest.mark.parametrize("turn, outside", [(0.2, False), (1.0, True)])
def test_where_the_arm_was_carried_it_stays_until_it_is_seen_and_goes_on_from_there(turn, outside, capfd):
    rig, arm = plain(Person(space))
    carried = Carried(arm, turn)
    with pytest.raises(UserError, match="moved outside its limits .box.*holds where it is") if outside else \
            contextlib.nullcontext(), rig:
        carried.back(rig)
        take = rig.episode(carried.act, 0)
        assert [len(piece["action"]) for piece in take.pieces] == [4, 6] and rig.guard.counts["rejoined"] == 1
        rig.stopped = True
    sent = np.array(arm.sent)
    leap = np.abs(np.diff(sent, axis=0)).max(0)
    assert leap[0] == pytest.approx(turn, abs=0.05)                 # to where it is, not back to where it was
    assert np.count_nonzero(np.abs(np.diff(sent[:, 0])) > 0.1) == 1 and abs(sent[-1, 0] - turn) < 0.1
    assert "HOLDING" in capfd.readouterr().err


@pytest.mark.realtime
def test_nor_does_the_watchdog_repeat_a_target_that_may_be_far_from_the_arm():
    rig, arm = plain(Person(space), realtime=True)
    with rig:
        counts, rig.armed = [len(arm.sent)], True
        for rig.failed, rig.lost in ((True, True), (True, False)):
            time.sleep(6 * PERIOD)
            counts.append(len(arm.sent))
        rig.armed = rig.failed = False
    assert counts[0] == counts[1] < counts[2]


def test_no_key_suspends_or_kills_the_program_while_the_arm_is_under_power():
    """What Ctrl-Z and Ctrl-\\ send; in a process group of its own, where a suspension would work."""
    code = ("import os, robot, signal\nfrom arms.settings import parse\n"
            f"with robot.session(parse(['record', *{TOY!r}], '')):\n"
            "    for number in (signal.SIGTSTP, signal.SIGQUIT): os.kill(os.getpid(), number)\n"
            "print('awake', signal.getsignal(signal.SIGTSTP) == signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL)")
    process = subprocess.Popen([sys.executable, "-c", code], process_group=0, text=True, stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert "awake True" in process.communicate(timeout=30)[0]
    finally:
        process.kill()


def test_a_pause_while_recording_holds_and_goes_on_smoothly():
    """Nobody but the operator leads there, so without them nobody does."""
    person = Person(space, [None] * 3 + ["pause"] + [None] * 4 + ["pause"])
    rig, arm = plain(person)
    rig.teleop = ScriptedExpert(arm.inner)
    with rig:
        before = len(arm.sent)
        take = rig.episode(None, 0)
        sent, rig.stopped = np.array(arm.sent[before:]), True
    assert [len(piece["action"]) for piece in take.pieces] == [2, 8] and take.dropped == 5 and take.interventions == 10
    assert np.ptp(sent[-14:-8], axis=0).max() == 0 and np.ptp(sent[-8:], axis=0).max() > 0
    asked = np.abs(np.array(take.pieces[1]["requested"])[:, :6]).max(1)
    assert (asked <= (np.arange(8) + 1) * PERIOD + 1e-6).all()


@pytest.mark.parametrize("role", ["train", "eval"])
def test_who_stops_it_before_the_arm_has_power_sees_no_motion(role, tmp_path, monkeypatch):
    where = ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]
    robot.main(["record", *TOY, "--episodes", "1", *where])
    robot.main(["train", *TOY, "--episodes", "1", "--episode-limit", "5", *where])
    connected, slow = [], {"train": "layout", "eval": "trained"}[role]
    monkeypatch.setattr(robot.Rig, "__enter__", lambda rig: connected.append(rig))
    session = robot.session

    @contextlib.contextmanager
    def stopped(args):
        with session(args) as rig:
            meanwhile = getattr(robot, slow)
            monkeypatch.setattr(robot, slow, lambda *given: setattr(rig.interrupt, "stop", True) or meanwhile(*given))
            yield rig
    monkeypatch.setattr(robot, "session", stopped)
    command = {"train": ["train", "--resume", str(tmp_path / "run"), "--episodes", "2"], "eval": ["eval", *where[2:]]}
    assert not robot.main(command[role]) and not connected


class Bare:
    """An arm with one camera whose driver does what `give` does."""

    observation_features = {"front": (8, 8, 3)}

    def __init__(self, give):
        self.give = give

    def get_observation(self):
        return {name: 0.1 for name in JOINTS} | {"gripper.pos": 0.0, "stamp": 0.0, "front.stamp": 0.0} | self.give()


def fail(error):
    raise error


@pytest.mark.parametrize("give, told", [
    (lambda: {"front": None}, "TypeError"), (lambda: {"gripper.pos": None}, "TypeError"),
    (lambda: fail(type("error", (Exception,), {})("grab failed")), "grab failed"),        # what cv2's and can's are
    (lambda: fail(TimeoutError("no frame")), "no frame")])
def test_whatever_a_driver_does_is_a_lost_view_and_no_traceback(give, told):
    picture = {"front": np.zeros((8, 8, 3), np.uint8)}
    arm, senses = Bare(lambda: picture), Senses(Bare(dict), Kinematics(), Pace(False), "vision")
    assert senses.read(arm) is not None
    assert senses.read(Bare(lambda: picture | give())) is None and told in senses.fault
    with pytest.raises(UserError):
        senses.read(Bare(lambda: fail(UserError("no OpenGL"))))


@pytest.mark.realtime
def test_a_command_that_fails_in_any_way_is_held_and_the_watchdog_outlives_it(capfd):
    rig, arm = plain(Person(space), realtime=True)
    send, falls = arm.send_action, iter([False] * 5 + [True] * 3)

    class CanError(Exception):                                                                # python-can's is as plain
        pass

    arm.send_action = lambda action: fail(CanError("bus off")) if next(falls, False) else send(action)
    with rig:
        take = rig.episode(lambda obs: ahead(obs)[:1], 0)
        before, watching, rig.armed = len(arm.sent), [one.name for one in threading.enumerate()], True
        falls = iter([True] * 2)
        time.sleep(8 * PERIOD)
        after, rig.armed = len(arm.sent), False
    assert take.outcome == "timeout" and "did not reach the arm (bus off)" in capfd.readouterr().err
    assert "watchdog" in watching and after > before


@pytest.mark.parametrize("wrong", [{"gripper.pos": float("nan")}, {"gripper.pos": None},
                                   {"joint_2.pos": float("nan")}, {"joint_2.pos": "open"}])
def test_one_useless_answer_of_a_driver_is_a_lost_command_and_never_the_next_target(capfd, wrong):
    rig, arm = plain(Person(space))
    send, calls, acted = arm.send_action, [], []

    def answer(action):
        calls.append(action)
        return (send(action) or action) | (wrong if len(acted) == 3 else {})

    def act(obs):
        acted.append(obs)
        return ahead(obs)[:1]
    arm.send_action = answer
    with rig:
        take = rig.episode(act, 0)
    assert np.isfinite([list(call.values()) for call in calls]).all() and not rig.stopped
    assert take.dropped == 1 and take.steps == 10
    streams = capfd.readouterr()
    assert "HOLDING: a command did not reach the arm" in streams.err and "did not go to rest" not in streams.err


@pytest.mark.parametrize("error", [OSError("silent"), type("CanError", (Exception,), {})("silent")])
def test_whatever_the_operators_arm_raises_ends_the_session_in_order(error):
    teleop = type("Leader", (), {"get_action": lambda self: fail(error)})()
    rig, arm = plain(Person(space), teleop=teleop)
    with pytest.raises(UserError, match=f"arm is lost.*{type(error).__name__}: silent"), rig:
        rig.episode(None, 0)
    assert not arm.is_connected
