"""An environment as users bring them: a point mass with a Dict observation and actions of +-2."""

import gymnasium
import numpy as np
from gymnasium import spaces


class PointMass(gymnasium.Env):
    """Push a point to a goal on the plane. A state is a function of seed and actions."""

    metadata = {"render_modes": []}

    def __init__(self):
        box = spaces.Box(-10.0, 10.0, (2,), np.float64)
        self.observation_space = spaces.Dict({"velocity": box, "goal": box, "place": box})
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2)
        self.goal = self.np_random.uniform(-1, 1, 2)
        self.velocity = np.zeros(2)
        return self.look(), {"success": False}

    def step(self, action):
        self.velocity = 0.8 * self.velocity + 0.1 * np.asarray(action, np.float64)
        self.place = self.place + 0.3 * self.velocity
        success = bool(np.linalg.norm(self.place - self.goal) < 0.2)
        return self.look(), float(success), success, False, {"success": success}

    def look(self):
        return {
            "velocity": self.velocity.copy(),
            "goal": self.goal.copy(),
            "place": self.place.copy(),
        }


gymnasium.register("PointMass-v0", entry_point="pointmass:PointMass", max_episode_steps=60)


def expert(obs: dict, rng: np.random.Generator) -> np.ndarray:
    """Push towards the goal, with noise; within the environment's own +-2."""
    push = 3.0 * (obs["goal"] - obs["place"]) - 2.0 * obs["velocity"]
    return np.clip(push + rng.normal(0, 0.5, 2), -2.0, 2.0).astype(np.float32)
