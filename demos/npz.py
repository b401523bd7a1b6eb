"""Reads and writes npz files of transitions, in the layouts of OGBench and of D4RL.

    data = npz.load("demos.npz", task)                     # ready for the replay
    npz.save("demos.npz", columns)

A file holds one row per step: observations (N, D), actions (N, A) and terminals (N,), and one of

- rewards (N,), as in D4RL. terminals mark true ends. With next_observations (N, D) every row is a
  step; timeouts (N,) mark the other ends, and without them an episode also ends where the next row
  does not go on. Without next_observations the state after a row is the next row's; a row whose
  next state is unknown (the last before a timeout, or of the file) is dropped.
- qpos (N, joints), and button_states (N, buttons) where the task has buttons, as in OGBench's own
  files, for OGBench's tasks. terminals then mark the last state of a trajectory, which has no next
  one. A step is labelled by the state it leads to and terminates when that state solves the task.
  Play goes on there but the environment would not: steps that begin in a solved state are left out.
  (OGBench's own single-task labels belong to the state a step begins in, and keep those steps.)

Actions are the environment's own: they are scaled to [-1, 1] here. Every member is checked before
it is read, and nothing is ever unpickled.
Not here: how play is made (ogbench.py), HDF5 (hdf5.py).

Shapes: N rows, D observation, A action.
"""

import zipfile
from pathlib import Path

import numpy as np

from demos.columns import (
    Allowance,
    DataError,
    check_layout,
    existing,
    finite,
    first_episodes,
    joined,
    label,
    reading,
    same_length,
    within_limits,
)
from envs import Task, get_task
from logbook import replacing
from simulators.ogbench_env import met

HEADER_LIMIT = 10_000  # characters of an array's description


def save(path: str | Path, columns: dict[str, np.ndarray]) -> Path:
    """Write atomically: a reader finds the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as handle:
        np.savez_compressed(handle, **columns)  # 30 to 45 % smaller for 1 % of the time to make it
    return path


def load(
    path: str | Path,
    task: str | Task,
    episodes: int | None = None,
    clip_actions: bool = False,
) -> dict[str, np.ndarray]:
    """Read the steps of a file, or of its first `episodes` trajectories, in order.

    Returns obs (N, D), action (N, A), reward (N,), next_obs (N, D), terminated and truncated (N,).
    Raises DataError (a ValueError) that names the file and the member, or FileNotFoundError.
    """
    task = get_task(task)
    path = existing(path, task)
    columns = read(path, task)
    columns["actions"] = within_limits(
        f"{path}: key 'actions'", task.unit_actions(columns["actions"]), clip_actions
    )
    if "qpos" in columns:
        return label_by_goal(path, columns, task, episodes)
    return label_by_reward(path, columns, task, episodes)


# ---- what the file holds


def read(path: Path, task: Task) -> dict[str, np.ndarray]:
    """Read the checked columns that the task needs."""
    with reading(path, "readable as npz"), zipfile.ZipFile(path) as archive:
        present = {name.removesuffix(".npy") for name in archive.namelist()}
        widths = {"terminals": None, "observations": task.obs_dim, "actions": task.action_dim}
        by_goal = task.goal is not None and ("qpos" in present or "rewards" not in present)
        if by_goal:
            widths |= goal_widths(task)
        else:
            widths["rewards"] = None
            optional = {"timeouts": None, "next_observations": task.obs_dim}
            widths |= {name: width for name, width in optional.items() if name in present}
        missing = [name for name in widths if name not in present]
        if missing:
            layout = "an OGBench file with states" if by_goal else "a D4RL file of transitions"
            raise DataError(f"{path}: key '{missing[0]}' is missing; this is not {layout}")
        allowance = Allowance(path)
        for name, width in widths.items():
            check_member(archive, path, name, width, allowance)
        columns = {name: member(archive, path, name) for name in widths}
    same_length(str(path), columns, least=2)
    return columns


def read_column(path: Path, name: str, width: int | None) -> np.ndarray:
    """Read one column that only some files have. Raises DataError if it is not as it should be."""
    with reading(path, "readable as npz"), zipfile.ZipFile(path) as archive:
        check_member(archive, path, name, width, Allowance(path))
        return member(archive, path, name)


def goal_widths(task: Task) -> dict[str, int]:
    """Return the widths of the columns that tell which conditions of the goal are met."""
    goal = task.goal
    joints = 14 + 7 * len(goal.cubes) + len(goal.buttons) + len(goal.slides)
    buttons = {"button_states": len(goal.buttons)} if goal.buttons else {}
    return {"qpos": joints} | buttons


def check_member(
    archive: zipfile.ZipFile, path: Path, name: str, width: int | None, allowance: Allowance
) -> None:
    """Check the description of an array, which stands before its numbers."""
    where = f"{path}: key '{name}'"
    shape, dtype, header = described(archive, name)
    check_layout(where, shape, dtype, width)
    allowance.take(where, shape, dtype.itemsize)
    size = header + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if archive.getinfo(f"{name}.npy").file_size != size:
        raise DataError(f"{where} claims {shape} but does not hold as much: the file is damaged")


def described(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return an array's shape and type, and the length of this description in bytes."""
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"key '{name}' is of an unknown npy version {version}")
        shape, _, dtype = readers[version](stream, max_header_size=HEADER_LIMIT)
        return shape, dtype, stream.tell()


