"""
Reads and writes robomimic-schema HDF5: what robomimic ships opens here, what is written here opens in robomimic.

    data/demo_i/{obs/<key>, next_obs/<key>, actions, rewards, dones, states}   data.attrs: env_args (JSON), total
Shapes: T steps of a demonstration, N steps of the file, D observation, A action.
"""
from __future__ import annotations

import contextlib
import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np

from envs import TASKS, Task, get_task


def save(path, task: Task, env_args: dict, episodes: list[dict]) -> Path:
    """
    Atomic: a reader finds the old file or the whole new one. Each episode: obs (T+1, D), action, success, states, seed,
    and if it wants extra (rows per step) and failed (over without a success, and not because time was up).
    """
    path = Path(path)
    with building(path) as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(env_args, sort_keys=True)
        data.attrs["task"] = task.name
        data.attrs["mujoco_version"] = version("mujoco")
        data.attrs["total"] = sum(len(episode["action"]) for episode in episodes)
        for index, episode in enumerate(episodes):
            _save_episode(data.create_group(f"demo_{index}"), task, episode)
        keys = [f"demo_{index}" for index in range(len(episodes))]
        file.create_dataset("mask/train", data=np.array(keys, dtype="S"))
    return path


@contextlib.contextmanager
def building(path: Path):
    """
    An h5py file that becomes `path` at the end. It is built in memory: on a full disk HDF5 would leave a broken file
    and crash when Python ends.
    """
    import h5py

    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    with replacing(path) as handle:
        handle.write(image)


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file that takes the place of `path` once it is whole and on the disk. Processes do not share it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def _save_episode(group, task: Task, episode: dict) -> None:
    ends = np.cumsum(task.obs_sizes)[:-1]
    for key, part in zip(task.obs_keys, np.split(episode["obs"], ends, axis=1)):
        group[f"obs/{key}"], group[f"next_obs/{key}"] = part[:-1], part[1:]
    success = np.asarray(episode["success"], bool)
    group["actions"] = episode["action"]
    group["rewards"] = np.array([task.reward(one) for one in success], np.float32)
    failed = bool(episode.get("failed", False))
    group["dones"] = (success | (failed & (np.arange(len(success)) == len(success) - 1))).astype(np.int64)
    if failed:
        group.attrs["failed"] = True  # robomimic's own files set dones after a time-out too, so they cannot tell
    group["states"] = episode["states"]
    for key, value in episode.get("extra", {}).items():  # one row per step, for whoever reads more than robomimic does
        group[key] = value
    group.attrs["num_samples"] = len(success)
    group.attrs["seed"] = episode["seed"]  # reset(seed) and these actions replay the demonstration exactly


