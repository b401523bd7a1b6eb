"""Reads and writes robomimic's HDF5: what robomimic ships opens here, and the other way round.

    data = hdf5.load("can.hdf5", "can")                    # ready for the replay
    hdf5.save("can.hdf5", task, env_args, episodes)

    data/demo_i/{obs/<key>, next_obs/<key>, actions, rewards, dones, states}
    data.attrs: env_args (JSON), total          mask/<filter>: names of demonstrations

Files without next_obs (older robomimic, mimicgen) are read too: the next observation is that of the
next step, and a last step whose next observation would be used is dropped. Every object is checked
before it is read: its place in this file, type and shape.
Not here: npz (npz.py), where files come from (download.py, scripted.py).

Shapes: T steps of a demonstration, N steps of the file, D observation, A action.
"""

import contextlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from envs import TASKS, Task, get_task
from logbook import replacing

KIND = "a readable HDF5 file"
HEAP = b"GCOL\x01\0\0\0"
TABLE = ("robosuite", "ogbench", "arm")  # suites whose files must say which world they are of


# ---- writing


def save(path: str | Path, task: Task, env_args: dict, episodes: list[dict]) -> Path:
    """Write atomically: a reader finds the old file or the whole new one.

    Each episode holds obs (T + 1, D), action (T, A), success (T,), and where known states (T, S)
    and seed. Optional: next_obs (T, D) instead of the shifted obs, reward (T,) instead of the
    task's, failed (over without a success, and not because time was up), and extra, rows per step
    for readers other than robomimic.
    """
    path = Path(path)
    with building(path) as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args, sort_keys=True)
        data.attrs["task"] = task.name
        data.attrs["mujoco_version"] = version("mujoco")
        data.attrs["total"] = sum(len(episode["action"]) for episode in episodes)
        for index, episode in enumerate(episodes):
            save_episode(data.create_group(f"demo_{index}"), task, episode)
        keys = [f"demo_{index}" for index in range(len(episodes))]
        file.create_dataset("mask/train", data=np.array(keys, dtype="S"))
    return path


@contextlib.contextmanager
def building(path: Path) -> Iterator[Any]:
    """Open an h5py file that becomes `path` at the end.

    It is built in memory: on a full disk HDF5 would leave a broken file and crash as Python ends.
    """
    import h5py

    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as handle:
        handle.write(image)


def save_episode(group, task: Task, episode: dict) -> None:
    steps = len(episode["action"])
    obs = episode["obs"][:steps]
    next_obs = episode["next_obs"] if "next_obs" in episode else episode["obs"][1:]
    keys = task.obs_keys or ("flat",)  # robomimic's name for an observation that is one array
    ends = np.cumsum(task.obs_sizes)[:-1] if task.obs_keys else []
    for key, now, after in zip(keys, np.split(obs, ends, axis=1), np.split(next_obs, ends, axis=1)):
        group[f"obs/{key}"] = now
        group[f"next_obs/{key}"] = after
    group["actions"] = episode["action"]
    success = np.asarray(episode["success"], bool)
    if "reward" in episode:
        group["rewards"] = np.asarray(episode["reward"], np.float32)
    else:
        group["rewards"] = np.array([task.reward(one) for one in success], np.float32)
    over = success.copy()
    if episode.get("failed", False):
        over[-1] = True
        # robomimic's own files set dones after a time-out too, so dones cannot tell.
        group.attrs["failed"] = True
    group["dones"] = over.astype(np.int64)
    if "states" in episode:
        group["states"] = episode["states"]
    for key, value in episode.get("extra", {}).items():
        group[key] = value
    group.attrs["num_samples"] = steps
    if "seed" in episode:
        # reset(seed) and these actions replay the demonstration exactly
        group.attrs["seed"] = episode["seed"]


# ---- reading


