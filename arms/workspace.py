"""Where an arm may work: its box, the axis of its cone, its start; found once by hand and kept.

    from arms.workspace import find_workspace, remember
    workspace = find_workspace(args, driver, view)    # a Workspace; args are settings.Args
    remember(args)                                    # for later sessions, beside the recordings

A real arm is put by hand where it should work, once. Its later sessions find it folded at rest,
which tells nothing, so the box's centre and the joints of the start stay in args.json beside the
recorded episodes (and in the run's own).
Not here: keeping to it (guard.py), moving there (rig.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from arms.driver import Driver
from arms.episodes import numbered, workspace_of
from arms.guard import Guard, Limits
from arms.senses import View
from logbook import UserError, read_args, replacing

AT_REST = 0.1  # rad from the rest pose within which an arm counts as folded
ROOM_ABOVE = 0.02  # metres: the start is this far below the top of a box that nobody has placed
MARGIN = 0.02  # metres around recorded episodes


@dataclass
class Workspace:
    """What the rig needs to know of the place. home and rest: joints (J,) in radians."""

    guard: Guard
    home: np.ndarray | None  # of earlier sessions; None: wherever this one starts
    rest: np.ndarray


def find_workspace(args, driver: Driver, view: View) -> Workspace:
    """Set up the guard and print its box. UserError where nobody has said where the arm works.

    For a real arm args.box_center and args.home are filled in from an earlier session with the same
    data, if there was one.
    """
    home = known_home(args, driver, view)
    kinematics = driver.kinematics
    start = view.joints if home is None else home
    place, turned = kinematics.fk(start)
    box = find_box(args, place)
    limits = Limits(
        cone=np.radians(args.cone),
        max_step=args.max_step / 100,
        max_turn=np.radians(args.max_turn),
        max_joint_speed=np.radians(args.max_joint_speed),
        leash=args.leash / 100,
    )
    guard = Guard(kinematics, box, turned[:, 2], limits, driver.profile.opening)
    tool = kinematics.fk(view.joints)[0]
    low, high, tool = np.round(100 * np.array([*box, tool]), 1)
    text = (
        f"box {low} to {high} cm, tool at {tool} cm, at most {args.max_step} cm and "
        f"{args.max_turn} degrees per period"
    )
    if home is not None:
        text += ", episodes start where those of earlier sessions did"
        refuse_outside(args, guard, home)
    print(text)
    rest = driver.rest
    return Workspace(guard, home, view.joints if rest is None else rest)


def find_box(args, place) -> np.ndarray:
    """Return the box (2, 3) in metres: the recordings', or one around a centre or the start."""
    if args.box_from_demos:
        files = [args.data] if Path(args.data).is_file() else numbered(args.data)
        return workspace_of(files) + [[-MARGIN], [MARGIN]]
    size = np.array(args.box_size) / 100
    if args.box_center:
        center = np.array(args.box_center) / 100
    else:
        center = place - [0, 0, size[2] / 2 - ROOM_ABOVE]
    return np.array([center - size / 2, center + size / 2])


def refuse_outside(args, guard: Guard, home) -> None:
    """UserError for a start of earlier sessions that this session's limits exclude."""
    broken = guard.outside(home)
    if broken:
        degrees = " ".join(f"{angle:.1f}" for angle in args.home)
        raise UserError(
            f"the start of earlier sessions, --home {degrees}, is outside the limits ({broken}): "
            "name the box it belongs to, or another --home"
        )


def known_home(args, driver: Driver, view: View) -> np.ndarray | None:
    """Return the joints (J,) where episodes start, as args or an earlier session say.

    None for a simulated arm and for one that has been put where it should start.
    """
    if driver.simulated:
        return None
    recall(args)
    if args.home is not None:
        low, high = driver.kinematics.limits.T
        return np.clip(np.radians(args.home), low, high)
    rest = driver.rest
    folded = rest is not None and np.abs(view.joints - rest).max() < AT_REST
    placed = args.box_center or args.box_from_demos
    if folded and (args.recover or not placed):
        count = len(driver.profile.joints)
        raise UserError(
            "the arm is at its rest pose, and no earlier session with this --data says where it "
            "works and which way its tool points there: move it by hand to where it works, or give "
            f"--box-center X Y Z in cm and --home, {count} joints in degrees"
        )
    return None


def keep_place(args, guard: Guard, home) -> None:
    """Write into args where this arm works, for later sessions."""
    if not args.box_center:
        args.box_center = tuple(float(100 * x) for x in guard.box.mean(0))
    args.home = tuple(float(angle) for angle in np.degrees(home))


def stored_beside(data: str) -> Path:
    """Return where a session's args.json stands beside its recorded episodes."""
    folder = Path(data)
    if folder.suffix == ".hdf5":
        folder = folder.with_suffix("")
    return folder / "args.json"


def recall(args) -> None:
    """Take box_center and home of an earlier session with this data, where args name no other."""
    path = stored_beside(args.data)
    if not path.exists():
        return
    stored = read_args(path.parent)
    center = stored.get("box_center")
    home = stored.get("home")
    if stored.get("robot") != args.robot or not center or not home:
        return
    if args.box_center is None or list(args.box_center) == center:
        args.box_center = tuple(center)
        args.home = args.home or tuple(home)


def remember(args) -> None:
    """Write args for later sessions, beside the recorded episodes.

    A recording's place counts; where there is none, the first training's.
    """
    path = stored_beside(args.data)
    first = not path.exists() and path.parent.is_dir()
    if args.home is None or not (args.role == "record" or first):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps({"args": asdict(args)}, indent=1).encode())
