"""The loop of an arm: starts, keys, hand-overs, labels, every way out; settings that are refused.

python -m pytest tests/robot/test_rig.py
"""

import contextlib
import io
import os
import pty
import sys
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from robot_toys import JOINTS, ROOT, SIZES, TOY, Person, Plain, Scene, ahead, plain, space, still

import arms.rig as rig_module
from arms.driver import Driver
from arms.episodes import load, outcome
from arms.keypad import ScriptedPad
from arms.rig import LATE
from arms.senses import PERIOD, Pace, Senses
from arms.settings import TASKS, open_driver, parse_args
from arms.sim import SimArm
from logbook import UserError

ASIDE = [
    "--box-center",
    "36",
    "3",
    "-2",
    "--box-size",
    "8",
    "8",
    "8",
]  # cm; the tool starts at 30, 0, 1


@pytest.mark.parametrize(
    "flags",
    (
        "--updates-per-step inf",
        "--updates-per-step nan",
        "--heads 0",
        "--leash -1",
        "--learning-rate 0",
        "--threads 0",
        "--pretrain-steps 0",
        "--max-turn nan",
    ),
)
def test_settings_that_could_only_fail_later_are_refused(flags):
    flag, value = flags.split()
    least = "a finite number|greater than 0|at least 1"
    with pytest.raises(UserError, match=f"{flag} must be ({least}), got {value}"):
        parse_args(["train", *TOY, *flags.split()])


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--clip nan", "a finite number, got nan"),
        ("--guidance -1", "at least 0"),
        ("--pessimism nan", "a finite number"),
        ("--temperature 1e-9", "at least 1e-06"),
        ("--seed -1", "at least 0"),
        ("--demo-share 2", "at most 1, got 2"),
        ("--reward-offset nan", "a finite number"),
        ("--capacity 2", "cannot hold one chunk"),
        ("--device gpu", "cannot be used here"),
        ("--box-size nan nan nan", "three lengths in cm"),
        ("--box-center inf 0 0", "a place in cm"),
        ("--options size=abc", "does not take these options"),
    ],
)
def test_so_are_these(flags, told):
    with pytest.raises(UserError, match=f"{flags.split()[0]} .*{told}|{told}"):
        open_driver(parse_args(["train", *TOY, *flags.split()]))


# ---- a start outside the box


def rig(*flags, shift=0.0):
    """A rig on the simulated arm, whose encoders may be wrong by `shift` rad, and what it was
    sent.
    """
    args = parse_args(["train", *TOY, *ASIDE, *flags])
    driver, operator = open_driver(args)
    arm = driver.robot
    sent, send, get = [], arm.send_action, arm.get_observation
    arm.send_action = lambda action: sent.append([action[name] for name in JOINTS]) or send(action)
    arm.get_observation = lambda: {
        name: value + shift * (name == JOINTS[4]) for name, value in get().items()
    }
    senses = Senses(driver, Pace(False))
    inside = rig_module.Rig(
        args, driver, senses, ScriptedPad(), operator, SimpleNamespace(stop=False), True
    )
    return inside, sent


def test_outside_the_box_nothing_moves_without_recover():
    outside, sent = rig()
    with pytest.raises(UserError, match="outside its limits.*--recover"), outside:
        pass
    assert not sent and not outside.driver.robot.is_connected


def test_recover_goes_slowly_to_the_middle_of_the_box():
    inside, sent = rig("--recover")
    with inside:
        count, place = len(sent), inside.senses.kinematics.fk(inside.senses.read().joints)[0]
        np.testing.assert_allclose(place, [0.36, 0.03, -0.02], atol=0.01)
        assert inside.guard.outside(inside.home) is None
    speed = np.abs(np.diff(sent[:count], axis=0)).max() / PERIOD
    assert count > 5 and speed <= np.radians(90) / 4 + 1e-6  # a quarter of the limit


def test_recover_does_not_move_an_arm_whose_zero_is_wrong():
    wrong, sent = rig("--recover", shift=2.0)
    with pytest.raises(UserError, match="check its zero"), wrong:
        pass
    assert not sent


