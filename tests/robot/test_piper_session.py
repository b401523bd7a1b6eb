"""The Piper's driver in the arm's loop, against a fake arm on a virtual bus: record, eval, faults.

    python -m pytest tests/robot/test_piper_session.py

Needs piper_sdk and python-can, skipped without.
"""

import contextlib
import dataclasses
import shlex
import struct
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from robot_toys import JOINTS, rig_on

import arms.rig as rig_module
import robot
from arms.episodes import layout, numbered
from arms.keypad import ScriptedPad
from arms.learner import Learner
from arms.settings import parse_args
from logbook import Logbook, UserError, cli

can = pytest.importorskip("can")
pytest.importorskip("piper_sdk")
from test_piper import FakeArm, names  # noqa: E402

from arms.piper import PiperArm, PiperLeader  # noqa: E402

pytestmark = pytest.mark.realtime

REST = np.array([0.0, 0.4, -0.4, 0.0, 0.3, 0.0])
SIZES = {"joints": 6, "gripper": 1, "eef": 9}
TOY = shlex.split(
    "--task insert-usb --preset cpu --robot piper --hidden 32 --layers 2 --flow-steps 2 "
    "--batch-size 16 --num-candidates 4 --pretrain-steps 20 --device cpu --episode-limit 12"
)


class Hand:
    """Tele-operates a little around the pose it starts from."""

    def connect(self):
        self.calls = 0

    def get_action(self):
        self.calls += 1
        joints = REST + [0.0, 0.03, 0.0, 0.0, 0.02 * np.sin(self.calls / 3), 0.0]
        return dict(zip(JOINTS, joints)) | {"gripper.pos": 0.02}


@pytest.fixture
def fake():
    arm = FakeArm(next(names))
    arm.joints, arm.channel = (
        [round(np.degrees(joint) * 1000) for joint in REST],
        arm.bus.channel_info.split()[-1],
    )
    yield arm
    arm.close()


class Pad(ScriptedPad):
    """Places the object whenever it is asked to, then plays one script per episode: an event or
    None per period.
    """

    def __init__(self, *scripts):
        super().__init__()
        self.scripts = [list(script) for script in scripts]

    def wait(self, seconds):
        assert self.scripts, "an episode more than there are scripts"
        self.events = self.scripts.pop(0)
        return "pause"


class Scene:
    """A rig in real time on the driver; `at` maps periods to what happens then."""

    def __init__(self, fake, events, at=None, release=False, limit=12):
        self.args = parse_args(
            ["train", *TOY, *(["--release"] * release), "--episode-limit", str(limit)]
        )
        self.arm = PiperArm(
            fake.channel, bus="virtual", timeout=1.0, rest=REST + [0.15, 0, 0, 0, 0, 0]
        )
        self.asked, self.at = 0, at or {}
        self.keypad = Pad(events)
        self.rig = rig_on(self.arm, self.args, self.keypad, realtime=True)

    def act(self, obs):
        """One action at a time, so that each period asks."""
        self.asked += 1
        self.at.get(self.asked, lambda: None)()
        return np.array([[0.2, 0, -0.2, 0, 0, 0, -0.5]], np.float32)


def targets(fake):
    """All joint targets (T, 6) in degrees that reached the arm, one row per command."""
    parts = [
        np.array([struct.unpack(">ii", data) for data in fake.sent(number)])
        for number in (0x155, 0x156, 0x157)
    ]
    count = min(map(len, parts))
    return np.concatenate([part[:count] for part in parts], 1) / 1000


def power_cut(fake):
    return [data for data in fake.sent(0x471) if data[1] != 2] + fake.sent(0x150)


def test_an_episode_moves_the_arm_within_its_limits_and_ends_at_rest_under_power(fake):
    scene = Scene(fake, [None] * 9 + ["success"])
    with scene.rig as rig:
        take = rig.episode(scene.act, 0)
    assert take.outcome == "success" and take.steps == 9 and take.dropped == 0 and scene.asked == 9
    ran = np.array(take.pieces[0]["obs"])[:, 7:10]
    assert 0.01 < np.linalg.norm(ran[-1] - ran[0]) < 0.15  # the real arm followed
    speed = np.abs(np.diff(targets(fake), axis=0)).max() * 15
    assert speed <= 91 and not power_cut(fake) and fake.enabled and not scene.arm.is_connected
    np.testing.assert_allclose(
        targets(fake)[-1], np.degrees(scene.arm.rest), atol=1.5
    )  # held where it was


