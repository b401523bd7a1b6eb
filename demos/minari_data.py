"""Reads Minari's data sets from its local cache: --data minari:ID.

    data = minari_data.load("minari:pointmass/noisy-v0", task)       # ready for the replay

Needs Minari (pip install "minari[hdf5]==0.5.3"). Observations of Dict and Tuple spaces are put side
by side in the space's order, as the environment here does.
Not here: downloading them (minari download ID), image observations.

Shapes: T steps of an episode, N steps in all, D observation, A action.
"""

from typing import Any

import numpy as np
from gymnasium import spaces

from demos.columns import (
    DataError,
    check_layout,
    finite,
    first_episodes,
    joined,
    label,
    reading,
    same_length,
    within_limits,
)
from envs import Task

PREFIX = "minari:"


def is_minari(path: Any) -> bool:
    return str(path).startswith(PREFIX)


def load(
    name: str, task: Task, episodes: int | None = None, clip_actions: bool = False
) -> dict[str, np.ndarray]:
    """Read all steps of a data set, or of its first `episodes` episodes, in order.

    Returns obs (N, D), action (N, A), reward (N,), next_obs (N, D), terminated and truncated (N,).
    Raises DataError that names the data set.
    """
    dataset = opened(name)
    with reading(name, "a readable Minari data set"):
        count = first_episodes(name, dataset.total_episodes, episodes, "episodes")
        parts = []
        for index in range(count):
            where = f"{name}: episode {index}"
            parts.append(load_episode(where, dataset, index, task, clip_actions))
        return joined(name, parts)


def opened(name: str):
    """Open a data set of the cache."""
    try:
        import minari
    except ImportError as error:
        raise DataError(
            f'{name} needs Minari: pip install "minari[hdf5]==0.5.3" ({error})'
        ) from error
    identity = name.removeprefix(PREFIX)
    with reading(name, "a readable Minari data set"):
        try:
            return minari.load_dataset(identity)
        except FileNotFoundError as error:
            raise DataError(
                f"{name} is not in Minari's cache; fetch it: minari download {identity}"
            ) from error


def load_episode(
    where: str, dataset, index: int, task: Task, clip_actions: bool
) -> dict[str, np.ndarray]:
    """Read, check and label one episode, whose observations are one more than its steps."""
    episode = dataset[index]
    obs = flat(where, dataset.observation_space, episode.observations)
    columns = {
        "obs": obs[:-1],
        "next_obs": obs[1:],
        "actions": flat(where, dataset.action_space, episode.actions),
        "rewards": np.asarray(episode.rewards),
        "terminations": np.asarray(episode.terminations),
    }
    widths = {"obs": task.obs_dim, "next_obs": task.obs_dim, "actions": task.action_dim}
    for name, values in columns.items():
        place = f"{where}: '{name}'"
        check_layout(place, values.shape, values.dtype, widths.get(name))
        columns[name] = finite(place, values)
    same_length(where, columns)
    actions = task.unit_actions(columns["actions"])
    steps = {
        "obs": columns["obs"],
        "action": within_limits(f"{where}: 'actions'", actions, clip_actions),
        "reward": columns["rewards"],
        "next_obs": columns["next_obs"],
        "terminated": columns["terminations"] > 0,
    }
    return label(steps, task)


def flat(where: str, space: spaces.Space, values: Any) -> np.ndarray:
    """Put the parts of a space's values (T, ...) side by side -> (T, D)."""
    if isinstance(space, spaces.Dict):
        parts = [flat(where, space[key], values[key]) for key in space.spaces]
        return np.concatenate(parts, axis=1)
    if isinstance(space, spaces.Tuple):
        parts = [flat(where, one, value) for one, value in zip(space.spaces, values)]
        return np.concatenate(parts, axis=1)
    if isinstance(space, spaces.Box):
        return np.asarray(values).reshape(len(values), -1)
    raise DataError(f"{where} holds {space}: only Box spaces, and Dict or Tuple of them, are read")


def seeds(name: str) -> np.ndarray | None:
    """Return the reset seed of each episode, None unless all are recorded."""
    dataset = opened(name)
    with reading(name, "a readable Minari data set"):
        indices = range(dataset.total_episodes)
        found = [one.get("seed") for one in dataset.storage.get_episode_metadata(indices)]
    return None if None in found else np.array(found, np.uint64)
