"""
Drivers behind robot.py's protocol: the simulated arm, AgileX Piper, anyone's own.

    import arms
    arm = arms.make("sim", task="peg", seed=0)            # arms/sim.py, needs mujoco
    arm = arms.make("piper", channel="can0")              # arms/piper.py, needs piper_sdk
    arm = arms.make("package.module:Class", port="/dev/ttyUSB0")

Every arm has the ten members of a LeRobot robot: observation_features, action_features, is_connected, is_calibrated,
connect, calibrate, configure, get_observation, send_action, disconnect. No base class, nothing to inherit.
Not here: the safety guard and the control loop (robot.py); a driver trusts nobody with its joint limits, but knows no
workspace.
"""
from __future__ import annotations

import importlib
import os

from logbook import UserError

MUJOCO_GL = os.environ.get("MUJOCO_GL")  # what the user asked for, before a simulator sets it
BUILT_IN = {"sim": "arms.sim:SimArm", "piper": "arms.piper:PiperArm"}
PROTOCOL = ("observation_features", "action_features", "is_connected", "is_calibrated", "connect", "calibrate",
            "configure", "get_observation", "send_action", "disconnect")


def make(name: str, **options):
    """
    An arm by name, "sim", "piper" or "package.module:Class"; options go to its constructor. Nothing moves or connects.
    Raises UserError for a name, a module, a class or an option that does not exist, and for a class that is no arm.
    """
    if name not in BUILT_IN and ":" not in name:
        raise UserError(f"unknown arm '{name}': choose {', '.join(BUILT_IN)} or package.module:Class")
    module_name, class_name = BUILT_IN.get(name, name).split(":", 1)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UserError(f"arm '{name}': cannot import {module_name or 'nothing'} ({error}); is it installed, or "
                        "PYTHONPATH set?") from error
    maker = getattr(module, class_name, None)
    if not callable(maker):
        raise UserError(f"arm '{name}': {module_name} has no class {class_name!r}")
    missing = [member for member in PROTOCOL if isinstance(maker, type) and not hasattr(maker, member)]
    try:
        arm = maker(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"arm '{name}' does not take these options: {error}") from error
    missing = [member for member in missing if not hasattr(arm, member)]  # LeRobot allows plain attributes
    if missing:
        raise UserError(f"arm '{name}' lacks {', '.join(missing)}; see PROTOCOL in arms/__init__.py")
    return arm