def test_a_cable_pulled_for_a_moment_costs_its_steps_and_nothing_else(fake, capfd):
    timeline = {5: lambda: setattr(fake, "silent", True)}
    scene = Scene(fake, [None] * 30 + ["fail"], timeline, limit=100)
    poll, calls = scene.keypad.poll, []

    def back():
        calls.append(len(fake.log))
        if len(calls) == 12:
            fake.silent = False
        return poll()

    scene.keypad.poll = back
    with scene.rig as rig:
        take = rig.episode(scene.act, 0)
    told = [line for line in capfd.readouterr().err.splitlines() if "HOLDING" in line]
    assert len(told) == 1 and "nothing new" in told[0]
    assert (
        take.steps + take.dropped == 30
        and take.dropped >= 3
        and len(take.pieces) == 2
        and not power_cut(fake)
    )


def mute(fake, arm, monkeypatch):
    fake.silent = True


def bus_off(fake, arm, monkeypatch):
    monkeypatch.setattr(
        type(arm._sdk.GetCanBus().send_bus), "state", property(lambda self: can.BusState.ERROR)
    )


def full_queue(fake, arm, monkeypatch):
    def send(message, timeout=None):
        raise can.CanOperationError("No buffer space available")

    monkeypatch.setattr(arm._sdk.GetCanBus().send_bus, "send", send)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [mute, bus_off, full_queue])
def test_a_cable_pulled_for_good_ends_the_session_in_one_line_and_the_arm_holds(
    fake, fault, monkeypatch, capfd
):
    scene, kept = Scene(fake, [], release=True, limit=1000), []

    def pull():
        kept.append(targets(fake)[-1])
        fault(fake, scene.arm, monkeypatch)

    scene.at = {5: pull}
    with pytest.raises(UserError, match="five seconds.*cables.*--resume"), scene.rig as rig:
        rig.episode(scene.act, 0)
    err = capfd.readouterr().err
    assert err.count("HOLDING") == 1 and "holds where it is" in err and "Traceback" not in err
    assert (
        fake.enabled and not power_cut(fake) and not scene.arm.is_connected
    )  # not even with --release
    assert np.abs(targets(fake)[-1] - kept[0]).max() < 7  # one period's motion at most


def test_the_power_is_cut_with_release_at_rest_only(fake):
    scene = Scene(fake, [None, None, "quit"], release=True)
    with scene.rig as rig:
        rig.episode(scene.act, 0)
        assert not power_cut(fake)
    np.testing.assert_allclose(targets(fake)[-1], np.degrees(scene.arm.rest), atol=1.5)
    assert len(power_cut(fake)) == 1 and not fake.enabled


def test_stop_holds_and_does_not_release(fake):
    scene = Scene(fake, [None, None, "stop"], release=True)
    with scene.rig as rig:
        rig.episode(scene.act, 0)
    time.sleep(0.05)
    assert fake.enabled and not power_cut(fake)


def test_record_and_eval_through_the_command_line(fake, tmp_path, monkeypatch, capsys):
    """What a user types, with a script in the place of the keys: two demonstrations, a policy of
    them, two episodes.
    """
    monkeypatch.setitem(sys.modules, "hand", sys.modules[__name__])
    pads = [
        Pad(*[[None] * 12 + ["success"]] * 2),
        Pad([None] * 5 + ["success"], [None] * 5 + ["fail"]),
    ]
    monkeypatch.setattr(rig_module, "open_keypad", lambda name: pads.pop(0))
    where = ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]
    wires = ["--options", f"channel={fake.channel}", "bus=virtual"]
    robot.main(
        [
            "record",
            *TOY,
            *wires,
            "--teleop",
            "hand:Hand",
            "--episodes",
            "2",
            "--episode-limit",
            "30",
            *where,
        ]
    )
    files = numbered(tmp_path / "demos")
    with h5py.File(files[0]) as file:
        assert len(files) == 2 and file["data/demo_0/rewards"][:].tolist() == [0] * 11 + [1]
        assert file["data/demo_0/intervention"][:].all() and sorted(
            file["data/demo_0/obs"]
        ) == sorted(SIZES)
    args = parse_args(["train", *TOY, *wires, *where])
    Logbook.create(
        tmp_path / "run", dataclasses.asdict(args) | {"method": "robot"}, robot.COLUMNS, False
    ).close()
    assert Learner(args, layout(args.task, SIZES)).pretrain(
        lambda one: one.save(tmp_path / "run" / "last.pt")
    )
    rows = robot.main(
        ["eval", "--run-dir", str(tmp_path / "run"), "--episodes", "2", "--recover"]
    )  # it is at rest
    assert [row["success"] for row in rows] == [
        True,
        False,
    ] and "success 1 of 2" in capsys.readouterr().out
    assert fake.enabled and not power_cut(fake)


