"""Episodes of an arm on disk: one robomimic HDF5 file each, complete or not there, and what is read back from them.

    from arms.episodes import Take, layout, load, merge, numbered, reach
    take = Take(obs)                                  # the first observation, (D,)
    take.add(action, requested, obs, intervention)    # one step: what ran, what was asked for, what came of it
    take.drop(obs)                                    # a step was lost: what follows is another piece
    take.save(path, layout("pick-cube", sizes), success=True)
    transitions = load([path, ...], layout("pick-cube", sizes))

A step whose observation was stale is not stored; the episode then consists of several demonstrations, `demo_0`,
`demo_1`, ..., each without a hole, so no chunk ever crosses one. A success ends its episode with reward 1, a failure
(key f) with 0, both terminal; running out of time truncates: what would have come next still counts. A success with
no step since the hole has nothing to carry its reward: the operator is told, the episode is unlabelled, as after a
time-out. Besides robomimic's own keys each has `intervention` (T,) and `requested` (T, A). Needs h5py. Not here: the
control loop (robot.py), the format itself (demos/hdf5.py).

Shapes: T steps, D observation, A action.
"""
import contextlib
import functools
import hashlib
import re
import sys
from pathlib import Path

import numpy as np

from demos import hdf5
from envs import Task
from logbook import UserError, read_args


class Take:
    """One episode being played. `outcome`: how it ended; `steps`, `dropped`, `interventions`: counts of steps."""

    def __init__(self, obs):
        self.pieces, self._outcome = [self._piece(obs)], None
        self.dropped = 0

    @staticmethod
    def _piece(obs):
        return {"obs": [] if obs is None else [obs], "action": [], "requested": [], "intervention": []}

    @property
    def outcome(self):
        return self._outcome

    @outcome.setter
    def outcome(self, label):
        """"unlabelled" instead of a success that no step could carry: whoever counts must not count that one."""
        self._outcome = label
        if label == "success" and not self.pieces[-1]["action"]:
            self._outcome = "unlabelled"
            with contextlib.suppress(OSError, ValueError):    # the terminal may be gone
                print("NOT A SUCCESS: no step has been stored since the last hold, so none can bear the reward; the "
                      "episode has no label", file=sys.stderr)

    def add(self, action, requested, obs, intervention=False):
        """One step: action (A,) as it ran, requested (A,) before the guard, obs (D,) at the end of its period."""
        piece = self.pieces[-1]
        if not piece["obs"]:
            return self.drop(obs)                             # what it began with is not known
        for name, value in (("action", action), ("requested", requested), ("obs", obs), ("intervention", intervention)):
            piece[name].append(np.asarray(value, np.float32))

    def drop(self, obs):
        """A step was lost; obs (D,) is what it ended with, or None if not even that is known."""
        self.dropped += 1
        if not self.pieces[-1]["action"]:
            self.pieces.pop()
        self.pieces.append(self._piece(obs))

    @property
    def steps(self):
        return sum(len(piece["action"]) for piece in self.pieces)

    @property
    def interventions(self):
        return int(sum(np.sum(piece["intervention"]) for piece in self.pieces))

    def save(self, path, task, success, seed=0):
        """Write the episode to `path`, atomically; success is the label of its last step. False if it has no step."""
        pieces, demos = [piece for piece in self.pieces if piece["action"]], []
        for piece in pieces:
            steps = len(piece["action"])
            met = np.zeros(steps, bool)
            met[-1] = success and piece is self.pieces[-1]    # never on a step before a hole
            requested = np.nan_to_num(np.stack(piece["requested"]), posinf=0.0, neginf=0.0)
            demos.append({"obs": np.stack(piece["obs"]).astype(np.float32), "action": np.stack(piece["action"]),
                          "success": met, "failed": self.outcome == "fail" and piece is self.pieces[-1],
                          "seed": seed, "states": np.zeros((steps, 0), np.float32),
                          "extra": {"intervention": np.array(piece["intervention"], bool), "requested": requested}})
        if demos:
            hdf5.save(path, task, {"env_name": task.env_name, "env_kwargs": {}, "outcome": self.outcome}, demos)
        return bool(demos)


