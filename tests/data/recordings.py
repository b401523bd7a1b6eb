"""Small files of demonstrations for the tests: robomimic's HDF5, OGBench's and D4RL's npz."""

import json
from pathlib import Path

import h5py
import numpy as np

import envs

WORLD = {"env_name": "Lift", "type": 1, "env_kwargs": {"reward_shaping": False}}


def write_hdf5(path: Path, rewards: list, reach: float = 1.0, next_obs: bool = True) -> Path:
    """Write Lift demonstrations as robomimic does, of these rewards and actions of this reach."""
    rng = np.random.default_rng(0)
    task = envs.TASKS["lift"]
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(WORLD)
        for index, reward in enumerate(rewards):
            group = data.create_group(f"demo_{index}")
            steps = len(reward)
            group["actions"] = rng.uniform(-reach, reach, (steps, 7))
            group["rewards"] = np.array(reward, np.float64)
            group["dones"] = np.zeros(steps, np.int64)
            for key, size in zip(task.obs_keys, task.obs_sizes):
                values = rng.normal(size=(steps + 1, size))
                group[f"obs/{key}"] = values[:-1]
                if next_obs:
                    group[f"next_obs/{key}"] = values[1:]
    return path


def write_play(path: Path, rows: int = 7, task: str = "cube-double", **changes) -> Path:
    """Write two trajectories of `rows` states as OGBench does, nothing solved.

    Columns are replaced by `changes` or, by None, left out.
    """
    task = envs.TASKS[task]
    goal = task.goal
    count = 2 * rows
    joints = 14 + 7 * len(goal.cubes) + len(goal.buttons) + len(goal.slides)
    numbers = np.arange(count, dtype=np.float32)[:, None]
    columns = {
        "observations": numbers * np.ones(task.obs_dim, np.float32),
        "actions": np.full((count, 5), 0.5, np.float32),
        "terminals": np.arange(count) % rows == rows - 1,
        "qpos": np.zeros((count, joints), np.float32),
        "qvel": np.zeros((count, joints), np.float32),
    }
    if goal.buttons:
        columns["button_states"] = np.zeros((count, len(goal.buttons)), np.int64)
    return write_npz(path, columns | changes)


def write_npz(path: Path, columns: dict) -> Path:
    np.savez(path, **{key: value for key, value in columns.items() if value is not None})
    return path
