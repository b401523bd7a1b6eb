"""Any gymnasium environment with a continuous action space, under its own id.

    from simulators.gym_env import GymEnv, describe
    describe("Reacher-v5")                  # sizes, limits and units, read from its spaces
    describe("my_module:PointMass-v0")      # imports my_module first, which registers the id

Observations become one float32 vector: a Dict is flattened in the order of its space. Actions are
in [-1, 1] here and in the environment's own units inside. Rewards and ends are the environment's.
Success is read from `info` for reports only; nothing is trained on it.
Not here: pictures (vla_head.py), training settings of such a task (envs.GYM_DEFAULTS).
"""

import contextlib
import importlib
import os
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space

from .base import SimulatorEnv, import_simulator

SUCCESS_KEYS = ("success", "is_success")


class NotMade(ValueError):
    """gymnasium cannot make an environment of this id."""


class GymEnv(SimulatorEnv):
    """A gymnasium environment; the limit is its own or episode_limit.

    An episode is a function of (reset seed, actions) if the environment honours its seed.
    """

    def _build(self, render, env_args):
        name = self.task.name
        if env_args is not None:
            raise ValueError(f"task '{name}' takes no env_args: those belong to robomimic files")
        self.simulator = make(self.task.env_name, "rgb_array" if render else None)
        self._space = action_box(name, self.simulator.action_space)
        low = self._space.low.ravel().astype(np.float64)
        high = self._space.high.ravel().astype(np.float64)
        self._units = (low, high)
        self._has_succeeded = False
        self.metadata = {"render_fps": 30} | self.simulator.metadata

    def _reset(self, seed):
        self._has_succeeded = False
        obs, _ = self.simulator.reset(seed=seed)
        return self._vector(obs)

    def step(self, action: np.ndarray):
        """Execute an action (A,) in [-1, 1]; larger ones are clipped."""
        own = from_unit(self.checked(action), *self._units)
        own = own.reshape(self._space.shape).astype(self._space.dtype)
        obs, reward, terminated, truncated, info = self.simulator.step(own)
        self.steps += 1
        self._has_succeeded = self._has_succeeded or self._success(info)
        limit = self.steps >= self.episode_limit and not terminated
        return (
            self._vector(obs),
            float(reward),
            bool(terminated),
            bool(truncated or limit),
            {"success": self._has_succeeded},
        )

    def _success(self, info: dict[str, Any]) -> bool:
        key = self.task.success_key
        if key is not None:
            if key not in info:
                raise ValueError(
                    f"task '{self.task.name}' has no '{key}' in its info, which holds "
                    f"{', '.join(map(str, info)) or 'nothing'}"
                )
            return bool(info[key])
        return any(bool(info[name]) for name in SUCCESS_KEYS if name in info)

    def _vector(self, obs) -> np.ndarray:
        vector = flatten(self.simulator.observation_space, obs)
        if vector.shape != self.observation_space.shape:
            raise ValueError(
                f"task '{self.task.name}' returned an observation of {vector.shape}, "
                f"its space says {self.observation_space.shape}"
            )
        if not np.isfinite(vector).all():
            raise ValueError(
                f"task '{self.task.name}' returned a non-finite observation at step {self.steps}"
            )
        return vector

    def _draw(self):
        return self.simulator.render()


def describe(env_id: str) -> dict[str, Any]:
    """Read an environment's sizes: obs_dim, action_dim, episode_limit, action_low, action_high.

    Where the observation is a Dict of Boxes also obs_keys and obs_sizes, in the space's order.
    episode_limit is None where the id was registered without one. Raises ValueError for an id that
    does not exist and for spaces that are not vectors.
    """
    with contextlib.closing(make(env_id)) as env:
        actions = action_box(env_id, env.action_space)
        return {
            "obs_dim": vector_size(env_id, env.observation_space),
            "action_dim": int(np.prod(actions.shape)),
            "episode_limit": gymnasium.spec(env_id.rpartition(":")[2]).max_episode_steps,
            "action_low": tuple(map(float, actions.low.ravel())),
            "action_high": tuple(map(float, actions.high.ravel())),
        } | observation_parts(env.observation_space)


def make(env_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """Make the environment of an id, without gymnasium's time limit."""
    import_simulator("gymnasium", render_mode is not None)
    module, _, name = env_id.rpartition(":")
    if module:
        import_module(module, env_id)
    options = {} if render_mode is None else {"render_mode": render_mode}
    try:
        return gymnasium.make(name, max_episode_steps=-1, disable_env_checker=True, **options)
    except (gymnasium.error.Error, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise NotMade(f"gymnasium cannot make '{env_id}': {reason}") from error


def import_module(name: str, env_id: str) -> None:
    """Import the module that registers an id, also from the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"module '{name}' of task '{env_id}' cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def action_box(name: str, space: Space) -> Box:
    """Return the action space if it is a Box of real numbers within finite limits."""
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"task '{name}' has actions in {space}: POCO draws chunks of real numbers, so register "
            "the environment with a Box of floats"
        )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(
            f"task '{name}' has actions without limits, {space}: register the environment with a "
            "Box of finite limits"
        )
    return space


def vector_size(name: str, space: Space, key: str = "") -> int:
    """Count the numbers of an observation: a Box, or a Dict of them."""
    where = f"task '{name}' has the observation {space}" + (f" under '{key}'" if key else "")
    if isinstance(space, Dict):
        return sum(vector_size(name, one, one_key) for one_key, one in space.spaces.items())
    if not isinstance(space, Box):
        raise ValueError(
            f"{where}: a policy takes vectors, so register it with gymnasium's FlattenObservation"
        )
    if len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8):
        raise ValueError(
            f"{where}: a policy takes vectors, so give it the state instead of pictures "
            "(vla_head.py has a policy that sees)"
        )
    return int(np.prod(space.shape))


def observation_parts(space: Space) -> dict[str, tuple]:
    """Name the parts of a Dict of Boxes as a task's obs_keys and obs_sizes; {} for other spaces."""
    if not isinstance(space, Dict):
        return {}
    parts = space.spaces
    if not all(isinstance(part, Box) for part in parts.values()):
        return {}
    sizes = tuple(int(np.prod(part.shape)) for part in parts.values())
    return {"obs_keys": tuple(parts), "obs_sizes": sizes}


def flatten(space: Space, obs: Any) -> np.ndarray:
    """Write an observation as one float32 vector (D,), a Dict in the order of its space."""
    if isinstance(space, Dict):
        return np.concatenate([flatten(one, obs[key]) for key, one in space.spaces.items()])
    return np.asarray(obs, dtype=np.float32).ravel()


def from_unit(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Turn actions (..., A) in [-1, 1] into an environment's own units."""
    return np.clip(0.5 * (high + low) + 0.5 * (high - low) * actions, low, high)


def to_unit(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Turn actions (..., A) in an environment's own units into [-1, 1]."""
    half = np.where(high > low, 0.5 * (high - low), 1.0)
    return (np.asarray(actions) - 0.5 * (high + low)) / half
