"""Where an arm works is found once, by hand, and kept: a later session finds the arm at rest.

python -m pytest tests/robot/test_place.py
"""

import json

import numpy as np
import pytest
from robot_toys import TOY, Person, Plain, rig_on, space

import arms.rig as rig_module
import robot
from arms.driver import Driver
from arms.keypad import ScriptedPad
from arms.operator import Leader
from arms.settings import open_driver, parse_args
from arms.teleop import ScriptedExpert
from logbook import UserError, read_args


class Lasting(Plain):
    """One arm for several sessions: where one of them leaves it, the next one finds it."""

    used = False

    def connect(self, calibrate=True):
        if not self.used:
            super().connect()
        self.used = self.inner._connected = True

    def fold(self):
        """To its rest pose at once."""
        self.connect()
        self.inner._data.qpos[:6] = self.inner._target[:6] = self.inner._data.ctrl[:6] = self.rest
        self.inner._mujoco.mj_forward(self.inner._model, self.inner._data)
        return self


def session(arm, *command):
    """A rig on this arm for the command's words."""
    args = parse_args([*command[:1], *TOY, *command[1:]])
    return rig_on(arm, args, ScriptedPad())


def limits(rig):
    return [rig.guard.box, rig.guard.axis, rig.home]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """An arm whose first session has recorded one episode, and the flags that name the data and
    the run.
    """
    arm, where = (
        Lasting(False),
        ["--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")],
    )
    opened = Driver(arm, arm.profile), Leader(ScriptedExpert(arm.inner), arm.profile)
    monkeypatch.setattr(rig_module, "open_driver", lambda args: opened)
    monkeypatch.setattr(
        rig_module, "open_keypad", lambda name: Person(space, [None] * 8 + ["success"])
    )
    robot.main(["record", *TOY, "--keypad", "terminal", "--episodes", "1", *where])
    assert np.allclose(arm.sent[-1], arm.rest, atol=1e-3)
    return arm, where


@pytest.mark.parametrize("shape", ["demos", "demos.hdf5"])
def test_a_later_session_with_the_same_data_works_where_the_first_did(
    recorded, shape, tmp_path, capsys
):
    arm, where = recorded
    first = session(Lasting(False), "train", "--data", str(tmp_path / "none"))
    with first:
        pass
    where = ["--data", str(tmp_path / shape)]
    with (
        pytest.raises(UserError, match="outside its limits.*--recover"),
        session(arm, "train", *where),
    ):
        pass
    with session(arm, "train", "--recover", *where) as later:
        for one, other in zip(limits(first), limits(later), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)
        np.testing.assert_allclose(arm.sent[-1], later.home, atol=1e-6)  # there it has gone
    assert "start where those of earlier sessions did" in capsys.readouterr().out
    with session(Lasting(False), "train", "--box-center", "30", "0", "-3", *where) as another:
        np.testing.assert_allclose(another.guard.box.mean(0), [0.30, 0, -0.03])


def test_a_run_goes_on_where_it_began(recorded, tmp_path):
    arm, where = recorded
    (tmp_path / "demos" / "args.json").unlink(missing_ok=True)  # recorded by an older version
    arm.used = False
    robot.main(["train", *TOY, "--keypad", "terminal", "--episodes", "1", *where])
    stored, run = read_args(tmp_path / "run"), str(tmp_path / "run")
    assert len(stored["home"]) == 6 and len(stored["box_center"]) == 3
    assert (
        json.loads((tmp_path / "demos" / "args.json").read_text())["args"]["home"] == stored["home"]
    )
    robot.main(["train", "--resume", run, "--keypad", "terminal", "--episodes", "2", "--recover"])
    again = read_args(tmp_path / "run")
    assert again["home"] == stored["home"] and again["box_center"] == stored["box_center"]
    robot.main(["eval", "--run-dir", run, "--keypad", "terminal", "--episodes", "1", "--recover"])
    assert parse_args(["train", "--resume", run, "--box-center", "30", "0", "0"]).home is None


def test_at_its_rest_pose_an_arm_does_not_guess_where_it_works(tmp_path):
    data = ["--data", str(tmp_path / "none")]
    for flags in ([], ["--recover"], ["--box-center", "30", "0", "-5", "--recover"]):
        arm = Lasting(False).fold()
        with (
            pytest.raises(UserError, match="at its rest pose.*by hand.*--box-center"),
            session(arm, "train", *data, *flags),
        ):
            pass
        assert not arm.sent and not arm.is_connected
    home = np.degrees(arm.inner.home)
    flags = ["--box-center", "30", "0", "-5", "--recover", "--home", *map(str, home)]
    with session(arm, "train", *data, *flags) as told:
        np.testing.assert_allclose(arm.sent[-1], np.radians(home), atol=1e-6)
        assert told.guard.axis[2] < -0.99
    with (
        pytest.raises(UserError, match="start of earlier sessions.*outside the limits .box"),
        session(
            arm.fold(), "train", *data, "--box-center", "30", "40", "0", "--home", *map(str, home)
        ),
    ):
        pass
    with pytest.raises(UserError, match="--home is 6 joints"):
        open_driver(parse_args(["train", *TOY, "--home", "1", "2"]))