def load(path, task: str | Task | None = None, episodes: int | None = None) -> dict[str, np.ndarray]:
    """
    All steps of a file (or of its first `episodes` demonstrations), in order: obs (N, D), action (N, A), reward (N,),
    next_obs (N, D), terminated and truncated (N,).
    A demonstration ends at its first success (terminated) or at its last step: terminated if its attribute `failed`
    says so, otherwise truncated.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        name = task if isinstance(task, str) else getattr(task, "name", "lift")
        raise FileNotFoundError(f"no demonstrations at {path}; make some: python -m demos --task {name} --out {path}")
    try:
        with h5py.File(path, "r") as file:
            if "data" not in file or not isinstance(file["data"], h5py.Group):
                raise ValueError(f"{path}: key 'data' is missing; this is not a robomimic file")
            task = _task_of(path, file["data"], task)
            demos = names(file)
            if episodes is not None and not 0 < episodes <= len(demos):
                raise ValueError(f"{path}: key 'data' holds {len(demos)} demonstrations, {episodes} were asked for: "
                                 f"--demo-episodes {len(demos)} takes all")
            parts = [_load_episode(f"{path}: data/{key}", file["data"][key], task) for key in demos[:episodes]]
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file, truncated perhaps ({error}); make or fetch it "
                         "again") from error
    if not parts:
        raise ValueError(f"{path}: key 'data' holds no demonstration")
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def env_args(path) -> dict:
    """The simulator's arguments stored in a file, for envs.make_env(task, seed, env_args=...). ValueError if none."""
    import h5py

    if not Path(path).is_file():
        raise FileNotFoundError(f"no demonstrations at {path}, and with them no settings of the simulator")
    try:
        with h5py.File(path, "r") as file:
            return json.loads(file["data"].attrs["env_args"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a robomimic file with 'env_args' ({error})") from error


def names(file) -> list[str]:
    """The demonstrations of an open file, in the order of their numbers."""
    def number(name: str) -> int:
        digits = name.rpartition("_")[2]
        return int(digits) if digits.isdigit() else 0

    return sorted((key for key in file["data"] if key.startswith("demo")), key=number)


def _task_of(path, data, task) -> Task:
    if "env_args" not in data.attrs:
        raise ValueError(f"{path}: attribute 'env_args' of 'data' is missing; this is not a robomimic file")
    try:
        arguments = json.loads(data.attrs["env_args"])
    except ValueError as error:
        raise ValueError(f"{path}: attribute 'env_args' is not JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: attribute 'env_args' is not a JSON object; this is not a robomimic file")
    try:
        task = get_task(task if task is not None else _task_named(data, arguments.get("env_name")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if arguments.get("env_name") != task.env_name:
        found = arguments.get("env_name")
        raise ValueError(f"{path}: 'env_args' is for {found}, task '{task.name}' needs {task.env_name}")
    if not isinstance(arguments.get("env_kwargs"), dict):
        raise ValueError(f"{path}: 'env_args' has no 'env_kwargs'; this is not a robomimic file")
    if arguments["env_kwargs"].get("reward_shaping"):
        raise ValueError(f"{path}: 'rewards' are shaped, so success cannot be read from them; use the sparse file")
    return task


def _task_named(data, env_name) -> str:
    names = [task.name for task in TASKS.values() if task.env_name == env_name]
    return str(data.attrs.get("task", names[0] if names else env_name))


def _array(where: str, group, key: str, width: int | None = None) -> np.ndarray:
    if key not in group:
        raise ValueError(f"{where}: key '{key}' is missing")
    try:
        array = np.asarray(group[key], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: key '{key}' is not an array of numbers") from error
    if array.ndim != (1 if width is None else 2) or (width is not None and array.shape[1] != width):
        expected = "(T,)" if width is None else f"(T, {width})"
        raise ValueError(f"{where}: key '{key}' must be {expected}, found {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: key '{key}' has non-finite values")
    return array


def _load_episode(where: str, group, task: Task) -> dict[str, np.ndarray]:
    def read_obs(kind):
        columns = zip(task.obs_keys, task.obs_sizes)
        return [_array(where, group, f"{kind}/{key}", size) for key, size in columns]

    columns = {"actions": _array(where, group, "actions", task.action_dim), "rewards": _array(where, group, "rewards")}
    parts, next_parts = read_obs("obs"), read_obs("next_obs")
    lengths = {len(array) for array in (*columns.values(), *parts, *next_parts)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"{where}: all keys must have the same positive length, found {sorted(lengths)}")
    success = columns["rewards"] > 0
    steps = int(success.argmax()) + 1 if success.any() else len(success)  # the first success ends the episode
    success = success[:steps]
    terminated = success.copy()
    terminated[-1] |= bool(group.attrs.get("failed", False))
    truncated = np.zeros(steps, bool)
    truncated[-1] = not terminated[-1]
    return {
        "obs": np.concatenate(parts, axis=1)[:steps],
        "action": np.clip(columns["actions"][:steps], -1.0, 1.0),
        "reward": np.array([task.reward(bool(one)) for one in success], np.float32),
        "next_obs": np.concatenate(next_parts, axis=1)[:steps],
        "terminated": terminated,
        "truncated": truncated,
    }