def test_recover_gives_up_when_the_middle_of_the_box_is_out_of_workspace_of():
    far, sent = rig("--recover", "--box-center", "120", "0", "0")
    with pytest.raises(UserError, match="cannot reach the middle of the box"), far:
        pass
    assert not sent and not far.driver.robot.is_connected


def test_quitting_ends_a_recovery_at_once():
    inside, sent = rig("--recover")
    send = inside.driver.robot.send_action

    def quit_at_three(action):
        inside.interrupt.stop = len(sent) >= 2
        return send(action)

    inside.driver.robot.send_action = quit_at_three
    with pytest.raises(UserError, match="did not reach"), inside:
        pass
    assert len(sent) == 3


# ---- an arm that is no simulation: nobody resets it, and somebody places the object


def test_no_command_of_the_policy_before_somebody_agreed():
    lost, arm = plain(Person(lambda person: setattr(person, "gone", True)))
    with pytest.raises(UserError, match="keypad is gone"), lost:
        lost.episode(ahead, 0)
    assert np.ptp(arm.sent, axis=0).max() < 1e-9  # only holds
    for key in ("quit", "stop"):
        asked, arm = plain(Person(lambda person, key=key: person.events.append(key)))
        with asked:
            take = asked.episode(ahead, 0)
            assert take.outcome == key and take.steps == 0 and asked.watch.ending == key
    told = []
    eager, _ = plain(Person(space))
    eager.keypad.forget = lambda: told.append("forgotten")
    with eager:
        eager.episode(ahead, 0)
    assert told == ["forgotten"] * 2  # before the first command and before the label


@pytest.mark.parametrize("key", ["quit", "stop"])
def test_a_key_on_the_way_to_the_start_ends_the_session_there(key):
    asked, arm = plain(Person(space, [None, None, key]))
    with asked:
        asked.home = asked.home + [0.4, 0, 0, 0, 0, 0]
        take = asked.episode(ahead, 0)
        assert take.outcome == key and take.steps == 0 and len(arm.sent) == 3
    assert (len(arm.sent) == 4) == (key == "stop")  # after q the way to rest


def test_without_its_keypad_no_way_is_gone_on(capfd):
    asked, arm = plain(Person(space))
    asked.keypad.poll = lambda: setattr(asked.keypad, "gone", len(arm.sent) >= 3)
    with pytest.raises(UserError, match="keypad is gone"), asked:
        asked.home = asked.home + [0.4, 0, 0, 0, 0, 0]
        asked.episode(ahead, 0)
    assert (
        len(arm.sent) == 4 and "holds where it is" in capfd.readouterr().err
    )  # three steps and a hold


def test_x_is_obeyed_on_the_way_out_too():
    leaving, arm = plain(Person(space))
    with leaving:
        leaving.interrupt.stop, leaving.rest = True, leaving.rest + [0.5, 0, 0, 0, 0, 0]
        assert leaving.episode(ahead, 0).outcome == "quit"
        leaving.keypad.events, before = [None, None, "stop"], len(arm.sent)
    assert len(arm.sent) - before == 1 + 3


def test_a_tele_operator_without_a_number_is_no_command():
    class Broken:
        def get_action(self):
            return dict.fromkeys(JOINTS, np.nan) | {"gripper.pos": 0.0}

    held, arm = plain(Person(space), teleop=Broken())
    with held:
        take = held.episode(None, 0)
        assert take.outcome == "timeout" and held.guard.counts["nonfinite"] == 10
        assert np.ptp(arm.sent, axis=0).max() < 1e-9


@pytest.mark.realtime
def test_the_watchdog_repeats_the_last_target_and_never_while_the_driver_is_read():
    watched, arm = plain(Person(space), realtime=True)
    asked = []

    def act(obs):
        asked.append(len(arm.sent))
        if len(asked) == 2:
            time.sleep(0.5)  # five periods of silence
            asked.append(np.ptp(arm.sent[asked[1] - 1 :], axis=0).max())
        arm.slow = 0.4 * (len(asked) == 5)  # so has the driver
        return ahead(obs)[:1]

    with watched:
        watched.episode(act, 0)
    assert (
        watched.connection.trips >= 2
        and asked[2] < 1e-9
        and arm.overlaps == 0
        and "watchdog" in watched.status()
    )


