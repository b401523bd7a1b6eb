"""Mistakes around an arm are one line, told before it moves or with it left in order.

python -m pytest tests/robot/test_mistakes.py
"""

import errno
import shlex
import sys

import numpy as np
import pytest
from robot_toys import JOINTS, TOY, Person, Plain, ahead, plain, space

import arms.rig as rig_module
import robot
from arms.driver import Driver
from arms.episodes import Episode, numbered
from arms.keypad import ScriptedPad
from arms.settings import hint, open_driver, parse_args
from logbook import UserError


def test_a_power_cut_that_the_driver_cannot_do_is_refused_at_once():
    with pytest.raises(UserError, match="--release: the driver of sim cannot cut"):
        open_driver(parse_args(["record", *TOY, "--release"]))


def test_recordings_go_to_a_folder_not_to_a_file():
    with pytest.raises(UserError, match="--data my.hdf5 is a file"):
        parse_args(["record", *TOY, "--data", "my.hdf5"])


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(
            "Can't close file (file write failed: errno = 28, "
            "error message = 'No space left on device', buf = 0)"
        ),
    ],
)
def test_a_full_disk_is_one_line_and_the_arm_goes_to_rest(fault, tmp_path, monkeypatch, capfd):
    where = ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]
    robot.main(["record", *TOY, "--episodes", "1", *where])

    def full(*_):
        raise fault

    monkeypatch.setattr(Episode, "save", full)
    for command in (
        ["record", "--episodes", "2"],
        ["train", "--episodes", "1", "--episode-limit", "5"],
    ):
        with pytest.raises(
            UserError, match="cannot write .*episode_0000.*No space left on device.: what"
        ):
            robot.main([command[0], *TOY, *command[1:], *where])
        assert "did not go to rest" not in capfd.readouterr().err
    monkeypatch.setattr(robot, "merge", full)
    with pytest.raises(UserError, match="cannot write .*demos.hdf5.*No space left"):
        robot.main(["record", *TOY, "--episodes", "1", *where])


class Hand:
    """Tele-operates an arm with keys of its own; `speaks` when it is asked."""

    keys, speaks, features = ("shoulder_pan.pos", "gripper.pos"), True, None

    def __init__(self):
        if self.features is not None:
            self.action_features = dict.fromkeys(self.features, float)

    def connect(self):
        pass

    def get_action(self):
        if not self.speaks:
            raise ConnectionError("silent")
        return dict.fromkeys(self.keys, 0.0)


@pytest.mark.parametrize(
    "speaks, features, refused",
    [
        (True, None, True),
        (False, None, False),
        (False, ("shoulder_pan.pos",), True),
        (False, (*JOINTS, "gripper.pos"), False),
    ],
)
def test_an_operator_of_another_kind_is_told_before_anything_moves(
    speaks, features, refused, monkeypatch
):
    monkeypatch.setitem(sys.modules, "hands", sys.modules[__name__])
    monkeypatch.setattr(Hand, "speaks", speaks)
    monkeypatch.setattr(Hand, "features", features)
    args = parse_args(["record", *TOY, "--teleop", "hands:Hand"])
    if not refused:
        assert open_driver(args)[1] is not None
        return
    with pytest.raises(UserError, match="hands:Hand leads another kind of arm.*joint_1.pos"):
        open_driver(args)


def test_an_operator_that_changes_its_keys_ends_in_one_line():
    rig, arm = plain(Person(space), teleop=Hand())
    with pytest.raises(UserError, match="the operator's arm is lost.*joint_1.pos"), rig:
        rig.episode(None, 0)
    assert np.allclose(arm.sent[-1], arm.rest, atol=1e-3)


def test_a_success_without_a_step_is_not_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        rig_module,
        "open_keypad",
        lambda name: ScriptedPad(["success"] + [None] * 5 + ["success", "quit"]),
    )
    robot.main(
        [
            "record",
            *TOY,
            "--keypad",
            "terminal",
            "--episodes",
            "2",
            "--data",
            str(tmp_path / "demos"),
        ]
    )
    told = capsys.readouterr().out
    assert len(numbered(tmp_path / "demos")) == 1
    assert (
        "0 of 2 recorded, 1 tried" in told
        and "1 of 2 recorded, 2 tried" in told
        and "2 of 2" not in told
    )


