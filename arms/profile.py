"""What differs from arm to arm: key names, joint count, units, limits, model, rest pose.

    from arms.profile import load_profile
    profile = load_profile("so101")                 # or the path of a file of your own
    joints, gripper = profile.from_driver(robot.get_observation())     # radians, metres
    robot.send_action(profile.to_driver(joints, gripper))

Nothing is guessed: an arm without a profile is refused, because radians sent to an arm that
expects degrees hardly move it, and degrees read as radians can pass for a pose. How to write a
profile: arms/README.md, "Your own arm".
Not here: the model's kinematics (kinematics.py), checks against a robot (driver.py).
Shapes: J joints, from the base to the tool.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from arms.kinematics import Kinematics
from logbook import UserError

FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """One kind of arm. Angles are in degrees here, as in data sheets; the program uses radians."""

    name: str
    joints: tuple[str, ...]  # the driver's keys of the J joints, from the base to the tool
    limits: tuple[tuple[float, float], ...]  # (J, 2) degrees
    unit: Literal[
        "radians", "degrees", "percent"
    ]  # of the driver; percent: -100 to 100 over limits
    gripper_range: tuple[float, float]  # the driver's values of the closed and of the open gripper
    opening: float  # metres between the open fingers
    model: str  # MJCF or URDF text
    gripper: str = "gripper.pos"  # the driver's key of the gripper
    model_joints: tuple[str, ...] = ()  # names in the model; default: the keys without .pos
    tool: str = "tcp"  # site of the model at the tool centre point, its z axis pointing out
    tool_body: str = ""  # where the model has no site (URDF): the body that the tool belongs to,
    tool_place: tuple[float, ...] = (0.0, 0.0, 0.0)  # where it is there (metres)
    tool_turn: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)  # and how it is turned (quaternion wxyz)
    turn_weight: float = 1.0  # of the IK; small for five joints, see Kinematics
    rest: tuple[float, ...] | None = None  # (J,) degrees, where the arm may lose its power

    @property
    def keys(self) -> tuple[str, ...]:
        """The driver's keys: J joints, then the gripper."""
        return (*self.joints, self.gripper)

    @property
    def rest_joints(self) -> np.ndarray | None:
        """The rest pose (J,) in radians, or None."""
        return None if self.rest is None else np.radians(self.rest)

    def kinematics(self) -> Kinematics:
        """Return new kinematics of this arm. UserError for a model that MuJoCo cannot read."""
        names = self.model_joints or tuple(key.removesuffix(".pos") for key in self.joints)
        limits = np.radians(np.array(self.limits, dtype=np.float64))
        try:
            model = self._model_with_tool()
            return Kinematics(model, names, limits, self.tool, self.turn_weight)
        except (KeyError, ValueError) as error:
            raise UserError(f"the model of the arm profile '{self.name}': {error}") from error

    def _model_with_tool(self) -> str:
        if not self.tool_body:
            return self.model
        from arms.rotation import load_mujoco

        spec = load_mujoco().MjSpec.from_string(self.model)
        body = spec.body(self.tool_body)
        if body is None:
            raise ValueError(f"it has no body {self.tool_body}")
        body.add_site(name=self.tool, pos=self.tool_place, quat=self.tool_turn)
        spec.compile()
        return spec.to_xml()

    def from_driver(self, values: dict) -> tuple[np.ndarray, float]:
        """Return joints (J,) in radians and the opening in metres from the driver's values.

        KeyError, TypeError or ValueError where one is missing or no number.
        """
        joints = np.array([values[key] for key in self.joints], float)
        gripper = float(values[self.gripper])
        return self._to_radians(joints), self._to_metres(gripper)

    def to_driver(self, joints, gripper: float) -> dict[str, float]:
        """Return the driver's command for joints (J,) in radians and an opening in metres."""
        values = [*self._from_radians(np.asarray(joints, float)), self._from_metres(float(gripper))]
        return dict(zip(self.keys, map(float, values), strict=True))

    def implausible(self, joints, gripper: float) -> str | None:
        """Say which of these measured joints (J,) in radians cannot be, or return None.

        Tells a wrong unit or a wrong zero: 15 degrees beyond a limit is further than sag or a stop,
        half an opening more than the open gripper is another gripper.
        """
        degrees = np.degrees(joints)
        for key, angle, (low, high) in zip(self.joints, degrees, self.limits, strict=True):
            if not low - 15 <= angle <= high + 15:
                return (
                    f"{key} would be at {angle:.0f} degrees, but its range is {low:g} to {high:g}: "
                    f"check its zero, and whether this arm really speaks {self.unit}, as the "
                    f"profile '{self.name}' says"
                )
        if not -0.5 * self.opening <= gripper <= 1.5 * self.opening:
            return (
                f"{self.gripper} would be {100 * gripper:.1f} cm open, but the gripper opens "
                f"{100 * self.opening:g} cm: are the numbers of the profile '{self.name}' those of "
                "this gripper?"
            )
        return None

    def _to_radians(self, joints) -> np.ndarray:
        if self.unit == "radians":
            return joints
        if self.unit == "degrees":
            return np.radians(joints)
        low, high = np.radians(self.limits).T
        return low + (joints + 100) / 200 * (high - low)

    def _from_radians(self, joints) -> np.ndarray:
        if self.unit == "radians":
            return joints
        if self.unit == "degrees":
            return np.degrees(joints)
        low, high = np.radians(self.limits).T
        return (joints - low) / (high - low) * 200 - 100

    def _to_metres(self, gripper: float) -> float:
        closed, opened = self.gripper_range
        if (closed, opened) == (0.0, self.opening):  # it speaks of metres itself
            return gripper
        return (gripper - closed) / (opened - closed) * self.opening

    def _from_metres(self, opening: float) -> float:
        closed, opened = self.gripper_range
        if (closed, opened) == (0.0, self.opening):
            return opening
        return closed + opening / self.opening * (opened - closed)


