"""Arm profiles: kinematics by plain numpy, units, and the guard with five to seven joints.

python -m pytest tests/robot/test_profile.py
"""

import dataclasses

import numpy as np
import pytest

from arms.guard import TWIST, Guard, Limits
from arms.profile import FOLDER, load_profile
from arms.rotation import rotation_vector
from logbook import UserError

NAMES = ["piper", "so101", "franka"]
COUNTS = {"piper": 6, "so101": 5, "franka": 7}
STARTS = {  # degrees: in the middle of where such an arm works
    "piper": (0, 100, -60, 0, 45, 0),
    "so101": (0, 0, 0, 60, 0),
    "franka": (0, -30, 0, -130, 0, 100, 45),
}
FRANKA_DH = [  # a, alpha, d of Craig's convention, metres and degrees
    (0, 0, 0.333),
    (0, -90, 0),
    (0, 90, 0.316),
    (0.0825, 90, 0),
    (-0.0825, -90, 0.384),
    (0, 90, 0),
    (0.088, 90, 0),
]


def franka_tool(joints):
    """The hand's tip as a product of modified DH transforms, without MuJoCo."""
    pose = np.eye(4)
    for (length, twist, offset), joint in zip(FRANKA_DH, joints, strict=True):
        c, s = np.cos(joint), np.sin(joint)
        ca, sa = np.cos(np.radians(twist)), np.sin(np.radians(twist))
        pose = pose @ [
            [c, -s, 0, length],
            [s * ca, c * ca, -sa, -sa * offset],
            [s * sa, c * sa, ca, ca * offset],
            [0, 0, 0, 1],
        ]
    return pose[:3, 3] + (0.107 + 0.1034) * pose[:3, 2], pose[:3, 2]


def test_the_frankas_fk_is_the_product_of_its_dh_transforms():
    kinematics = load_profile("franka").kinematics()
    for joints in np.random.default_rng(0).uniform(*kinematics.limits.T, (50, 7)):
        place, turned = kinematics.fk(joints)
        tip, axis = franka_tool(joints)
        np.testing.assert_allclose(place, tip, atol=1e-7)
        np.testing.assert_allclose(turned[:, 2], axis, atol=1e-7)


def test_the_so101_reaches_where_its_links_end():
    """Pan turns about the vertical; stretched out, the tool is 0.39 m from the pan's axis."""
    kinematics = load_profile("so101").kinematics()
    place, turned = kinematics.fk(np.zeros(5))
    other, _ = kinematics.fk(np.radians([40, 0, 0, 0, 0]))
    axis = np.array([0.0388353, 0.0])
    radius = np.linalg.norm(place[:2] - axis)
    assert np.linalg.norm(other[:2] - axis) == pytest.approx(radius, abs=1e-6)
    assert other[2] == pytest.approx(place[2], abs=1e-6)
    assert radius == pytest.approx(0.352, abs=0.03) and 0.1 < place[2] < 0.3
    assert abs(turned[2, 2]) < 0.1 and turned[:2, 2] @ (place[:2] - axis) > 0.9 * radius


@pytest.mark.parametrize("name", NAMES)
def test_units_come_back_as_they_went(name):
    profile = load_profile(name)
    rng = np.random.default_rng(0)
    joints = rng.uniform(*np.radians(profile.limits).T)
    assert len(profile.joints) == COUNTS[name]
    for unit in ("radians", "degrees", "percent"):
        other = dataclasses.replace(profile, unit=unit, gripper_range=(-65.0, 0.0))
        command = other.to_driver(joints, 0.03)
        assert list(command) == list(profile.keys)
        back, gripper = other.from_driver(command)
        np.testing.assert_allclose(back, joints, atol=1e-12)
        assert gripper == pytest.approx(0.03)
        if unit == "percent":
            low = other.to_driver(np.radians(profile.limits)[:, 0], 0.0)
            assert all(low[key] == pytest.approx(-100) for key in profile.joints)
            assert low[profile.gripper] == -65.0


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_another_unit_are_implausible(name):
    profile = load_profile(name)
    start = np.radians(STARTS[name])
    assert profile.implausible(start, 0.02) is None
    assert "range is" in profile.implausible(np.degrees(start), 0.02)
    assert "cm open" in profile.implausible(start, 50.0)


def make_guard(name):
    profile = load_profile(name)
    kinematics = profile.kinematics()
    start = np.radians(STARTS[name])
    place, turned = kinematics.fk(start)
    box = np.array([place - 0.08, place + 0.08])
    guard = Guard(kinematics, box, turned[:, 2], Limits(), profile.opening)
    guard.start(start, 0.02)
    return guard


