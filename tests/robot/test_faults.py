"""Where the loop has a hole, what follows is as slow as all else, and nothing is sent blindly.

    python -m pytest tests/robot/test_faults.py

A frozen or unplugged arm, a slow policy, a stopped process, a pushed arm, a useless answer.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from robot_toys import (
    JOINTS,
    ROOT,
    TOY,
    Person,
    Scene,
    ahead,
    fail,
    plain,
    space,
    still,
)

import arms.rig as rig_module
import robot
from arms.episodes import Episode, layout, load
from arms.operator import Leader
from arms.piper_model import piper_profile
from arms.rig import LATE, Link
from arms.senses import PERIOD, Pace, Senses
from arms.teleop import ScriptedExpert
from logbook import UserError


def clocked(rig):
    """The moments of the loop's own commands, without the watchdog's."""
    moments, send = [], rig.connection.send
    rig.connection.send = lambda *target: moments.append(time.monotonic()) or send(*target)
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
    assert moved[4:].min() > 0.004 * least / PERIOD, (
        moved
    )  # metres: what a command did is in the next view


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
    assert (
        "HOLDING: the operator's arm took 1." in capfd.readouterr().err
        and late.guard.counts["late"] == 1
    )


@pytest.mark.realtime
def test_after_a_stop_of_the_process_nothing_of_the_old_chunk_runs(capfd):
    """It is stopped while it waits for a deadline, where no policy is late."""
    rig, arm = plain(Person(space), realtime=True)
    calls = []

    def act(obs):
        calls.append(time.monotonic())
        if len(calls) == 2:
            pid = os.getpid()
            script = f"sleep 0.03; kill -STOP {pid}; sleep {LATE + 0.5}; kill -CONT {pid}"
            subprocess.Popen(["sh", "-c", script])
        return ahead(obs)

    with rig:
        moments = clocked(rig)
        take = rig.episode(act, 0)
    second = [moment - calls[1] for moment in moments if calls[1] <= moment < calls[2]]
    assert calls[2] - calls[1] > LATE and len(second) == 1 and second[0] < LATE
    assert take.dropped == 1 and [len(piece["action"]) for piece in take.pieces] == [4, 6]
    assert (
        "HOLDING: this program stood still for 1." in capfd.readouterr().err
        and rig.guard.counts["late"] == 1
    )


class Carried:
    """Makes a plain arm deaf and blind, as in its teach mode, while somebody turns its first joint
    by so many rad.
    """

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
        """One step at a time; at the fifth it is carried away, and comes back between a look and
        the next command.
        """
        self.asked += 1
        self.away = self.asked == 5
        return ahead(obs)[:1]

    def back(self, rig):
        send, looks = rig.connection.send, []

        def later(*target):
            looks.append(self.away)
            if sum(looks) == 4:
                inner = self.arm.inner
                inner._data.qpos[0] += self.turn
                inner._target[0] += self.turn
                inner._mujoco.mj_forward(inner._model, inner._data)
                self.away = False
            return send(*target)

        rig.connection.send = later


@pytest.mark.parametrize("turn, outside", [(0.2, False), (1.0, True)])
def test_where_the_arm_was_carried_it_stays_until_it_is_seen_and_goes_on_from_there(
    turn, outside, capfd
):
    rig, arm = plain(Person(space))
    carried = Carried(arm, turn)
    with (
        pytest.raises(UserError, match="moved outside its limits .box.*holds where it is")
        if outside
        else contextlib.nullcontext(),
        rig,
    ):
        carried.back(rig)
        take = rig.episode(carried.act, 0)
        assert [len(piece["action"]) for piece in take.pieces] == [4, 6] and rig.guard.counts[
            "rejoined"
        ] == 1
        rig.watch.heed("stop")
    sent = np.array(arm.sent)
    leap = np.abs(np.diff(sent, axis=0)).max(0)
    assert leap[0] == pytest.approx(turn, abs=0.05)  # to where it is, not back to where it was
    assert (
        np.count_nonzero(np.abs(np.diff(sent[:, 0])) > 0.1) == 1 and abs(sent[-1, 0] - turn) < 0.1
    )
    assert "HOLDING" in capfd.readouterr().err


@pytest.mark.realtime
def test_nor_does_the_watchdog_repeat_a_target_that_may_be_far_from_the_arm():
    rig, arm = plain(Person(space), realtime=True)
    with rig:
        counts = [len(arm.sent)]
        rig.connection.watched = True
        for rig.connection.link in (Link.BLIND, Link.SEEN_AGAIN):
            time.sleep(6 * PERIOD)
            counts.append(len(arm.sent))
        rig.connection.watched = False
        rig.connection.link = Link.SOUND
    assert counts[0] == counts[1] < counts[2]


def test_no_key_suspends_or_kills_the_program_while_the_arm_is_under_power():
    """What Ctrl-Z and Ctrl-\\ send, in a process group where a suspension would work."""
    code = (
        "import os, signal\nfrom arms.rig import session\nfrom arms.settings import parse_args\n"
        "for number in (signal.SIGTSTP, signal.SIGQUIT): signal.signal(number, signal.SIG_DFL)\n"
        f"with session(parse_args(['record', *{TOY!r}])):\n"
        "    for number in (signal.SIGTSTP, signal.SIGQUIT): os.kill(os.getpid(), number)\n"
        "handlers = [signal.getsignal(one) for one in (signal.SIGTSTP, signal.SIGQUIT)]\n"
        "print('awake', handlers == [signal.SIG_DFL] * 2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        process_group=0,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert "awake True" in process.communicate(timeout=30)[0]
    finally:
        process.kill()


def test_a_pause_while_recording_holds_and_goes_on_smoothly():
    """Nobody but the operator leads there, so without them nobody does."""
    person = Person(space, [None] * 3 + ["pause"] + [None] * 4 + ["pause"])
    rig, arm = plain(person)
    rig.operator = Leader(ScriptedExpert(arm.inner), arm.profile)
    with rig:
        before = len(arm.sent)
        take = rig.episode(None, 0)
        sent = np.array(arm.sent[before:])
        rig.watch.heed("stop")
    assert (
        [len(piece["action"]) for piece in take.pieces] == [2, 8]
        and take.dropped == 5
        and take.interventions == 10
    )
    assert np.ptp(sent[-14:-8], axis=0).max() == 0 and np.ptp(sent[-8:], axis=0).max() > 0
    asked = np.abs(np.array(take.pieces[1]["requested"])[:, :6]).max(1)
    assert (asked <= (np.arange(8) + 1) * PERIOD + 1e-6).all()


@pytest.mark.parametrize("role", ["train", "eval"])
def test_who_stops_it_before_the_arm_has_power_sees_no_motion(role, tmp_path, monkeypatch):
    where = ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]
    robot.main(["record", *TOY, "--episodes", "1", *where])
    robot.main(["train", *TOY, "--episodes", "1", "--episode-limit", "5", *where])
    connected, slow = [], {"train": "layout", "eval": "trained"}[role]
    monkeypatch.setattr(rig_module.Rig, "__enter__", lambda rig: connected.append(rig))
    session = robot.session

    @contextlib.contextmanager
    def stopped(args):
        with session(args) as rig:
            meanwhile = getattr(robot, slow)
            monkeypatch.setattr(
                robot,
                slow,
                lambda *given: setattr(rig.interrupt, "stop", True) or meanwhile(*given),
            )
            yield rig

    monkeypatch.setattr(robot, "session", stopped)
    command = {
        "train": ["train", "--resume", str(tmp_path / "run"), "--episodes", "2"],
        "eval": ["eval", *where[2:]],
    }
    assert not robot.main(command[role]) and not connected


class Bare:
    """A driver with one camera whose robot does what `give` does."""

    observation_features = {"front": (8, 8, 3)}

    def __init__(self, give):
        self.give = give
        self.profile = piper_profile()
        self.kinematics = self.profile.kinematics()

    def get_observation(self):
        fixed = {name: 0.1 for name in JOINTS}
        return fixed | {"gripper.pos": 0.0, "stamp": 0.0, "front.stamp": 0.0} | self.give()


@pytest.mark.parametrize(
    "give, told",
    [
        (lambda: {"front": None}, "TypeError"),
        (lambda: {"gripper.pos": None}, "TypeError"),
        (
            lambda: fail(type("error", (Exception,), {})("grab failed")),
            "grab failed",
        ),  # what cv2's and can's are
        (lambda: fail(TimeoutError("no frame")), "no frame"),
    ],
)
def test_whatever_a_driver_does_is_a_lost_view_and_no_traceback(give, told):
    picture = {"front": np.zeros((8, 8, 3), np.uint8)}
    arm, senses = Bare(lambda: picture), Senses(Bare(dict), Pace(False), "vision")
    assert senses.read(arm) is not None
    assert senses.read(Bare(lambda: picture | give())) is None and told in senses.fault
    with pytest.raises(UserError):
        senses.read(Bare(lambda: fail(UserError("no OpenGL"))))


@pytest.mark.realtime
def test_a_command_that_fails_in_any_way_is_held_and_the_watchdog_outlives_it(capfd):
    rig, arm = plain(Person(space), realtime=True)
    send, falls = arm.send_action, iter([False] * 5 + [True] * 3)

    class CanError(Exception):  # python-can's is as plain
        pass

    arm.send_action = lambda action: (
        fail(CanError("bus off")) if next(falls, False) else send(action)
    )
    with rig:
        take = rig.episode(lambda obs: ahead(obs)[:1], 0)
        before, watching, rig.connection.watched = (
            len(arm.sent),
            [one.name for one in threading.enumerate()],
            True,
        )
        falls = iter([True] * 2)
        time.sleep(8 * PERIOD)
        after, rig.connection.watched = len(arm.sent), False
    assert take.outcome == "timeout" and "did not reach the arm (bus off)" in capfd.readouterr().err
    assert "watchdog" in watching and after > before


@pytest.mark.parametrize(
    "wrong",
    [
        {"gripper.pos": float("nan")},
        {"gripper.pos": None},
        {"joint_2.pos": float("nan")},
        {"joint_2.pos": "open"},
    ],
)
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
    assert np.isfinite([list(call.values()) for call in calls]).all() and rig.watch.ending is None
    assert take.dropped == 1 and take.steps == 10
    streams = capfd.readouterr()
    assert (
        "HOLDING: a command did not reach the arm" in streams.err
        and "did not go to rest" not in streams.err
    )


@pytest.mark.parametrize("error", [OSError("silent"), type("CanError", (Exception,), {})("silent")])
def test_whatever_the_operators_arm_raises_ends_the_session_in_order(error):
    teleop = type("Leader", (), {"get_action": lambda self: fail(error)})()
    rig, arm = plain(Person(space), teleop=teleop)
    with pytest.raises(UserError, match=f"arm is lost.*{type(error).__name__}: silent"), rig:
        rig.episode(None, 0)
    assert not arm.is_connected


# ---- an arm or a camera that freezes, an arm that is unplugged


def test_a_frozen_arm_holds_is_reported_and_leaves_no_hole_in_the_data(tmp_path, capfd):
    scene = Scene(
        at={8: lambda s: s.arm.freeze_state(), 14: lambda s: s.arm.freeze_state(False)}, limit=20
    )
    asked = []
    with scene.rig as rig:
        take = rig.episode(lambda obs: asked.append(len(scene.sent)) or still(obs) + 0.3, 0)
    assert "HOLDING: the arm is silent or frozen" in capfd.readouterr().err
    assert take.dropped >= 5 and take.steps == 20 and len(take.pieces) == 2
    assert np.ptp(scene.sent[10:15], axis=0).max() == 0  # it held
    assert asked[:4] == [0, 4, 8, 15]  # then a new chunk, not what was left
    assert take.save(tmp_path / "episode_00000.hdf5", scene.task, False)
    rows = load([tmp_path / "episode_00000.hdf5"], scene.task)
    assert rows["truncated"].sum() == 2 and not rows["terminated"].any()
    joined = ~rows["truncated"].astype(bool)[:-1]  # within a piece steps join exactly
    np.testing.assert_array_equal(rows["next_obs"][:-1][joined], rows["obs"][1:][joined])


def test_a_success_after_a_hole_is_not_put_on_the_step_before_it(tmp_path):
    obs, action = np.zeros(20), np.zeros(7)
    take = Episode(obs)
    take.add(action, action, obs)
    take.drop(obs)
    take.save(
        tmp_path / "one.hdf5",
        layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9, "object": 4}),
        True,
    )
    with h5py.File(tmp_path / "one.hdf5") as file:
        assert list(file["data"]) == ["demo_0"] and file["data/demo_0/rewards"][:].tolist() == [0]


def test_an_unplugged_arm_ends_the_session_in_one_line_and_is_left_holding(capfd):
    scene = Scene(at={5: lambda s: s.arm.unplug()})
    with pytest.raises(UserError, match="unplugged.*five seconds.*cables"), scene.rig as rig:
        rig.episode(still, 0)
    assert (
        "HOLDING" in (err := capfd.readouterr().err)
        and "holds where it is" in err
        and not scene.arm.is_connected
    )


def test_without_its_keypad_the_arm_stays_where_it_is(capfd):
    scene = Scene(at={5: lambda s: setattr(s.keypad, "gone", True)})
    with pytest.raises(UserError, match="keypad is gone"), scene.rig as rig:
        rig.episode(still, 0)
    assert (
        len(scene.sent) == 7 and "holds where it is" in capfd.readouterr().err
    )  # one hold, no way to rest


class Camera:
    """A driver whose picture freezes after `frames` reads."""

    observation_features = dict.fromkeys((*JOINTS, "gripper.pos", "stamp"), float) | {
        "front": (64, 64, 3)
    }

    def __init__(self, frames):
        self.frames, self.reads = frames, 0
        self.profile = piper_profile()
        self.kinematics = self.profile.kinematics()

    def get_observation(self):
        self.reads += 1
        picture = np.full((64, 64, 3), min(self.reads, self.frames), np.uint8)
        return dict.fromkeys(JOINTS, 0.1) | {
            "gripper.pos": 0.0,
            "stamp": float(self.reads),
            "front": picture,
        }


def test_a_frozen_camera_is_stale_after_200_ms_even_without_a_stamp():
    pace = Pace(False)
    driver = Camera(5)
    senses, fresh = Senses(driver, pace), []
    assert senses.sizes["front"] > 100
    for _ in range(10):
        fresh.append(senses.read() is not None)
        pace.wait()
    assert fresh == [True] * 8 + [False] * 2 and "camera front" in senses.fault
