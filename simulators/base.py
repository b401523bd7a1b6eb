"""What every simulated task shares: spaces, limits, seeds, refusals; and which suite builds it.

    from simulators import make
    env = make(task, seed=0, render_mode=None, episode_limit=None, env_args=None)

Imports no project file: a task is anything with the fields of envs.Task.
Not here: the suites themselves (robosuite_env.py, ogbench_env.py, gym_env.py).
"""

import ctypes.util
import importlib
import logging
import os
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from threadpoolctl import threadpool_limits

RENDERERS = ("egl", "osmesa", "cgl")


class SimulatorEnv(gymnasium.Env):
    """One task: terminates at the first success, truncates at the limit, clips actions.

    An episode is a function of (reset seed, actions), bitwise, in a fresh environment or a used
    one. A suite adds _build, _reset, _advance and _draw. `episode_seed` is that of the episode,
    also where reset() drew it itself.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        task: Any,
        seed: int | None = None,
        render_mode: str | None = None,
        episode_limit: int | None = None,
        env_args: dict | None = None,
    ):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is None or 'rgb_array', got {render_mode!r}")
        limit = task.episode_limit if episode_limit is None else episode_limit
        if limit is None:
            raise ValueError(
                f"task '{task.name}' sets no limit to its episodes: give one, --episode-limit"
            )
        if limit < 1:
            raise ValueError(f"episode_limit must be at least 1, got {limit}")
        self.task = task
        self.render_mode = render_mode
        self.episode_limit = int(limit)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (task.action_dim,), np.float32)
        self._first_seed = seed
        self.episode_seed = None
        self.steps = 0
        try:
            self._build(render_mode is not None, env_args)
        except (ModuleNotFoundError, ValueError):
            raise
        except Exception as error:
            if render_mode is None:
                raise
            raise RuntimeError(
                f"cannot render, OpenGL did not start ({error}). Training and evaluation need "
                "none; for videos install a software renderer: "
                "apt-get install libegl1 libgl1-mesa-dri"
            ) from error

    def _build(self, render: bool, env_args: dict | None) -> None:
        """Make self.simulator."""
        raise NotImplementedError

    def _reset(self, seed: int) -> np.ndarray:
        """Begin the episode of a seed and return its first observation (D,)."""
        raise NotImplementedError

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Execute an action: (A,) -> observation (D,), which conditions hold (C,)."""
        raise NotImplementedError

    def _draw(self) -> np.ndarray:
        """Return a picture (height, width, 3) uint8."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is None:
            seed = self._first_seed
            self._first_seed = None
        super().reset(seed=seed)
        self.episode_seed = int(self.np_random.integers(2**31) if seed is None else seed)
        self.steps = 0
        return self._reset(self.episode_seed).astype(np.float32), {"success": False}

    def checked(self, action: np.ndarray) -> np.ndarray:
        """Return the action clipped to [-1, 1]. Raises ValueError for a bad shape or a NaN."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(
                f"task '{self.task.name}' takes actions of {self.action_space.shape}, "
                f"got {action.shape}"
            )
        if not np.isfinite(action).all():
            raise ValueError(
                f"action has non-finite values at step {self.steps}: {action}; "
                "check the policy's output"
            )
        return np.clip(action, -1.0, 1.0)

    def step(self, action: np.ndarray):
        obs, met = self._advance(self.checked(action))
        self.steps += 1
        success = bool(np.all(met))
        truncated = self.steps >= self.episode_limit and not success
        reward = float(self.task.reward(met))
        return obs.astype(np.float32), reward, success, truncated, {"success": success}

    def render(self) -> np.ndarray:
        if self.render_mode is None:
            raise RuntimeError(
                "this environment draws nothing; use make_env(task, seed, render_mode='rgb_array')"
            )
        return self._draw()

    def close(self) -> None:
        self.simulator.close()


def import_simulator(module: str, render: bool) -> ModuleType:
    """Import a simulator without its warnings, and without OpenGL unless something is drawn."""
    if render and os.environ.get("MUJOCO_GL") not in RENDERERS:
        os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "osmesa"
    os.environ.setdefault("MUJOCO_GL", "disable")
    chosen = os.environ["MUJOCO_GL"]
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        simulator = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the simulator is missing ({error}): make .venv/ready"
        ) from error
    finally:
        logging.disable(previous)
        os.environ["MUJOCO_GL"] = chosen  # robosuite sets egl, which worker processes would inherit
    if render:
        opengl = importlib.import_module("mujoco.gl_context")
        if "GLContext" not in vars(opengl):  # imported when nothing was to be drawn
            importlib.reload(opengl)
    # numpy's BLAS, not torch's. To solve for 6 joints it would wake every core, which is slow on a
    # busy machine, and it would round differently from one machine to the next.
    threadpool_limits(1, "blas")
    return simulator


def make(
    task: Any,
    seed: int | None = None,
    render_mode: str | None = None,
    episode_limit: int | None = None,
    env_args: dict | None = None,
) -> SimulatorEnv:
    """Build a task's environment; its suite is imported only now."""
    if task.suite == "robosuite":
        from .robosuite_env import RobosuiteEnv as suite
    elif task.suite == "ogbench":
        from .ogbench_env import OGBenchEnv as suite
    elif task.suite == "gymnasium":
        from .gym_env import GymEnv as suite
    else:
        raise ValueError(f"task '{task.name}' is of no known suite: {task.suite}")
    return suite(task, seed, render_mode, episode_limit, env_args)