def member(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # the end, where the checksum is compared
    return finite(f"{path}: key '{name}'", array)


# ---- what its steps become


def label_by_goal(path: Path, columns: dict, task: Task, episodes: int | None) -> dict:
    """Label OGBench's states by the conditions of the goal that they meet."""
    last = columns["terminals"] > 0
    last[-1] = True  # the recording simply stops here
    ends = np.flatnonzero(last) + 1
    count = first_episodes(path, len(ends), episodes, "trajectories")
    columns = {name: column[: ends[count - 1]] for name, column in columns.items()}
    last = last[: ends[count - 1]]
    conditions = met(task.goal, columns["qpos"], columns.get("button_states"))  # (N, C)
    solved = conditions.all(-1)
    start = np.flatnonzero(~last[:-1] & ~solved[:-1])
    if not len(start):
        raise DataError(
            f"{path}: holds no step to learn from: every state is a trajectory's last, "
            "or solved already"
        )
    after = start + 1
    return {
        "obs": columns["observations"][start],
        "action": columns["actions"][start],
        "reward": task.reward(conditions[after]).astype(np.float32),
        "next_obs": columns["observations"][after],
        "terminated": solved[after],
        "truncated": last[after] & ~solved[after],
    }


def label_by_reward(path: Path, columns: dict, task: Task, episodes: int | None) -> dict:
    """Label D4RL's rows: the rewards and true ends stand in the file."""
    terminal = columns["terminals"] > 0
    ends = episode_ends(path, columns)
    obs = columns["observations"]
    if "next_observations" in columns:
        next_obs = columns["next_observations"]
        known = np.ones(len(obs), bool)
    else:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        next_obs[terminal] = obs[terminal]  # a terminal step looks no further
        known = terminal | ~ends
    stops = np.flatnonzero(ends) + 1
    count = first_episodes(path, len(stops), episodes, "episodes")
    steps = {
        "obs": obs,
        "action": columns["actions"],
        "reward": columns["rewards"],
        "next_obs": next_obs,
        "terminated": terminal,
    }
    labelled = []
    for first, stop in zip([0, *stops[:-1]], stops[:count]):
        rows = first + np.flatnonzero(known[first:stop])
        if len(rows):
            labelled.append(label({name: column[rows] for name, column in steps.items()}, task))
    return joined(path, labelled)


def episode_ends(path: Path, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Tell which rows (N,) end an episode."""
    ends = columns["terminals"] > 0
    if "timeouts" in columns:
        ends = ends | (columns["timeouts"] > 0)
    elif "next_observations" in columns:
        obs = columns["observations"]
        goes_on = np.isclose(columns["next_observations"][:-1], obs[1:], atol=1e-5).all(1)
        if goes_on.mean() < 0.5:
            raise DataError(
                f"{path}: 'next_observations' seldom equal the next row's 'observations', so the "
                "ends of the episodes cannot be told: add 'timeouts' (N,)"
            )
        ends = ends | np.append(~goes_on, True)
    ends[-1] = True
    return ends