def test_the_box_of_recordings_that_are_one_file(tmp_path):
    robot.main(["record", *TOY, "--episodes", "1", "--data", str(tmp_path / "demos")])
    boxes = []
    for data in ("demos", "demos.hdf5"):
        args = parse_args(["train", *TOY, "--box-from-demos", "--data", str(tmp_path / data)])
        rig, _ = plain(Person(space))
        rig.args = args
        with rig:
            boxes.append(rig.guard.box)
    np.testing.assert_array_equal(*boxes)
    rig.args = parse_args(["train", *TOY, "--box-from-demos", "--data", str(tmp_path / "none")])
    with pytest.raises(UserError, match="no recorded episodes"), rig:
        pass


def test_help_for_eval_needs_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        parse_args(["eval", "--task", "pick-cube", "--help"])
    assert end.value.code == 0 and "default: pick-cube" in capsys.readouterr().out


def test_eval_takes_the_run_by_either_name(tmp_path):
    where = ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")]
    robot.main(["record", *TOY, "--episodes", "1", *where])
    robot.main(["train", *TOY, "--episodes", "1", "--episode-limit", "5", *where])
    for name in ("--run-dir", "--resume"):
        args = parse_args(["eval", name, where[3]])
        assert (args.role, args.run_dir, args.hidden, args.episodes) == ("eval", where[3], 32, 20)
        assert len(robot.main(["eval", name, where[3], "--episodes", "1"])) == 1
    assert parse_args(["train", "--resume", where[3]]).role == "train"


def test_a_keypad_is_opened_by_the_name_that_was_given(monkeypatch):
    opened = []
    arm = Plain(False)
    monkeypatch.setattr(rig_module, "open_driver", lambda args: (Driver(arm, arm.profile), None))
    monkeypatch.setattr(
        rig_module, "open_keypad", lambda name: opened.append(name) or ScriptedPad()
    )
    for name in ("auto", "/dev/input/by-id/usb-autoid-event-kbd"):
        with rig_module.session(parse_args(["train", *TOY, "--keypad", name])):
            pass
    assert opened == ["terminal", "/dev/input/by-id/usb-autoid-event-kbd"]


@pytest.mark.realtime
def test_an_arm_without_a_stamp_is_as_fresh_as_its_reading():
    """LeRobot's protocol has none."""
    rig, arm = plain(Person(space), realtime=True)
    get = arm.get_observation
    arm.get_observation = lambda: {name: value for name, value in get().items() if name != "stamp"}
    with rig:
        take = rig.episode(ahead, 0)
    assert take.steps == 10 and take.dropped == 0


def test_a_key_pressed_before_the_question_is_no_answer_to_it():
    """A success that came with the last step, too late to count, must not label the episode."""
    person, pressed = Person(space), ["success"]
    person.forget = pressed.clear
    rig, _ = plain(person)
    with rig:
        take = rig.episode(lambda obs: pressed.append("success") or ahead(obs), 0)
        assert take.outcome == "timeout" and pressed == []


# ---- a stop key, whatever judges success


class Judging(Plain):
    """A real arm whose own classifier says what succeeded, after so many commands."""

    succeeds_after = 6

    def success(self):
        return len(self.sent) > self.succeeds_after


def judged_session(monkeypatch, pad, succeeds_after=6):
    """Open a session on such an arm with this keypad; the names of the keypads that were opened."""
    arm = Judging(False)
    arm.succeeds_after = succeeds_after
    opened = []
    monkeypatch.setattr(rig_module, "open_driver", lambda args: (Driver(arm, arm.profile), None))
    monkeypatch.setattr(rig_module, "open_keypad", lambda name: opened.append(name) or pad)
    return arm, opened