def load_profile(name: str) -> Profile:
    """Return a profile by the name of one in arms/profiles/ or by the path of a TOML file.

    `model` in the file is the path of an MJCF or URDF file beside it. UserError for a file that is
    missing or that says something a profile does not have.
    """
    if name == "piper":
        from arms.piper_model import piper_profile

        return piper_profile()
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text())
        content["model"] = (path.parent / content["model"]).read_text()
        profile = Profile(**{key: _tuples(value) for key, value in content.items()})
        _check(profile)
    except (OSError, KeyError, TypeError, ValueError) as error:
        known = ", ".join(["piper", *sorted(one.stem for one in FOLDER.glob("*.toml"))])
        raise UserError(
            f"cannot read the arm profile {path} ({error}); there are {known}, "
            "and arms/README.md says how to write one"
        ) from error
    return profile


def _tuples(value):
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _check(profile: Profile) -> None:
    """Refuse a profile that contradicts itself. Raises UserError."""
    count = len(profile.joints)
    pairs = [pair for pair in profile.limits if len(pair) == 2 and float(pair[0]) < float(pair[1])]
    checks = {
        "joints": 5 <= count <= 7,
        "limits": len(pairs) == len(profile.limits) == count,
        "unit": profile.unit in ("radians", "degrees", "percent"),
        "gripper_range": len(set(profile.gripper_range)) == 2,
        "opening": profile.opening > 0,
        "model_joints": len(profile.model_joints) in (0, count),
        "rest": profile.rest is None or len(profile.rest) == count,
    }
    wrong = [name for name, good in checks.items() if not good]
    if wrong:
        names = ", ".join(field.name for field in fields(Profile))
        raise UserError(
            f"the arm profile '{profile.name}' is wrong in {', '.join(wrong)}: it needs 5 to 7 "
            f"joints and as many limits (low, high) in degrees; all its entries are {names}"
        )
