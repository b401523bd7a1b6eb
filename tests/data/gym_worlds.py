"""Environments as users register them: a toy point mass, and ones that must be refused."""

import time

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class PointMass(gymnasium.Env):
    """Move a point in the unit square to a goal within 5 cm; actions are speeds within +-2 m/s."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None, key="is_success", drift=0.0):
        self.render_mode = render_mode
        self.key = key
        self.drift = drift
        self.observation_space = Dict(
            {
                "position": Box(-1.0, 1.0, (2,), np.float64),
                "goal": Dict({"place": Box(-1.0, 1.0, (2,), np.float64)}),
                "clock": Box(0.0, np.inf, (1,), np.float64),
            }
        )
        self.action_space = Box(-2.0, 2.0, (2,), np.float32)

    def observe(self):
        return {
            "goal": {"place": self.goal},
            "position": self.position,
            "clock": np.array([self.time]),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        self.goal = self.np_random.uniform(-1, 1, 2)
        if self.drift:
            self.position = self.position + self.drift * (time.perf_counter_ns() % 997) / 997
        self.time = 0.0
        return self.observe(), {}

    def step(self, action):
        assert action.dtype == np.float32 and action.shape == (2,)
        self.action = action
        self.position = np.clip(self.position + 0.05 * action.astype(np.float64), -1, 1)
        self.time += 1.0
        near = bool(np.linalg.norm(self.position - self.goal) < 0.05)
        info = {self.key: near} if self.key else {}
        return self.observe(), float(near) - 0.25, False, False, info

    def render(self):
        return np.full((32, 32, 3), 7, np.uint8)


class Spaces(gymnasium.Env):
    """Has the spaces it is told."""

    def __init__(self, observations=None, actions=None):
        self.observation_space = observations or Box(-1, 1, (3,))
        self.action_space = actions or Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Ends(gymnasium.Env):
    """Ends as told: terminated at step 3, truncated at step 3, or with a success that passes."""

    observation_space = Box(-np.inf, np.inf, (1,))
    action_space = Box(-1, 1, (1,))

    def __init__(self, how):
        self.how = how

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        third = self.count == 3
        obs = np.full(1, np.nan if self.how == "nan" and third else self.count, np.float32)
        info = {"success": third and self.how == "passing"}
        terminated = third and self.how == "terminated"
        truncated = third and self.how == "truncated"
        return obs, -2.5, terminated, truncated, info


def register(name, entry, limit=None, **kwargs):
    gymnasium.register(f"{name}-v0", f"gym_worlds:{entry}", max_episode_steps=limit, kwargs=kwargs)


INFINITE = Box(np.array([-1, -np.inf]), np.array([1, np.inf]), dtype=np.float32)
register("PointMass", "PointMass", 40)
register("Limitless", "PointMass")
register("Silent", "PointMass", 40, key=None)
register("Reached", "PointMass", 40, key="reached")
register("Drifting", "PointMass", 40, drift=0.5)
register("Discrete", "Spaces", 10, actions=Discrete(3))
register("Infinite", "Spaces", 10, actions=INFINITE)
register("Whole", "Spaces", 10, actions=Box(0, 5, (2,), np.int64))
register("Picture", "Spaces", 10, observations=Box(0, 255, (8, 8, 3), np.uint8))
register("PictureInside", "Spaces", 10, observations=Dict({"eye": Box(0, 1, (8, 8, 3))}))
register("Letter", "Spaces", 10, observations=Dict({"letter": Discrete(3)}))
register("Matrix", "Spaces", 10, observations=Box(-1, 1, (2, 3)))
for how in ("terminated", "truncated", "passing", "nan"):
    register(f"Ends-{how}", "Ends", 5, how=how)