@pytest.mark.realtime
def test_what_a_policy_made_of_an_old_view_is_not_executed(capfd):
    late, arm = plain(Person(space), realtime=True)
    calls = []

    def act(obs):
        calls.append(len(arm.sent))
        time.sleep((LATE + 0.1) * (len(calls) == 2))
        return ahead(obs)

    with late:
        take = late.episode(act, 0)
    assert take.dropped == 1 and [len(piece["action"]) for piece in take.pieces] == [4, 6]
    assert (
        "HOLDING: the policy took 1." in capfd.readouterr().err and late.guard.counts["late"] == 1
    )


def test_a_stamp_that_is_no_number_is_stale():
    arm = Plain(True)
    arm.connect()
    senses = Senses(Driver(arm, arm.profile), Pace(True))
    frozen = arm.get_observation() | {"stamp": np.nan}
    arm.get_observation = lambda: frozen
    assert senses.read() is None and "nothing new" in senses.fault


def test_whatever_the_terminal_the_arm_is_left_in_order(monkeypatch):
    class Gone(io.TextIOBase):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    left, arm = plain(Person(space))
    with pytest.raises(ZeroDivisionError), left:
        monkeypatch.setattr(sys, "stderr", Gone())
        left.episode(lambda obs: 1 / 0, 0)
    assert np.allclose(arm.sent[-1], arm.rest, atol=1e-3) and not arm.is_connected


def test_a_real_arm_needs_a_keypad(monkeypatch):
    arm = Plain(False)
    opened = Driver(arm, arm.profile), None
    monkeypatch.setattr(rig_module, "open_driver", lambda args: opened)
    args = parse_args(["train", *TOY, "--keypad", "none"])
    refused = pytest.raises(UserError, match="--keypad none is for a simulated arm")
    with refused, rig_module.session(args):
        pass


@pytest.mark.parametrize("fault", [None, OSError("unplugged")])
def test_the_leader_is_let_go_whatever_happens(fault, monkeypatch):
    left = []

    class Operator:
        def close(self):
            left.append(True)
            raise fault or RuntimeError("twice")

    arm = SimArm("peg", cameras=False, realtime=False)
    opened = Driver(arm, arm.profile), Operator()
    monkeypatch.setattr(rig_module, "open_driver", lambda args: opened)
    ended = pytest.raises(OSError) if fault else contextlib.nullcontext()
    with ended, rig_module.session(parse_args(["train", *TOY])):
        if fault:
            raise fault
    assert left == [True]


def test_seeds_of_recording_training_and_evaluation_never_meet():
    seeds = [
        parse_args([role, *TOY, "--seed", str(seed)]).seed_of(number)
        for role in ("record", "train")
        for seed in (0, 1, 49, 50, 51, 99, 100, 150)
        for number in (0, 9999)
    ]
    tested = parse_args(["record", *TOY])
    tested.role = "eval"
    for tested.seed in (0, 49, 50, 100):
        seeds += [tested.seed_of(0), tested.seed_of(9999)]
    assert len(set(seeds)) == len(seeds) and tested.seed_of(1) == tested.seed_of(0) + 1


def test_as_many_demonstrations_as_in_the_paper(monkeypatch):
    counts = [
        parse_args(["record", "--preset", "paper", "--task", task]).episodes for task in TASKS
    ]
    assert counts == [40, 30, 50, 40, 50, 50] and parse_args(["record", *TOY]).episodes == 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_args(["record", "--preset", "auto"]).episodes == 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_args(["record", "--preset", "auto"]).episodes == 50