@pytest.mark.parametrize("name", NAMES)
def test_the_guard_keeps_its_limits_with_any_number_of_joints(name):
    guard = make_guard(name)
    kinematics = guard.kinematics
    rng = np.random.default_rng(1)
    for count in range(300):
        if count % 20 == 0:
            drift = rng.normal(size=7) * rng.choice([0.5, 3.0])
        before = guard.joints
        measured = before + rng.normal(size=len(before)) * 0.02
        target, gripper = guard.step(drift + 0.3 * rng.normal(size=7), measured)
        (place, turned), (there, facing) = kinematics.fk(before), kinematics.fk(target)
        seen, seen_turned = kinematics.fk(measured)
        assert np.linalg.norm(there - place) <= 0.015 + 1e-9
        assert np.linalg.norm(rotation_vector(facing @ turned.T)) <= np.radians(4) + 1e-6
        assert np.abs(target - before).max() <= np.radians(90) / 15 + 1e-9
        assert (target >= kinematics.limits[:, 0]).all() and (
            target <= kinematics.limits[:, 1]
        ).all()
        assert (there >= guard.box[0] - 1e-6).all() and (there <= guard.box[1] + 1e-6).all()
        assert np.linalg.norm(there - seen) <= 0.04 + 2e-4
        assert np.linalg.norm(rotation_vector(facing @ seen_turned.T)) <= TWIST + 2e-4
        applied = guard.sent(target, gripper)
        assert applied.shape == (7,) and np.abs(applied).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_an_action_moves_the_tool_where_it_says(name):
    """An arm of five joints keeps the place and turns as it can."""
    guard = make_guard(name)
    for direction in np.eye(3):
        place = guard.kinematics.fk(guard.joints)[0]
        for _ in range(2):
            guard.sent(*guard.step([*(0.5 * direction), 0, 0, 0, 0], guard.joints))
        moved = guard.kinematics.fk(guard.joints)[0] - place
        np.testing.assert_allclose(moved, 2 * 0.5 * 0.015 / 1.02 * direction, atol=1.5e-3)


@pytest.mark.parametrize(
    "change, told",
    [
        ('unit = "degrees"', 'unit = "gradians"'),
        ("opening = 0.12", "opening = 0"),
        ("gripper_range = [0, 100]", "gripper_range = [5, 5]"),
        ("[-110, 110], ", ""),
        ("[-110, 110]", "[110, -110]"),
        ('model = "so101.xml"', 'model = "nowhere.xml"'),
        ('"shoulder_pan.pos", ', '"waist.pos", '),
        ('name = "so101"', 'nome = "so101"'),
        ('name = "so101"', "name = "),
        ("[-110, 110]", '["a", "b"]'),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused_in_one_sentence(change, told, tmp_path):
    text = (FOLDER / "so101.toml").read_text()
    assert change in text
    (tmp_path / "mine.toml").write_text(text.replace(change, told, 1))
    (tmp_path / "so101.xml").write_text((FOLDER / "so101.xml").read_text())
    with pytest.raises(UserError, match="profile"):
        load_profile(str(tmp_path / "mine.toml")).kinematics()


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(UserError, match="there are piper, franka, so101.*README"):
        load_profile("so102")


URDF = """<robot name="two"><link name="base"/><link name="arm"><inertial><mass value="1"/>
<inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial></link>
<joint name="turn" type="revolute"><parent link="base"/><child link="arm"/><axis xyz="0 0 1"/>
<limit lower="-1" upper="1" effort="1" velocity="1"/></joint></robot>"""


def test_a_urdf_gets_its_tool_from_the_profile():
    """URDF knows no sites: the profile says where on which body the tool is."""
    profile = dataclasses.replace(
        load_profile("so101"),
        model=URDF,
        joints=("turn.pos",),
        limits=((-57.0, 57.0),),
        tool_body="arm",
        tool_place=(0.2, 0.0, 0.1),
    )
    place, turned = profile.kinematics().fk([np.pi / 6])
    np.testing.assert_allclose(place, [0.2 * np.cos(np.pi / 6), 0.1, 0.1], atol=1e-9)
    np.testing.assert_allclose(turned[:, 0], [np.cos(np.pi / 6), 0.5, 0], atol=1e-9)
    with pytest.raises(UserError, match="no body hand"):
        dataclasses.replace(profile, tool_body="hand").kinematics()
