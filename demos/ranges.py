"""Do observations have the simulator's units? A file in degrees or millimetres trains to nothing.

    refuse_implausible(path, data, env)        # a few resets: milliseconds

The first observation of a demonstration should look like one after a reset.
Not here: replaying a file's actions (check.py).
"""

from pathlib import Path

import gymnasium
import numpy as np

from demos.columns import DataError

RESETS = 5
FAR = 10.0  # times what resets show, or times 1 where that is more
NEVER = 1e6  # no observation of the tables' tasks is ever as large


def refuse_implausible(path: str | Path, data: dict, env: gymnasium.Env) -> None:
    """Compare a file's observations with a few resets of the simulator.

    data: what demos.load returns. Raises DataError for a task of the table; for an environment of
    one's own, whose states may have any size, it prints a warning.
    """
    problem = implausible(data, env)
    if problem is None:
        return
    sentence = f"{path}: {problem}: recorded in another unit, order or simulator?"
    if env.unwrapped.task.suite == "gymnasium":
        print(f"data: WARNING, {sentence}", flush=True)
    else:
        raise DataError(sentence)


def implausible(data: dict, env: gymnasium.Env) -> str | None:
    """Say which observation the simulator would not show, None if all is well."""
    resets = np.abs([env.reset(seed=seed)[0] for seed in range(RESETS)]).max(0)  # (D,)
    limit = FAR * np.maximum(resets, 1.0)
    typical = np.median(np.abs(data["obs"][starts(data)]), axis=0)  # (D,)
    largest = np.abs(data["obs"]).max(0)
    for index in range(len(limit)):
        if typical[index] > limit[index]:
            return (
                f"observation {index} begins episodes at {typical[index]:.3g} in size, the "
                f"simulator at up to {resets[index]:.3g}"
            )
        if largest[index] > NEVER:
            return f"observation {index} reaches {largest[index]:.3g} in size"
    return None


def starts(data: dict) -> np.ndarray:
    """Return the rows that begin a demonstration."""
    ended = np.asarray(data["terminated"], bool) | np.asarray(data["truncated"], bool)
    return np.append(0, np.flatnonzero(ended[:-1]) + 1)
