"""The AgileX Piper as one mesh-free MuJoCo model made from the maker's DH numbers, and its profile.

    from arms.piper_model import mjcf, piper_profile
    kinematics = piper_profile().kinematics()

The simulated arm (sim.py) and the real one (piper.py) share it. FK equals the maker's SDK to 1e-6
mm. The tool centre point (TCP) is midway between the fingertips, `tool` metres beyond the flange
along the flange's z axis; the fingers slide along its y axis. Base frame: x forward, y left, z
up, origin on the mounting plane.
Not here: tasks (sim.py), limits of the workspace and of speeds (guard.py), meshes.
"""

from __future__ import annotations

import numpy as np

from arms.profile import Profile

LENGTH = (0.0, 0.0, 0.28503, -0.02198, 0.0, 0.0)  # modified DH: a, metres
TWIST = (0.0, -90.0, 0.0, 90.0, -90.0, 90.0)  # alpha, degrees
OFFSET = (0.123, 0.0, 0.0, 0.25075, 0.0, 0.091)  # d, metres; the last one ends at the flange
TURN = {  # theta at zero, degrees, by the maker's `dh_is_offset`
    1: (0.0, -172.22, -102.78, 0.0, 0.0, 0.0),  # newer arms
    0: (0.0, -174.22, -100.78, 0.0, 0.0, 0.0),  # older ones, about 10 mm away at the flange
}
RANGE = ((-150, 150), (0, 180), (-170, 0), (-100, 100), (-70, 70), (-120, 120))  # degrees
TOOL = 0.1358  # metres from the flange to the TCP of AgileX's parallel gripper
OPENING = 0.07  # metres between the fingers when open
JOINTS = tuple(f"joint_{i}" for i in range(1, 7))
KEYS = (*(f"{name}.pos" for name in JOINTS), "gripper.pos")
STIFFNESS = (800, 800, 800, 150, 150, 100)  # of the simulated servos, N m / rad
TORQUE = (60, 60, 60, 20, 20, 20)  # what they can give, N m
ARMATURE = (0.5, 0.5, 0.5, 0.08, 0.08, 0.05)  # rotor inertia as the joint feels it, kg m^2

LINK = (
    '<body name="link_{number}" pos="{place}" quat="{quaternion}" gravcomp="1">'
    '<joint name="joint_{number}" axis="0 0 1" range="{low} {high}" armature="{armature}" '
    'damping="1"/>'
    '<geom type="capsule" size="0.03" fromto="0 0 0 {end}" contype="0" conaffinity="0" '
    'rgba=".9 .9 .9 1"/>'
)
FINGER = (
    '<body name="finger_{side}" gravcomp="1">'
    '<joint name="finger_{side}" type="slide" axis="0 {sign} 0" range="0 {half}" armature="0.2" '
    'damping="20"/>'
    '<geom class="hand" name="finger_{side}" type="box" pos="0 {y} -0.025" size="0.009 0.006 0.03" '
    'friction="2 0.05 0.001" rgba=".2 .2 .2 1"/></body>'
)
SERVO = (
    '<position name="{name}" joint="{joint}" kp="{stiffness}" dampratio="1" '
    'forcerange="-{torque} {torque}"/>'
)
BASE = (
    '<geom type="cylinder" size="0.05 0.04" pos="0 0 0.04" contype="0" conaffinity="0" '
    'rgba=".3 .3 .3 1"/>'
)
TIP = (
    '<body name="hand" pos="0 0 {tool}" gravcomp="1"><site name="tcp" size="0.002"/>'
    "{hand}{fingers}</body>"
)
MODEL = """<mujoco model="piper">
<compiler angle="degree" autolimits="true"/>{options}
<default><default class="hand"><geom contype="2" conaffinity="1" density="300"/></default></default>
<worldbody>
{base}
{links}
<geom class="hand" name="palm" type="box" pos="0 0 {palm}" size="0.02 0.045 {palm}"/>
{tip}
{closing}
{world}</worldbody>
<equality><joint joint1="finger_right" joint2="finger_left"/></equality>
<actuator>{servos}</actuator></mujoco>"""


def limits() -> np.ndarray:
    """Return the joint limits (6, 2) in radians."""
    return np.radians(np.array(RANGE, dtype=np.float64))


def piper_profile(dh_is_offset: int = 1, tool: float = TOOL, rest=None) -> Profile:
    """Return the Piper's profile.

    dh_is_offset: 1 for newer arms, 0 for older ones, as the maker's SDK asks. tool: metres from the
    flange to the TCP. rest: joints (6,) in degrees where it may lose its power.
    """
    return Profile(
        name="piper",
        joints=KEYS[:6],
        limits=RANGE,
        unit="radians",
        gripper_range=(0.0, OPENING),
        opening=OPENING,
        model=mjcf(dh_is_offset=dh_is_offset, tool=tool),
        rest=rest,
    )


def mjcf(
    hand: str = "", world: str = "", options: str = "", dh_is_offset: int = 1, tool: float = TOOL
) -> str:
    """Return the arm as MJCF text.

    `hand` goes into the body at the TCP, `world` beside the arm and after it, so that the arm's
    joints stay the first ones, `options` in front. Bodies link_1..link_6, hand, finger_left,
    finger_right; joints joint_1..joint_6, then two slides that move together; seven position
    servos, the last in metres of one finger. Gravity is compensated on every body of the arm.
    """
    if dh_is_offset not in TURN:
        raise ValueError(f"dh_is_offset is 0 (older arms) or 1, got {dh_is_offset!r}")
    sides = (("left", 1), ("right", -1))
    fingers = [
        FINGER.format(side=side, sign=sign, half=OPENING / 2, y=sign * 0.006)
        for side, sign in sides
    ]
    servos = [
        SERVO.format(name=name, joint=name, stiffness=stiffness, torque=torque)
        for name, stiffness, torque in zip(JOINTS, STIFFNESS, TORQUE, strict=True)
    ]
    servos.append(SERVO.format(name="gripper", joint="finger_left", stiffness=1500, torque=40))
    return MODEL.format(
        options=options,
        base=BASE,
        links="".join(_link(i, TURN[dh_is_offset][i]) for i in range(6)),
        palm=max(tool - 0.055, 0.01) / 2,
        tip=TIP.format(tool=tool, hand=hand, fingers="".join(fingers)),
        closing="</body>" * 6,
        world=world,
        servos="".join(servos),
    )


def _link(i: int, turn: float) -> str:
    """Open the body of link i; its frame is the DH transform at joint angle zero."""
    twist = np.radians(TWIST[i])
    place = f"{LENGTH[i]} {-np.sin(twist) * OFFSET[i]!r} {np.cos(twist) * OFFSET[i]!r}"
    x = twist / 2
    y = np.radians(turn) / 2
    quaternion = (
        np.cos(x) * np.cos(y),
        np.sin(x) * np.cos(y),
        -np.sin(x) * np.sin(y),
        np.cos(x) * np.sin(y),
    )
    low, high = RANGE[i]
    return LINK.format(
        number=i + 1,
        place=place,
        quaternion=" ".join(map(repr, map(float, quaternion))),
        low=low,
        high=high,
        armature=ARMATURE[i],
        end=_capsule_end(i),
    )


def _capsule_end(i: int) -> str:
    """Return where the capsule that shows link i ends in the link's frame."""
    if i == 2:
        return f"{LENGTH[3]} {-OFFSET[3]!r} 0"
    if i == 4:
        return f"{LENGTH[5]} 0 {-OFFSET[5]!r}"
    along = LENGTH[i + 1] if i < 5 else 0.0
    return f"{along} 0 0.001"
