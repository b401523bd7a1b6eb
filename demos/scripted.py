"""Makes demonstrations of robosuite's tasks with the scripted experts.

    path = scripted.collect("lift", episodes=20, seed=0, path="lift.hdf5")      # 20 s on one core

Only successes are kept. Not here: the experts (lift.py, can.py, square.py, motion.py), OGBench's
tasks (ogbench.py).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np

import envs
from demos import hdf5
from demos.can import CanDemonstrator
from demos.lift import LiftDemonstrator
from demos.processes import spread
from demos.square import SquareDemonstrator

EXPERTS = {"lift": LiftDemonstrator, "can": CanDemonstrator, "square": SquareDemonstrator}
_environments: dict[str, gymnasium.Env] = {}  # of this process


def collect(
    task: str | envs.Task,
    episodes: int,
    seed: int,
    path: str | Path,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write `episodes` successful demonstrations and return the path.

    The file depends on (task, episodes, seed) alone: each attempt has its own seed, and the first
    successes in the order of the attempts are kept. Raises ValueError for a task without an expert.
    """
    from tqdm import tqdm

    task = envs.get_task(task)
    if task.name not in EXPERTS:
        experts = ", ".join(EXPERTS)
        raise ValueError(
            f"no scripted expert for task '{task.name}'; experts: {experts}. Recordings of your "
            "own go to training with --data FILE"
        )
    kept = []
    attempts = 0
    with tqdm(total=episodes, desc=f"{task.name} demonstrations", disable=not progress) as bar:
        for episode in play_attempts(task, seed, workers):
            attempts += 1
            if episode["success"][-1]:
                kept.append(episode)
                bar.update()
            if len(kept) == episodes:
                break
            if attempts >= 20 and len(kept) < 0.2 * attempts:
                raise RuntimeError(
                    f"only {len(kept)} of {attempts} attempts succeeded: is the simulator right?"
                )
    hdf5.save(path, task, kept[0]["env_args"], kept)
    if progress:
        lengths = [len(episode["action"]) for episode in kept]
        print(
            f"{path}: {episodes} demonstrations of {attempts} attempts, {sum(lengths):,} steps, "
            f"{min(lengths)} to {max(lengths)} long, {np.mean(lengths):.0f} on average"
        )
    return Path(path)


def play_attempts(task: envs.Task, seed: int, workers: int) -> Iterator[dict]:
    """Yield attempts 0, 1, 2, ... in order, however many processes make them."""
    return spread(play_attempt, ((task, seed, attempt) for attempt in itertools.count()), workers)


def play_attempt(job: tuple) -> dict:
    """Play one attempt, job (task, seed, attempt): what hdf5.save writes, and env_args."""
    task, seed, attempt = job
    env = environment(task)
    rng = np.random.default_rng([seed, attempt])
    episode_seed = int(rng.integers(2**31))  # evaluation seeds, small integers, are other episodes
    expert = EXPERTS[task.name](rng)
    obs, _ = env.reset(seed=episode_seed)
    observations = [obs]
    actions = []
    successes = []
    states = []
    ended = False
    while not ended:
        states.append(env.simulator.sim.get_state().flatten())
        actions.append(expert(obs))
        obs, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(obs)
        successes.append(info["success"])
        ended = terminated or truncated
    return {
        "obs": np.array(observations),
        "action": np.array(actions),
        "success": np.array(successes),
        "states": np.array(states),
        "seed": episode_seed,
        "env_args": env.env_args,
    }


def environment(task: envs.Task) -> gymnasium.Env:
    """Return this process's environment of a task."""
    if task.name not in _environments:
        _environments.clear()
        _environments[task.name] = envs.make_env(task)
    return _environments[task.name]
