"""Where demonstrations come from: your files, downloads, scripted experts and OGBench's oracles.

    python -m demos --task lift --episodes 20 --seed 0 --out lift.hdf5        # make: 20 s, one core
    python -m demos --check --task lift --data lift.hdf5          # does the simulator agree?
    data = demos.load("lift.hdf5", "lift")                        # ready for the replay
    path = demos.obtain("can", "paper")                           # found, downloaded or made

Not here: the formats (hdf5.py, npz.py, minari_data.py), the makers (scripted.py, ogbench.py).
"""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import envs
from demos import download, hdf5, minari_data, npz, ogbench, scripted
from demos.columns import DataError, existing
from demos.hdf5 import save
from demos.ranges import refuse_implausible

__all__ = [
    "DataError",
    "collect",
    "env_args",
    "fingerprint",
    "load",
    "made",
    "obtain",
    "refuse_implausible",
    "save",
]

FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


# ---- which file


def made(task: str | envs.Task, episodes: int, seed: int, directed: bool = False) -> Path:
    """Return where demonstrations that are made here are kept and found again."""
    task = envs.get_task(task)
    kind = "scripted"
    suffix = "hdf5"
    if task.suite == "ogbench":
        kind = "directed" if directed else "play"
        suffix = "npz"
    return Path("data") / f"{task.name}-{kind}-{episodes}-s{seed}.{suffix}"


def obtain(
    task: str | envs.Task,
    preset: str,
    data: str | Path | None = None,
    episodes: int = 20,
    seed: int = 0,
    workers: int = 1,
) -> Path:
    """Return the file to train on; the choice is printed.

    `data` names it. Otherwise the cpu preset makes its own, the same everywhere. The paper preset
    looks for the public file, then downloads it, then makes `episodes` of its own.
    """
    task = envs.get_task(task)
    if task.suite == "gymnasium":
        if data is None:
            raise DataError(
                f"nothing here makes demonstrations of {task.name}: give yours with --data FILE "
                "(npz, robomimic HDF5 or minari:ID), or begin without: --demo-episodes 0"
            )
        return Path(data).expanduser()
    directed = preset == "cpu" and task.cpu.get("directed", False)
    own = made(task, episodes, seed, directed)
    if data is not None and (Path(data) != own or own.is_file()):
        return Path(data).expanduser()  # a file made here is made again if it went missing
    if preset == "paper" and data is None:
        public = public_file(task, episodes)
        if public is not None:
            return public
    if own.is_file():
        return announced(own, "made earlier")
    collect(task, episodes, seed, own, workers, directed=directed)
    return announced(own, "made just now")


def public_file(task: envs.Task, episodes: int) -> Path | None:
    """Find or download the task's public file; None, after saying why, if it cannot be had."""
    places = download.places(task)
    for path in places:
        if path.is_file():
            return announced(path, "found")
    print(f"data: no {places[0]}, downloading it", flush=True)
    try:
        return announced(download.fetch(task), "downloaded")
    except (download.DownloadError, OSError) as error:
        print(f"data: {error}. Making {episodes} episodes instead", flush=True)
        return None


def announced(path: Path, how: str) -> Path:
    print(f"data: {path}, {how}; --data FILE takes another", flush=True)
    return path


# ---- what is in it


def load(
    path: str | Path,
    task: str | envs.Task | None = None,
    episodes: int | None = None,
    obs_keys: Sequence[str] | None = None,
    filter_key: str | None = None,
    clip_actions: bool = False,
) -> dict[str, np.ndarray]:
    """Read all steps of a file, or of its first `episodes` demonstrations, in order.

    The format is told by the file's content: robomimic's HDF5, or npz in the layout of OGBench or
    D4RL; minari:ID names a data set in Minari's cache. `task` may be left out where the file names
    it (HDF5). obs_keys and filter_key choose observations and demonstrations of an HDF5 file.
    clip_actions accepts actions beyond [-1, 1].
    Returns obs (N, D), action (N, A), reward (N,), next_obs (N, D), terminated and truncated (N,).
    Raises DataError (a ValueError) or FileNotFoundError in one sentence with the file's name.
    """
    if minari_data.is_minari(path):
        if task is None:
            raise DataError(f"{path}: a Minari data set does not name its task; give it")
        task = envs.get_task(task)
        data = minari_data.load(str(path), task, episodes, clip_actions)
        warn_of_no_success(path, task, data)
        return data
    path = existing(path, task)
    if is_npz(path, task):
        if obs_keys or filter_key:
            raise DataError(f"{path}: observation keys and filters are for HDF5 files")
        if task is None:
            raise DataError(f"{path}: an npz file does not name its task; give it")
        data = npz.load(path, task, episodes, clip_actions)
    else:
        data = hdf5.load(path, task, episodes, obs_keys, filter_key, clip_actions)
        say_filters(path, filter_key)
    warn_of_no_success(path, task, data)
    return data