def load(
    path: str | Path,
    task: str | Task | None = None,
    episodes: int | None = None,
    obs_keys: Sequence[str] | None = None,
    filter_key: str | None = None,
    clip_actions: bool = False,
) -> dict[str, np.ndarray]:
    """Read all steps of a file, or of its first `episodes` demonstrations, in order.

    obs_keys names the observations to take, in order; the task's own by default. filter_key names
    a list of demonstrations in the file's `mask`. Returns obs (N, D), action (N, A), reward (N,),
    next_obs (N, D), terminated and truncated (N,). columns.label says where a demonstration ends.
    Raises DataError (a ValueError) that names the file and the key, or FileNotFoundError.
    """
    path = existing(path, task)
    with opened(path) as file:
        task = task_of(path, file["data"], task)
        names = chosen(path, file, filter_key)
        names = names[: first_episodes(path, len(names), episodes, "demonstrations")]
        allowance = Allowance(path)
        parts = []
        for name in names:
            group = demonstration(path, file, name)
            where = f"{path}: data/{name}"
            parts.append(load_episode(where, group, task, obs_keys, allowance, clip_actions))
        return joined(path, parts)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a robomimic file; what a damaged one raises meanwhile becomes one sentence."""
    import h5py

    with reading(path, KIND):
        check_heaps(path)
    with reading(path, KIND), h5py.File(path, "r") as file:
        if not isinstance(member(file, "data"), h5py.Group):
            raise DataError(f"{path}: key 'data' is missing; this is not a robomimic file")
        yield file


def check_heaps(path: Path) -> None:
    """Raise DataError for a damaged heap of texts, in which the HDF5 library would loop for ever.

    A global heap begins with GCOL, its version, three zeros and its size. Each object in it begins
    with its index, its reference count, four zeros and its size; index 0 is the free space, whose
    size includes these 16 bytes (HDF5 file format specification, III.E).
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(HEAP)
            while start >= 0:
                if not heap_ends(content, start):
                    raise DataError(f"{path}: its text heap is damaged; make or fetch it again")
                start = content.find(HEAP, start + 1)


def heap_ends(content: mmap.mmap, start: int) -> bool:
    """Tell whether walking through the objects of a heap comes to its end."""
    if start + 16 > len(content):
        return False
    end = start + struct.unpack_from("<Q", content, start + 8)[0]
    place = start + 16
    if end > len(content):
        return False
    while place + 16 <= end:
        index = struct.unpack_from("<H", content, place)[0]
        size = struct.unpack_from("<Q", content, place + 8)[0]
        length = size if index == 0 else 16 + (size + 7) // 8 * 8
        if length < 16 or place + length > end:
            return False
        place += length
    return True


