"""Robots that robot.py can drive: the simulated arm, AgileX Piper, LeRobot's, anyone's own.

    import arms
    robot = arms.make("sim", task="peg", seed=0)            # arms/sim.py, needs mujoco
    robot = arms.make("piper", channel="can0")              # arms/piper.py, needs piper_sdk
    robot = arms.make("so101_follower", port="/dev/ttyACM0", id="my_arm")      # LeRobot's own class
    robot = arms.make("package.module:Class", port="/dev/ttyUSB0")

Every robot has the ten members of a LeRobot robot (PROTOCOL). No base class, nothing to inherit.
A class of one's own says with a `profile` attribute which arm it drives; for others --profile
does.
Not here: units and checks (driver.py, profile.py), the guard (guard.py), the loop (rig.py).
"""

from __future__ import annotations

import importlib
import os

from logbook import UserError

MUJOCO_GL = os.environ.get("MUJOCO_GL")  # what the user asked for, before a simulator sets it
BUILT_IN = {"sim": "arms.sim:SimArm", "piper": "arms.piper:PiperArm"}
PROTOCOL = (
    "observation_features",
    "action_features",
    "is_connected",
    "is_calibrated",
    "connect",
    "calibrate",
    "configure",
    "get_observation",
    "send_action",
    "disconnect",
)


def make(name: str, **options):
    """Return a robot by name; options go to its constructor. Nothing moves or connects.

    name: "sim", "piper", a type of LeRobot's or "package.module:Class". UserError for a name, a
    module, a class or an option that does not exist, and for a class that is no robot.
    """
    if name not in BUILT_IN and ":" not in name:
        from arms.lerobot import make_by_type

        return make_by_type("arm", name, options)
    maker = load_class(f"arm '{name}'", BUILT_IN.get(name, name))
    missing = [member for member in PROTOCOL if not hasattr(maker, member)]
    robot = construct(f"arm '{name}'", maker, options)
    missing = [member for member in missing if not hasattr(robot, member)]  # plain attributes do
    if missing:
        raise UserError(
            f"arm '{name}' lacks {', '.join(missing)}; see PROTOCOL in arms/__init__.py"
        )
    return robot


def load_class(what: str, address: str):
    """Import the class at "package.module:Class". UserError, beginning with `what`."""
    module_name, _, class_name = address.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{what}: cannot import {module_name or 'nothing'} ({error}); is it installed, or "
            "PYTHONPATH set?"
        ) from error
    maker = vars(module).get(class_name)
    if not callable(maker):
        raise UserError(f"{what}: {module_name} has no class {class_name!r}")
    return maker


def construct(what: str, maker, options: dict):
    """Make one of the class, with the options by name or, for LeRobot's, as one config."""
    try:
        if hasattr(maker, "config_class"):
            from arms.lerobot import decode

            return maker(decode(maker.config_class, options))
        return maker(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} does not take these options: {error}") from error
