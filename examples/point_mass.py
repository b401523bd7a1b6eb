"""A task of your own: a point mass with a Dict observation, +-2 actions and a sparse success.

    python -m examples.point_mass demos.npz            # 20 noisy demonstrations in OGBench's layout
    python -m demos --check --task examples.point_mass:PointMass-v0 --data demos.npz
    python train_online.py --task examples.point_mass:PointMass-v0 --data demos.npz --preset cpu

`module:EnvId-v0` is gymnasium's own form: the module is imported first, and registers the id.
Not here: what to set first on a new task (docs/your_task.md).
"""

import sys

import gymnasium
import numpy as np
from gymnasium import spaces


class PointMass(gymnasium.Env):
    """Push a point to a small goal on the plane and stop there."""

    def __init__(self):
        plane = spaces.Box(-10.0, 10.0, (2,), np.float64)
        self.observation_space = spaces.Dict({"goal": plane, "place": plane, "velocity": plane})
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2)
        self.goal = self.np_random.uniform(-1, 1, 2)
        self.velocity = np.zeros(2)
        return self.observation(), {"success": False}

    def step(self, action):
        self.velocity = 0.8 * self.velocity + 0.1 * np.asarray(action, np.float64)
        self.place = self.place + 0.3 * self.velocity
        near = np.linalg.norm(self.place - self.goal) < 0.03
        success = bool(near and np.linalg.norm(self.velocity) < 0.1)
        return self.observation(), float(success), success, False, {"success": success}

    def observation(self):
        parts = {"goal": self.goal, "place": self.place, "velocity": self.velocity}
        return {name: value.copy() for name, value in parts.items()}


if "PointMass-v0" not in gymnasium.registry:  # once, also where this file is the script itself
    gymnasium.register("PointMass-v0", entry_point=PointMass, max_episode_steps=60)


def demonstrate(path: str, episodes: int = 20, seed: int = 0) -> None:
    """Write noisy demonstrations that succeeded: observations, actions, rewards, ends."""
    rng = np.random.default_rng(seed)
    env = gymnasium.make("PointMass-v0")
    kept = []
    attempt = 0
    while len(kept) < episodes:
        obs, _ = env.reset(seed=10_000 + attempt)
        attempt += 1
        rows = []
        ended = False
        while not ended:
            push = 4.0 * (obs["goal"] - obs["place"]) - 2.0 * obs["velocity"]
            action = np.clip(push + rng.normal(0, 1.0, 2), -2, 2).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((flat(obs), action, reward, terminated, truncated, flat(next_obs)))
            obs = next_obs
            ended = terminated or truncated
        if terminated:
            kept.append(rows)
    columns = [np.array(column) for column in zip(*(row for rows in kept for row in rows))]
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    np.savez_compressed(path, **dict(zip(names, columns)))
    print(f"{path}: {episodes} demonstrations of {attempt} attempts, {len(columns[0])} steps")


def flat(obs: dict[str, np.ndarray]) -> np.ndarray:
    """Flatten an observation in the order of its space, as the training does."""
    return np.concatenate([obs["goal"], obs["place"], obs["velocity"]])


if __name__ == "__main__":
    demonstrate(sys.argv[1] if len(sys.argv) > 1 else "demos.npz")