@pytest.mark.parametrize("key, outcome", [("stop", "stop"), ("quit", "quit"), ("fail", "fail")])
def test_an_arm_that_judges_itself_still_obeys_the_keys(key, outcome, monkeypatch, capsys):
    pad = Person(space, [None, None, key])
    arm, opened = judged_session(monkeypatch, pad)
    with rig_module.session(parse_args(["train", *TOY])) as rig, rig:
        episode = rig.episode(ahead, 0)
    assert opened == ["terminal"] and "x or ESC stop" in capsys.readouterr().out
    assert episode.outcome == outcome and len(arm.sent) < 6 + (key != "stop") * 400


def test_an_arm_that_judges_itself_pauses_and_succeeds(monkeypatch):
    """Space holds it for three periods; then its own judgement ends the episode."""
    pad = Person(space, [None, "pause", None, None, "pause"])
    _, _ = judged_session(monkeypatch, pad, succeeds_after=8)
    with rig_module.session(parse_args(["train", *TOY])) as rig, rig:
        episode = rig.episode(ahead, 0)
    assert episode.outcome == "success" and rig.guard.counts["paused"] == 3


def test_nobody_switches_the_keys_of_such_an_arm_off(monkeypatch):
    judged_session(monkeypatch, ScriptedPad())
    args = parse_args(["train", *TOY, "--keypad", "none"])
    refused = pytest.raises(UserError, match="stop this one")
    with refused, rig_module.session(args):
        pass


# ---- causes are named


def test_an_observation_without_a_joint_is_named_at_once():
    """Not five seconds of holding and advice about cables."""
    rig, arm = plain(Person(space))
    get = arm.get_observation
    arm.get_observation = lambda: {
        name: value for name, value in get().items() if name != "joint_3.pos"
    }
    with pytest.raises(UserError, match="lacks joint_3.pos.*it has gripper.pos, joint_1.pos"), rig:
        pass
    assert not arm.sent and not arm.is_connected


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"joint_3.pos": -57.0}, "joint_3.pos would be at -3266 degrees.*speaks radians"),
        ({"gripper.pos": 35.0}, "gripper.pos would be 3500.0 cm open.*opens 7 cm"),
    ],
)
def test_measured_numbers_that_cannot_be_are_told_before_the_first_command(wrong, told):
    rig, arm = plain(Person(space))
    get = arm.get_observation
    arm.get_observation = lambda: get() | wrong
    with pytest.raises(UserError, match=told), rig:
        pass
    assert not arm.sent and not arm.is_connected


def test_an_uncalibrated_arm_is_not_driven():
    rig, arm = plain(Person(space))
    arm.is_calibrated = False
    with pytest.raises(UserError, match="not calibrated.*lerobot-calibrate"), rig:
        pass
    assert not arm.sent and not arm.is_connected


def test_a_robot_without_a_profile_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "hands", sys.modules[__name__])
    monkeypatch.setattr(Plain, "profile", None, raising=False)
    args = parse_args(["train", *TOY[:-1], "--robot", "hands:Unknown"])
    with pytest.raises(UserError, match="nobody says in which units hands:Unknown.*--profile"):
        open_driver(args)


class Unknown(Plain):
    """A LeRobot-like arm with the Piper's key names that declares no profile."""

    def __init__(self):
        super().__init__(False)
        self.profile = None

    observation_features = {}
    action_features = {}
    is_calibrated = True


# ---- hints run as printed


def test_the_hint_after_recording_names_the_same_arm_and_data(tmp_path):
    words = ["--robot", "arms.sim:SimArm", "--options", "clearance=0.002", "task=peg"]
    words += ["--data", str(tmp_path / "my demos"), "--no-realtime"]
    args = parse_args(["record", *TOY, *words])
    command = shlex.split(hint(args, "train"))
    assert command[:3] == ["python", "robot.py", "train"]
    again = parse_args(command[2:])
    for name in ("robot", "options", "data", "preset", "task", "realtime", "profile", "teleop"):
        assert getattr(again, name) == getattr(args, name), name
    assert "--robot" in command and "--data" in command
