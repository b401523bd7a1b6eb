"""
Where demonstrations come from: scripted experts and robomimic-schema HDF5 files.

    python -m demos --task lift --episodes 20 --seed 0 --out demos/lift.hdf5        # 20 s on one core
    data = demos.load("demos/lift.hdf5")                                            # ready for the replay
"""
from __future__ import annotations

import signal
from pathlib import Path

import numpy as np

import envs
from demos.can import CanDemonstrator
from demos.hdf5 import env_args, load, save  # noqa: F401 - demos.load, demos.env_args
from demos.lift import LiftDemonstrator
from demos.square import SquareDemonstrator

EXPERTS = {"lift": LiftDemonstrator, "can": CanDemonstrator, "square": SquareDemonstrator}
_env = None  # one per process


def collect(task, episodes: int, seed: int, path, workers: int = 1, progress: bool = True) -> Path:
    """
    Writes `episodes` successful demonstrations and returns the path. The file depends on (task, episodes, seed) alone:
    attempt i has its own seed, and the first successes in the order of the attempts are kept.
    """
    task = envs.get_task(task)
    if task.name not in EXPERTS:
        raise ValueError(f"no scripted expert for task '{task.name}'; experts: {', '.join(EXPERTS)}")
    if episodes < 1:
        raise ValueError(f"need at least one demonstration, got {episodes}")
    from tqdm import tqdm

    kept, attempts = [], 0
    with tqdm(total=episodes, desc=f"{task.name} demonstrations", disable=not progress) as bar:
        for episode in _attempts(task, seed, workers):
            attempts += 1
            if episode["success"][-1]:
                kept.append(episode)
                bar.update()
            if len(kept) == episodes:
                break
            if attempts >= 20 and len(kept) < 0.2 * attempts:
                raise RuntimeError(f"only {len(kept)} of {attempts} attempts succeeded: is the simulator right?")
    save(path, task, kept[0]["env_args"], kept)
    if progress:
        lengths = [len(episode["action"]) for episode in kept]
        print(f"{path}: {episodes} demonstrations of {attempts} attempts, {np.mean(lengths):.0f} steps on average")
    return Path(path)


def _attempts(task, seed: int, workers: int):
    """Yields attempt 0, 1, 2, ... in order, however many processes make them."""
    jobs = ((task, seed, attempt) for attempt in range(1_000_000))
    if workers <= 1:
        yield from map(_attempt, jobs)
        return
    from itertools import islice
    from multiprocessing import get_context

    ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with get_context("spawn").Pool(workers, **ignore) as pool:
        while batch := list(islice(jobs, 2 * workers)):
            yield from pool.imap(_attempt, batch)


def _attempt(job) -> dict:
    global _env
    task, seed, attempt = job
    if _env is None or _env.task != task:
        _env = envs.make_env(task)
    streams = np.random.default_rng([seed, attempt])
    episode_seed = int(streams.integers(2**31))  # hashed: evaluation seeds, small integers, are other episodes
    expert = EXPERTS[task.name](streams)
    sim = _env.simulator.sim
    obs, _ = _env.reset(seed=episode_seed)
    observations, actions, successes, states, ended = [obs], [], [], [], False
    while not ended:
        states.append(sim.get_state().flatten())
        actions.append(expert(obs))
        obs, _, terminated, truncated, info = _env.step(actions[-1])
        observations.append(obs)
        successes.append(info["success"])
        ended = terminated or truncated
    return {
        "obs": np.array(observations), "action": np.array(actions), "success": np.array(successes),
        "states": np.array(states), "seed": episode_seed, "env_args": _env.env_args,
    }