def test_a_closed_terminal_is_a_lost_keypad_and_the_arm_is_left_in_order(tmp_path):
    """The terminal that the program runs in, so the kernel sends SIGHUP as well."""
    command = ["robot.py", "record", *SIZES, "--keypad", "terminal", "--episodes", "50"]
    command += ["--data", str(tmp_path / "data")]
    pid, terminal = pty.fork()
    if pid == 0:
        code = (
            "import sys, arms.sim, robot; from logbook import cli; from pathlib import Path\n"
            "leave = arms.sim.SimArm.disconnect\n"
            f"def told(arm):\n    leave(arm); Path({str(tmp_path / 'left')!r}).touch()\n"
            "arms.sim.SimArm.disconnect = told\n"
            f"sys.argv = {command!r}\n"
            "cli(robot.main)"
        )
        os.execve(
            sys.executable, [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
        )
    seen, end = b"", time.monotonic() + 60
    while b"box" not in seen and time.monotonic() < end:
        seen += os.read(terminal, 4096)
    time.sleep(0.5)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), "the hang-up killed it"
    assert (tmp_path / "left").exists()


# ---- labels, hand-overs and exits on the simulated arm


def test_every_ordinary_exit_goes_slowly_to_rest():
    scene = Scene(["quit"])
    with scene.rig as rig:
        assert rig.episode(still, 0).outcome == "quit"
    speed = np.abs(np.diff(scene.sent, axis=0)).max() / PERIOD
    assert speed <= np.radians(90) / 4 + 1e-6 and np.allclose(
        scene.sent[-1], scene.rig.rest, atol=1e-3
    )


def test_an_exception_holds_then_rests_and_stop_only_holds():
    scene = Scene()
    with pytest.raises(ZeroDivisionError), scene.rig as rig:
        rig.episode(lambda obs: 1 / 0, 0)
    assert np.allclose(scene.sent[-1], scene.rig.rest, atol=1e-3)
    scene = Scene([None, None, "stop"])
    with scene.rig as rig:
        assert rig.episode(still, 0).outcome == "stop"
    assert len(scene.sent) == 3


@pytest.mark.parametrize(
    "events, expected, reward",
    [
        ([None] * 4 + ["success"], "success", 1),
        ([None] * 4 + ["fail"], "fail", 0),
        ([None] * 12, "timeout", 0),
        ([None] * 12 + ["success"], "success", 1),
    ],
)
def test_labels(events, expected, reward, tmp_path):
    """Success terminates with reward 1, a failure with 0; running out of time truncates; who
    forgot is asked once.
    """
    scene = Scene(events, limit=12)
    with scene.rig as rig:
        take = rig.episode(still, 0)
    take.save(tmp_path / "episode_00000.hdf5", scene.task, take.outcome == "success")
    rows = load([tmp_path / "episode_00000.hdf5"], scene.task)
    assert take.outcome == expected == outcome(tmp_path / "episode_00000.hdf5")
    assert rows["reward"].sum() == reward and rows["terminated"].sum() == (expected != "timeout")
    assert rows["truncated"].sum() == (expected == "timeout")


def test_a_take_over_is_smooth_flagged_and_forgets_the_rest_of_the_chunk(tmp_path):
    scene, chunks = Scene([None] * 6 + ["pause"] + [None] * 9 + ["pause"], limit=20), []
    with scene.rig as rig:
        take = rig.episode(lambda obs: chunks.append(len(scene.sent)) or still(obs), 3)
    flags = np.array(take.pieces[0]["intervention"])
    assert flags.tolist() == [0] * 6 + [1] * 10 + [0] * 4
    assert chunks == [0, 4, 16]  # at 16 a new one
    asked = np.abs(np.array(take.pieces[0]["requested"])[6:16, :6]).max(1)
    assert (asked <= (np.arange(10) + 1) * PERIOD + 1e-6).all() and asked[-1] > 0.1
    take.save(tmp_path / "episode_00000.hdf5", scene.task, False)
    with h5py.File(tmp_path / "episode_00000.hdf5") as file:
        assert file["data/demo_0/intervention"][:].sum() == 10 and file[
            "data/demo_0/requested"
        ].shape == (20, 7)


def test_pausing_without_an_operator_holds_and_records_nothing():
    scene = Scene([None] * 5 + ["pause"] + [None] * 7 + ["pause"], limit=10, teleop=False)
    with scene.rig as rig:
        take = rig.episode(lambda obs: still(obs) + 0.2, 0)
    assert [len(piece["action"]) for piece in take.pieces] == [5, 5]
    assert np.ptp(scene.sent[5:13], axis=0).max() == 0