def member(group, key: str) -> Any:
    """Return a group or dataset of this file, None if there is none.

    Raises DataError for what lies in another file: a file of demonstrations is complete.
    """
    import h5py

    found = group
    for part in key.split("/"):
        if not isinstance(found, h5py.Group):
            return None
        link = found.get(part, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise elsewhere(group, key)
        try:
            found = found[part]
        except KeyError:  # not there, or a link to nowhere
            return None
    if found.file.filename != group.file.filename:
        raise elsewhere(group, key)
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise elsewhere(group, key)
    return found


def elsewhere(group, key: str) -> DataError:
    return DataError(f"{group.file.filename}: '{key}' lies in another file, which is not opened")


def demonstration(path: Path, file, name: str) -> Any:
    """Return the group of a demonstration."""
    import h5py

    group = member(file["data"], name)
    if not isinstance(group, h5py.Group):
        raise DataError(f"{path}: data/{name} is not a demonstration")
    return group


def names(file) -> list[str]:
    """List the demonstrations of an open file, in the order of their numbers."""
    return sorted((key for key in file["data"] if key.startswith("demo")), key=number)


def number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() and len(digits) < 10 else 0


def filters(file) -> dict[str, list[str]]:
    """Return the demonstrations that each filter of an open file lists."""
    import h5py

    mask = member(file, "mask")
    found = {}
    for key in mask if isinstance(mask, h5py.Group) else ():
        dataset = member(mask, key)
        if isinstance(dataset, h5py.Dataset) and dataset.ndim == 1 and dataset.dtype.kind in "SO":
            if dataset.shape[0] > len(file["data"]):
                raise DataError(f"{file.filename}: mask/{key} lists more than there is")
            with memory_limit():
                found[key] = [bytes(name).decode() for name in dataset[()]]
    return found


def chosen(path: Path, file, filter_key: str | None) -> list[str]:
    """List the demonstrations to read, in order; all of them without a filter."""
    every = names(file)
    if filter_key is None:
        return every
    lists = filters(file)
    if filter_key not in lists:
        offered = ", ".join(lists) or "none"
        raise DataError(f"{path}: has no filter '{filter_key}'; its filters: {offered}")
    wanted = set(lists[filter_key])
    missing = sorted(wanted - set(every))
    if missing:
        raise DataError(f"{path}: mask/{filter_key} lists {missing[0]}, which is not there")
    return [name for name in every if name in wanted]


def load_episode(
    where: str, group, task: Task, obs_keys, allowance: Allowance, clip_actions: bool
) -> dict[str, np.ndarray]:
    """Read, check and label one demonstration."""
    keys = observation_keys(where, group, task, obs_keys)
    columns = {
        "actions": column(where, group, "actions", task.action_dim, allowance),
        "rewards": column(where, group, "rewards", None, allowance),
    }
    now = {f"obs/{key}": size for key, size in keys.items()}
    after = {f"next_obs/{key}": size for key, size in keys.items()}
    if member(group, "next_obs") is None:
        after = {}
    for key, size in (now | after).items():
        columns[key] = column(where, group, key, size, allowance)
    same_length(where, columns)
    obs = stacked(where, [columns[key] for key in now], task)
    terminated = ends(where, group, task, columns["rewards"], allowance)
    steps = {
        "obs": obs,
        "action": within_limits(
            f"{where}: key 'actions'", task.unit_actions(columns["actions"]), clip_actions
        ),
        "reward": columns["rewards"],
        "next_obs": stacked(where, [columns[key] for key in after], task) if after else obs,
        "terminated": terminated,
    }
    labelled = label(steps, task)
    return labelled if after else shifted(where, labelled, steps)


def observation_keys(where: str, group, task: Task, obs_keys) -> dict[str, int | None]:
    """Return the observations to read, with their widths where the task knows them."""
    if obs_keys:
        return dict.fromkeys(obs_keys)
    if task.obs_keys:
        return dict(zip(task.obs_keys, task.obs_sizes))
    inside = member(group, "obs")
    offered = {key: inside[key].shape for key in inside} if inside is not None else {}
    fitting = [key for key, shape in offered.items() if shape[1:] == (task.obs_dim,)]
    if len(fitting) == 1:
        return {fitting[0]: task.obs_dim}
    found = ", ".join(f"{key} {shape[1:]}" for key, shape in offered.items()) or "none"
    raise DataError(
        f"{where}: say which observations make up the task's {task.obs_dim}, with --obs-keys; "
        f"the file has {found}"
    )


def column(where: str, group, key: str, width: int | None, allowance: Allowance) -> np.ndarray:
    """Read numbers: (T,) or (T, width); (T, any) of an observation whose width is not known."""
    import h5py

    dataset = member(group, key)
    if dataset is None:
        raise DataError(f"{where}: key '{key}' is missing")
    name = f"{where}: key '{key}'"
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{name} is not an array of numbers")
    shape = dataset.shape
    if width is None and key.startswith(("obs/", "next_obs/")) and shape is not None:
        if len(shape) > 2:
            raise DataError(f"{name} holds images or tables of {shape[1:]}, not (T, D)")
        width = shape[1] if len(shape) == 2 else None
    check_layout(name, shape, dataset.dtype, width)
    allowance.take(name, shape, dataset.dtype.itemsize)
    if dataset.chunks:
        allowance.check(name, dataset.chunks, dataset.dtype.itemsize)
    return finite(name, dataset[()])


def stacked(where: str, parts: list[np.ndarray], task: Task) -> np.ndarray:
    """Put the parts of an observation side by side -> (T, D)."""
    obs = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    if obs.shape[1] != task.obs_dim:
        raise DataError(
            f"{where}: these observations have {obs.shape[1]} numbers, task '{task.name}' has "
            f"{task.obs_dim}"
        )
    return obs


def ends(where: str, group, task: Task, rewards: np.ndarray, allowance: Allowance) -> np.ndarray:
    """Tell which steps (T,) are terminal for another reason than a rewarded success."""
    terminal = np.zeros(len(rewards), bool)
    if attribute(group, "failed"):
        terminal[-1] = True
    if task.suite not in ("robosuite", "arm") and "dones" in group:
        dones = column(where, group, "dones", None, allowance)
        same_length(where, {"dones": dones, "rewards": rewards})
        terminal |= dones > 0
    return terminal


def shifted(where: str, labelled: dict, recorded: dict) -> dict[str, np.ndarray]:
    """Give each step the next one's observation, in a file that holds no next observations."""
    obs = recorded["obs"]
    length = len(labelled["obs"])
    following = np.concatenate([obs[1:], obs[-1:]])[:length]  # a terminal step looks no further
    labelled = labelled | {"next_obs": following}
    if length < len(obs) or labelled["terminated"][-1]:
        return labelled
    if length == 1:
        raise DataError(f"{where}: a single step without 'next_obs' teaches nothing")
    labelled = {name: values[:-1] for name, values in labelled.items()}
    labelled["truncated"][-1] = not labelled["terminated"][-1]
    return labelled


# ---- attributes and texts, whose length a damaged file can claim


def attribute(holder, name: str) -> Any:
    """Return a scalar attribute of a group: a number or a text; None if it is not there.

    Raises DataError for an array: robomimic's attributes are scalars.
    """
    if name not in holder.attrs:
        return None
    stored = holder.attrs.get_id(name)
    if stored.shape not in ((), (1,)):
        raise DataError(f"{holder.file.filename}: attribute '{name}' is not a single value")
    with memory_limit():
        value = holder.attrs[name]
    if stored.shape == (1,):
        value = value[0]
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def memory_limit(more: int = 256 << 20) -> Iterator[None]:
    """Let this process have only so many bytes more, so that a damaged length cannot take all.

    HDF5 allocates what a text claims before it looks for it. No effect outside Linux.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


# ---- the world a file is of


def env_args(path: str | Path) -> dict:
    """Return the simulator's arguments in a file, for envs.make_env(task, env_args=...).

    Raises ValueError if it has none.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no demonstrations at {path}, and no simulator's settings")
    with opened(path) as file:
        return described_world(path, file["data"])


def described_world(path: Path, data) -> dict:
    """Read the attribute env_args, which robomimic writes."""
    text = attribute(data, "env_args")
    if text is None:
        raise DataError(
            f"{path}: attribute 'env_args' of 'data' is missing; {converter(path, data)}"
        )
    if not isinstance(text, str):
        raise DataError(f"{path}: attribute 'env_args' is not JSON text")
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: attribute 'env_args' is not JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise DataError(
            f"{path}: attribute 'env_args' is not a JSON object; this is not a robomimic file"
        )
    return arguments


def converter(path: Path, data) -> str:
    """Say what turns a file without env_args into one with it."""
    if "env_info" in data.attrs or "env" in data.attrs:
        return (
            "this is robosuite's own recording; convert it: "
            f"python -m robomimic.scripts.conversion.convert_robosuite --dataset {path}, then "
            f"python -m robomimic.scripts.dataset_states_to_obs --dataset {path} --done_mode 2 "
            "--output_name low_dim.hdf5"
        )
    return (
        "this is not a robomimic file; robomimic's scripts/conversion make one of other recordings"
    )


def task_of(path: Path, data, task: str | Task | None) -> Task:
    """Return the task, checked against the world that the file is of."""
    if task is not None:
        task = with_path(path, task)
        if task.suite not in TABLE and "env_args" not in data.attrs:
            return task  # recordings of one's own environment need not say so
    arguments = described_world(path, data)
    if task is None:
        task = with_path(path, task_named(data, arguments.get("env_name")))
    found = arguments.get("env_name")
    if found != task.env_name:
        raise DataError(
            f"{path}: 'env_args' is for {found}, task '{task.name}' needs {task.env_name}"
        )
    if task.suite not in TABLE:
        return task
    kwargs = arguments.get("env_kwargs")
    if not isinstance(kwargs, dict):
        raise DataError(f"{path}: 'env_args' has no 'env_kwargs'; this is not a robomimic file")
    if kwargs.get("reward_shaping"):
        raise DataError(
            f"{path}: 'rewards' are shaped, so success cannot be read from them; "
            "use the sparse file"
        )
    if absolute(kwargs.get("controller_configs")):
        raise DataError(
            f"{path}: its actions are absolute poses (controller 'input_type: absolute'), a policy "
            "here commands changes; use the recording with delta actions"
        )
    return task


def with_path(path: Path, task: str | Task) -> Task:
    try:
        return get_task(task)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def task_named(data, env_name: str | None) -> str:
    """Return the name of the task of the table that a file is of."""
    known = [task.name for task in TASKS.values() if task.env_name == env_name]
    stated = attribute(data, "task")
    if stated is not None:
        return str(stated)
    return str(known[0] if known else env_name)


def absolute(controller: Any) -> bool:
    """Tell whether a controller's settings, nested as robosuite nests them, take absolute poses."""
    if isinstance(controller, dict):
        if controller.get("input_type") == "absolute" or controller.get("control_delta") is False:
            return True
        return any(absolute(part) for part in controller.values())
    if isinstance(controller, list):
        return any(absolute(part) for part in controller)
    return False
