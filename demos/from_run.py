"""Writes the episodes that a run played, so that the next run can start from what this one learnt.

    python -m demos --from-run runs/lift-poco-s0 --out more.npz          # or more.hdf5
    export("runs/lift-poco-s0", "more.npz")

The transitions are those in the replay of RUN/last.pt, oldest first, without the demonstrations the
run began with. An episode that was still being played is cut where it was.
Not here: an arm's episodes, which are files already (arms/episodes.py).
"""

from pathlib import Path

import numpy as np

import envs
from demos import hdf5, npz
from demos.columns import DataError, environment_units
from logbook import load_checkpoint, read_args


def export(run: str | Path, out: str | Path) -> Path:
    """Write the online transitions of a run as npz, or HDF5 if `out` ends so.

    Returns the path. Raises DataError where the run holds none of a task's own observations, and
    logbook's UserError where the folder is not a run.
    """
    out = Path(out)
    if out.suffix not in (".npz", ".hdf5", ".h5"):
        raise DataError(f"{out}: name a file that ends in .npz or .hdf5")
    steps, task = transitions(run)
    if out.suffix == ".npz":
        return npz.save(out, as_npz(steps, task))
    env = envs.make_env(task)
    try:
        world = vars(env.unwrapped).get("env_args") or plain_world(task)
    finally:
        env.close()
    return hdf5.save(out, task, world, as_episodes(steps, task))


def transitions(run: str | Path) -> tuple[dict[str, np.ndarray], envs.Task]:
    """Return the online transitions of a run, oldest first, and its task."""
    args = read_args(run)
    if (Path(run) / "episodes").is_dir():
        raise DataError(f"{run} is a run of an arm: its episodes are the files in {run}/episodes")
    task = envs.get_task(args["task"])
    state = load_checkpoint(run)
    replay = state.get("world", {}).get("replay")
    if replay is None:
        raise DataError(f"{run} keeps no transitions: on-policy methods and stage I have no replay")
    rows = {name: np.asarray(values) for name, values in replay["data"].items()}
    if rows["obs"].shape[1] != task.obs_dim:
        raise DataError(
            f"{run} holds features of a backbone, not the observations of {task.name}: demonstrate "
            "with the states"
        )
    ring = replay["capacity"] - replay["demos"]
    order = np.arange(replay["online"])
    if replay["online"] == ring:  # full: the oldest stands at the pointer
        order = (order + replay["pointer"]) % ring
    if not len(order):
        raise DataError(f"{run} has played no step yet")
    steps = {name: values[replay["demos"] + order] for name, values in rows.items()}
    steps["reward"] = steps["reward"] - np.float32(args.get("reward_offset", 0.0))
    steps["terminated"] = steps["terminated"] > 0
    steps["truncated"] = steps["truncated"] > 0
    steps["truncated"][-1] = not steps["terminated"][-1]
    return steps, task


def as_npz(steps: dict[str, np.ndarray], task: envs.Task) -> dict[str, np.ndarray]:
    """Name the columns as D4RL does."""
    return {
        "observations": steps["obs"],
        "actions": environment_units(steps["action"], task),
        "rewards": steps["reward"],
        "next_observations": steps["next_obs"],
        "terminals": steps["terminated"],
        "timeouts": steps["truncated"],
    }


def as_episodes(steps: dict[str, np.ndarray], task: envs.Task) -> list[dict]:
    """Divide the steps into the episodes that hdf5.save writes."""
    ends = np.flatnonzero(steps["terminated"] | steps["truncated"]) + 1
    episodes = []
    for first, stop in zip([0, *ends[:-1]], ends):
        part = {name: values[first:stop] for name, values in steps.items()}
        episodes.append(
            {
                "obs": part["obs"],
                "next_obs": part["next_obs"],
                "action": environment_units(part["action"], task),
                "reward": part["reward"],
                "success": part["terminated"],
            }
        )
    return episodes


def plain_world(task: envs.Task) -> dict:
    """Describe a world that only its name and version define."""
    return {"env_name": task.env_name, "type": 2, "env_kwargs": {}}