def env_args(path: str | Path, task: str | envs.Task | None = None) -> dict | None:
    """Return the simulator's arguments in a file, for envs.make_env(..., env_args=...).

    None where such files have none.
    """
    if task is not None and envs.get_task(task).suite != "robosuite":
        return None
    if minari_data.is_minari(path):
        return None
    if is_npz(existing(path, task), task):
        return None
    return hdf5.env_args(path)


def is_npz(path: Path, task: str | envs.Task | None = None) -> bool:
    """Tell npz from HDF5 by the file's first bytes, or else by what the task's files are."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        return True
    if start == b"\x89HDF\r\n\x1a\n":
        return False
    return path.suffix == ".npz" or (task is not None and envs.get_task(task).suite == "ogbench")


def say_filters(path: Path, used: str | None) -> None:
    """Print which filter of an HDF5 file is used, or which could be."""
    with hdf5.opened(path) as file:
        every = len(hdf5.names(file))
        counts = {name: len(members) for name, members in hdf5.filters(file).items()}
    if used is not None:
        print(
            f"data: {path}, filter '{used}': {counts[used]} of {every} demonstrations", flush=True
        )
        return
    offered = [f"{name} ({count})" for name, count in counts.items() if count < every]
    if offered:
        print(
            f"data: {path}, all {every} demonstrations; --filter-key takes those of "
            f"{', '.join(offered)}",
            flush=True,
        )


def warn_of_no_success(
    path: str | Path, task: str | envs.Task | None, data: dict[str, np.ndarray]
) -> None:
    """Print a warning if no step of the data stands out: then nothing says what is wanted."""
    rewards = data["reward"]
    if data["terminated"].any() or rewards.min() != rewards.max():
        return
    hint = ""
    if task is not None:
        name = shlex.quote(envs.get_task(task).name)
        file = shlex.quote(str(path))
        hint = f". Look at it: python -m demos --check --task {name} --data {file}"
    print(
        f"data: WARNING, no demonstration in {path} succeeds: every reward is {rewards[0]:g}{hint}",
        flush=True,
    )


def fingerprint(data: dict[str, np.ndarray]) -> dict[str, int | str]:
    """Identify loaded data, so that a run can tell whether it goes on with the same.

    Returns steps, episodes, and a checksum of all values.
    """
    digest = hashlib.sha256()
    for name in FIELDS:
        column = np.ascontiguousarray(data[name])
        digest.update(f"{name} {column.dtype} {column.shape}".encode())
        digest.update(column.tobytes())
    ends = np.asarray(data["terminated"], bool) | np.asarray(data["truncated"], bool)
    return {
        "steps": len(data["reward"]),
        "episodes": int(ends.sum()),
        "checksum": digest.hexdigest()[:16],
    }


# ---- making one


def collect(
    task: str | envs.Task,
    episodes: int,
    seed: int,
    path: str | Path,
    workers: int = 1,
    progress: bool = True,
    directed: bool = False,
) -> Path:
    """Write `episodes` demonstrations and return the path.

    The file depends on (task, episodes, seed, directed) alone. directed: see ogbench.py.
    """
    task = envs.get_task(task)
    if episodes < 1:
        raise ValueError(f"need at least one demonstration, got {episodes}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)  # refuse a wrong place before the work
    if task.suite == "ogbench":
        return ogbench.collect(task, episodes, seed, path, workers, progress, directed)
    return scripted.collect(task, episodes, seed, path, workers, progress)