class Leader(PiperLeader):
    """The leader's driver on a virtual bus where a fake leader speaks every 20 ms, until it was
    asked ten times.
    """

    instances = []

    def __init__(self):
        super().__init__(next(names), "virtual")
        self.asked, self.done = 0, threading.Event()
        self.instances.append(self)

    def connect(self, calibrate=True):
        super().connect()
        self.bus_end = can.Bus(interface="virtual", channel=self.channel)
        threading.Thread(target=self.speak, daemon=True).start()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(ConnectionError):  # until it is heard
                return super().get_action()
            time.sleep(0.02)

    def speak(self):
        degrees = [round(np.degrees(joint) * 1000) for joint in REST + [0, 0.03, 0, 0, 0, 0]]
        frames = [struct.pack(">ii", *degrees[2 * i : 2 * i + 2]) for i in range(3)]
        frames.append(struct.pack(">ihBB", 20_000, 0, 1, 0))
        while not self.done.wait(0.02):
            for number, data in zip((0x155, 0x156, 0x157, 0x159), frames):
                self.bus_end.send(
                    can.Message(arbitration_id=number, data=data, is_extended_id=False)
                )
        self.bus_end.shutdown()

    def get_action(self):
        self.asked += 1
        if self.asked == 10:
            self.done.set()
        return super().get_action()


def lead(fake, tmp_path, monkeypatch, *more):
    """`record` with the leader arm, one episode of 200 steps, as from a shell; the exit code."""
    monkeypatch.setitem(sys.modules, "leads", sys.modules[__name__])
    monkeypatch.setattr(rig_module, "open_keypad", lambda name: Pad([None] * 200))
    wires = [
        "--options",
        f"channel={fake.channel}",
        "bus=virtual",
        "--data",
        str(tmp_path / "demos"),
    ]
    with pytest.raises(SystemExit) as end:
        cli(
            lambda: robot.main(
                [
                    "record",
                    *TOY,
                    *wires,
                    "--teleop",
                    "leads:Leader",
                    "--episode-limit",
                    "200",
                    *more,
                ]
            )
        )
    return end.value.code


def test_a_leader_arm_that_goes_silent_ends_in_one_line_after_hold_and_rest(
    fake, tmp_path, monkeypatch, capfd
):
    assert lead(fake, tmp_path, monkeypatch) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line]
    assert (
        len(err) == 1
        and err[0].startswith("error: the operator's arm is lost")
        and "is silent: powered" in err[0]
    )
    leader, ran = Leader.instances.pop(), targets(fake)
    leader.disconnect()
    assert leader.asked > 10  # it led, then half a second passed
    assert np.abs(np.diff(ran, axis=0)).max() * 15 <= 91 and np.abs(ran[:, 1]).max() > 24
    np.testing.assert_allclose(ran[-1], 0, atol=1.5)  # degrees: where it rests
    assert fake.enabled and not power_cut(fake) and not numbered(tmp_path / "demos")


def test_a_leader_arm_without_its_bus_is_one_line_before_anything_moves(
    fake, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(Leader, "connect", lambda self: PiperLeader("can7").connect())
    assert lead(fake, tmp_path, monkeypatch) == 2
    err = capfd.readouterr().err.splitlines()
    assert (
        "--teleop leads:Leader" in err[-1]
        and "can7" in err[-1]
        and "Traceback" not in "".join(err)
        and not fake.log
    )