def layout(name, sizes, action_dim=7):
    """The columns of an observation, sizes = {key: width}, as the task that demos.hdf5 reads and writes."""
    return Task(name=name, suite="arm", env_name=f"arm-{name}", obs_dim=sum(sizes.values()), action_dim=action_dim,
                episode_limit=0, obs_keys=tuple(sizes), obs_sizes=tuple(sizes.values()), description="")


def numbered(folder):
    """The episode files of a folder in the order they were played."""
    return sorted((path for path in Path(folder).glob("episode_*.hdf5") if _number(path) >= 0), key=_number)


def _number(path):
    found = re.fullmatch(r"episode_(\d+)", path.stem)
    return int(found[1]) if found else -1             # a file of somebody else's


def following(folder):
    """Number and path of the next episode: after the last one, also where one in between was deleted."""
    number = max(map(_number, numbered(folder)), default=-1) + 1
    return number, Path(folder) / f"episode_{number:05d}.hdf5"


def digest(path):
    """A file's content in 64 characters, None where there is no file: a number is used again once its file is gone."""
    try:
        stat = Path(path).stat()
        return _digest(Path(path), stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=None)                    # asked several times a second, of all files of a run
def _digest(path, size, changed):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(paths, task):
    """All steps of these files in order, as demos.hdf5.load gives them. UserError when a file does not fit the task."""
    try:
        parts = [hdf5.load(path, task) for path in paths]
    except (ValueError, OSError) as error:
        raise UserError(f"{error} (this arm's observation is "
                        f"{', '.join(f'{k} {n}' for k, n in zip(task.obs_keys, task.obs_sizes))}: recorded with other "
                        "--observe, cameras, --encoder, --backbone or --instruction?)") from error
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def refuse_loss(run_dir, robot):
    """UserError if a new run, on `robot`, would delete what a real arm has played in this folder."""
    count = len(numbered(Path(run_dir) / "episodes"))
    if robot == "sim":
        with contextlib.suppress(UserError):          # no args.json: whose episodes these are is not known
            robot = read_args(run_dir).get("robot", robot)
    if count and robot != "sim":
        raise UserError(f"{run_dir} holds {count} episodes played on {robot}, which no new run deletes: move the "
                        f"folder away, or go on with --resume {run_dir}")


def outcome(path):
    """How the episode of this file ended."""
    with _whole(path):
        return hdf5.env_args(path).get("outcome")


def length(path):
    """Steps of this file."""
    import h5py
    with _whole(path), h5py.File(path, "r") as file:
        return int(file["data"].attrs["total"])


@contextlib.contextmanager
def _whole(path):
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it, nothing else is lost") from error


def reach(paths):
    """Where the tool has been in these episodes: lowest and highest place (2, 3) metres."""
    import h5py
    places = []
    for path in paths:
        with _whole(path), h5py.File(path, "r") as file:
            places += [file["data"][name]["obs/eef"][:, :3] for name in hdf5.names(file)]
    if not places:
        raise UserError("--box-from-demos: there are no recorded episodes in --data")
    places = np.concatenate(places)
    return np.array([places.min(0), places.max(0)])


def merge(paths, out):
    """One file of many, atomically: what robomimic's own SequenceDataset opens. Returns its path."""
    import h5py
    out, total, keys = Path(out), 0, []
    with hdf5.building(out) as file:
        data = file.create_group("data")
        for path in paths:
            with _whole(path), h5py.File(path, "r") as source:
                for name, value in source["data"].attrs.items():
                    data.attrs[name] = value
                for name in hdf5.names(source):
                    keys.append(f"demo_{len(keys)}")
                    source.copy(source["data"][name], data, keys[-1])
                    total += int(source["data"][name].attrs["num_samples"])
        data.attrs["total"] = total
        file.create_dataset("mask/train", data=np.array(keys, dtype="S"))
    return out
