"""LeRobot's own robots and tele-operators by their type, with options as on LeRobot's command line.

    from arms.lerobot import make_by_type
    options = {"port": "/dev/ttyACM0", "id": "my_arm", "cameras.front.type": "opencv"}
    robot = make_by_type("arm", "so101_follower", options)
    leader = make_by_type("teleop", "so101_leader", {"port": "/dev/ttyACM1"})

Needs `pip install lerobot` (Python 3.12 or newer). Plugins named lerobot_robot_* are found, too.
Not here: what an arm's numbers mean (profile.py).
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

from logbook import UserError

PACKAGES = {"arm": "lerobot.robots", "teleop": "lerobot.teleoperators"}
CONFIGS = {"arm": "RobotConfig", "teleop": "TeleoperatorConfig"}
MAKERS = {"arm": "make_robot_from_config", "teleop": "make_teleoperator_from_config"}


def make_by_type(kind: str, name: str, options: dict):
    """Return LeRobot's "arm" or "teleop" of the type `name`. UserError says what is wrong."""
    package = _import_all(kind, name)
    known = vars(package)[CONFIGS[kind]].get_known_choices()
    if name not in known:
        raise UserError(
            f"unknown {kind} '{name}': choose sim, piper, package.module:Class or one of "
            f"LeRobot's: {', '.join(sorted(known))}"
        )
    try:
        return vars(package)[MAKERS[kind]](decode(known[name], options))
    except ImportError as error:
        raise UserError(f"{kind} '{name}' lacks a package: {error}") from error
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"{kind} '{name}' does not take these options: {error}") from error


def _import_all(kind: str, name: str):
    """Import LeRobot's package of robots or teleoperators with all parts that are installed."""
    try:
        package = importlib.import_module(PACKAGES[kind])
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"unknown {kind} '{name}': choose sim, piper or package.module:Class; LeRobot's own "
            f"types need lerobot, which cannot be imported here ({error})"
        ) from error
    for part in pkgutil.iter_modules(package.__path__):
        # each part registers its types; one whose own SDK is not installed offers none
        with contextlib.suppress(Exception):
            importlib.import_module(f"{PACKAGES[kind]}.{part.name}")
    with contextlib.suppress(ImportError):
        from lerobot.utils.import_utils import register_third_party_plugins

        register_third_party_plugins()
    return package


def decode(config_class, options: dict):
    """Return a config of this class from {"a.b": "text"}; ValueError where it does not fit.

    Texts are read as YAML, as LeRobot's command line does: true, 30, [1, 2].
    """
    import draccus
    import yaml

    content: dict = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return draccus.decode(config_class, content)
    except Exception as error:  # draccus raises errors of its own and of any kind
        raise ValueError(" ".join(str(error).split())[:300]) from error
