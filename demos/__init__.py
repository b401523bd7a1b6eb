"""
Where demonstrations come from: files you have, downloads, scripted experts and OGBench's own oracles.

    python -m demos --task lift --episodes 20 --seed 0 --out lift.hdf5              # make some: 20 s on one core
    python -m demos --check lift --data lift.hdf5                                   # does the simulator agree?
    data = demos.load("lift.hdf5", "lift")                                          # ready for the replay
    path = demos.obtain("can", "paper")                                             # found, downloaded or made
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np

import envs
from demos import download, hdf5
from demos.can import CanDemonstrator
from demos.hdf5 import save  # noqa: F401 - demos.save
from demos.lift import LiftDemonstrator
from demos.square import SquareDemonstrator

EXPERTS = {"lift": LiftDemonstrator, "can": CanDemonstrator, "square": SquareDemonstrator}
_env = None  # one per process


# ------------------------------------------------------------------------------------- which file, what is in it
def made(task, episodes: int, seed: int, directed: bool = False) -> Path:
    """Where demonstrations that are made here are kept and found again."""
    task = envs.get_task(task)
    kind, suffix = ("scripted", "hdf5") if task.suite == "robosuite" else ("directed" if directed else "play", "npz")
    return Path("data") / f"{task.name}-{kind}-{episodes}-s{seed}.{suffix}"


def obtain(task, preset: str, data=None, episodes: int = 20, seed: int = 0, workers: int = 1) -> Path:
    """
    The file to train on; the choice is printed. `data` names it. Otherwise the cpu preset makes its own, the same
    everywhere; the paper preset looks for the public file, then downloads it, then makes `episodes` of its own.
    """
    task = envs.get_task(task)
    directed = preset == "cpu" and task.cpu.get("directed", False)
    own = made(task, episodes, seed, directed)
    if data is not None and (Path(data) != own or own.is_file()):  # its own file is made again if it went missing
        return Path(data).expanduser()
    if preset == "paper" and data is None:
        for path in download.places(task):
            if path.is_file():
                return _say(path, "found")
        print(f"data: no {download.places(task)[0]}, downloading it", flush=True)
        try:
            return _say(download.fetch(download.mirrors(task), download.places(task)[0]), "downloaded")
        except (download.DownloadError, OSError) as error:
            print(f"data: {error}. Making {episodes} episodes instead", flush=True)
    if own.is_file():
        return _say(own, "made earlier")
    collect(task, episodes, seed, own, workers, directed=directed)
    return _say(own, "made just now")


def _say(path: Path, how: str) -> Path:
    print(f"data: {path}, {how}; --data FILE takes another", flush=True)
    return path


def load(path, task=None, episodes: int | None = None) -> dict[str, np.ndarray]:
    """
    All steps of a file (or of its first `episodes` demonstrations), in order: obs (N, D), action (N, A), reward (N,),
    next_obs (N, D), terminated and truncated (N,). `task` may be left out where the file names it (HDF5).
    """
    if _is_ogbench(path, task):
        from demos import ogbench

        return ogbench.load(path, task, episodes)
    return hdf5.load(path, task, episodes)


def env_args(path, task=None) -> dict | None:
    """The simulator's arguments stored in a file, for envs.make_env(task, seed, env_args=...); None if it has none."""
    return None if _is_ogbench(path, task) else hdf5.env_args(Path(path).expanduser())


def _is_ogbench(path, task=None) -> bool:
    """By the task, or by the file's name where no task is given."""
    if task is not None:
        return envs.get_task(task).suite == "ogbench"
    return Path(path).suffix == ".npz"


# --------------------------------------------------------------------------------------------------- making them
def collect(task, episodes: int, seed: int, path, workers=1, progress: bool = True, directed: bool = False) -> Path:
    """
    Writes `episodes` successful demonstrations and returns the path. The file depends on (task, episodes, seed) alone:
    attempt i has its own seed, and the first successes in the order of the attempts are kept. `directed`: ogbench.py.
    """
    task = envs.get_task(task)
    if episodes < 1:
        raise ValueError(f"need at least one demonstration, got {episodes}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)  # a wrong place is refused now, not after the work
    if _is_ogbench(path, task):
        from demos import ogbench

        return ogbench.collect(task, episodes, seed, path, workers, progress, directed)
    if task.name not in EXPERTS:
        raise ValueError(f"no scripted expert for task '{task.name}'; experts: {', '.join(EXPERTS)}")
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
        print(f"{path}: {episodes} demonstrations of {attempts} attempts, {sum(lengths):,} steps, "
              f"{min(lengths)} to {max(lengths)} long, {np.mean(lengths):.0f} on average")
    return Path(path)


def _attempts(task, seed: int, workers: int):
    """Yields attempt 0, 1, 2, ... in order, however many processes make them."""
    return spread(_attempt, ((task, seed, attempt) for attempt in range(1_000_000)), workers)


def spread(function, jobs, workers: int):
    """Yields function(job) in the order of the jobs, made here or in so many processes. RuntimeError if one dies."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    from concurrent.futures import ProcessPoolExecutor, process
    from itertools import islice

    jobs = iter(jobs)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_worker) as pool:
        try:
            pending = [pool.submit(function, job) for job in islice(jobs, 2 * workers)]
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(function, job) for job in islice(jobs, 1)]
        except process.BrokenProcessPool as error:
            raise RuntimeError("a process that made demonstrations died: out of memory? Try --workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _worker() -> None:
    """Ctrl-C is its parent's affair, with which it ends, however that one does."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


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
