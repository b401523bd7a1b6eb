"""Episodes of an arm on disk: one robomimic HDF5 file each, either whole or not there at all.

    from arms.episodes import Episode, layout, load
    task = layout("pick-cube", {"joints": 6, "gripper": 1, "eef": 9})
    episode = Episode(obs)                                 # the first observation, (D,)
    episode.add(action, requested, obs, intervention)      # one step and the observation after it
    episode.drop(obs)                                      # a step was lost: a new piece begins
    episode.outcome = "success"
    episode.save(path, task, success=True)
    transitions = load([path, ...], task)                  # arrays for ChunkReplay.extend

A step with a stale observation is not stored. The episode is then a sequence of pieces, `demo_0`,
`demo_1`, ..., each without a hole, so no chunk crosses one. A success ends its episode with reward
1, a failure (key f) with reward 0; both are terminal. Running out of time truncates: what would
have come next still counts. A success needs a step that carries its reward. If none was stored
since the last hole, the operator is told and the episode has no label.

Besides robomimic's own keys each piece has `intervention` (T,) and `requested` (T, A). Reading and
writing an episode of 200 steps takes a few milliseconds. Needs h5py.
Not here: the control loop (rig.py), the file format itself (demos/hdf5.py).

Shapes: T steps, D observation, A action, L tokens of a vision-language model and W their width.
"""

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demos import hdf5
from demos.columns import Allowance, DataError, locked
from envs import Task
from logbook import UserError, read_args


@dataclass(frozen=True)
class Layout(Task):
    """The columns of an arm's observation, as the task that demos/hdf5.py reads and writes.

    token_shape: (L, W) of the last column, where it holds the hidden states of a vision-language
    model; else None.
    """

    token_shape: tuple[int, int] | None = None


def layout(name: str, sizes: dict[str, int | tuple[int, int]], action_dim: int = 7) -> Layout:
    """Describe observations with columns of these widths.

    (L, W) instead of a width marks the hidden states of a vision-language model, flat in the file.
    """
    shapes = [size for size in sizes.values() if isinstance(size, tuple)]
    widths = tuple(int(np.prod(size)) for size in sizes.values())
    return Layout(
        name=name,
        suite="arm",
        env_name=f"arm-{name}",
        obs_dim=sum(widths),
        action_dim=action_dim,
        episode_limit=0,
        obs_keys=tuple(sizes),
        obs_sizes=widths,
        description="",
        token_shape=shapes[0] if shapes else None,
    )


# ---- one episode being played


class Episode:
    """One episode while it is played.

    outcome: how it ended, None before that. dropped: steps that were lost. pieces: stretches
    without a hole.
    """

    def __init__(self, obs: np.ndarray | None):
        self.pieces = [new_piece(obs)]
        self.dropped = 0
        self._outcome = None

    @property
    def outcome(self) -> str | None:
        return self._outcome

    @outcome.setter
    def outcome(self, label: str) -> None:
        """Set the label; a success that no step can carry becomes "unlabelled"."""
        self._outcome = label
        if label == "success" and not self.pieces[-1]["action"]:
            self._outcome = "unlabelled"
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                print(
                    "NOT A SUCCESS: no step was stored since the last hold, so none can carry the "
                    "reward; the episode has no label",
                    file=sys.stderr,
                )

    def add(
        self,
        action: np.ndarray,
        requested: np.ndarray,
        obs: np.ndarray,
        intervention: bool = False,
    ) -> None:
        """Store one step.

        action (A,) as it ran, requested (A,) before the guard, obs (D,) at the end of the period.
        """
        piece = self.pieces[-1]
        if not piece["obs"]:
            self.drop(obs)  # the observation before this step is unknown
            return
        piece["action"].append(np.asarray(action, np.float32))
        piece["requested"].append(np.asarray(requested, np.float32))
        piece["obs"].append(np.asarray(obs, np.float32))
        piece["intervention"].append(bool(intervention))

    def drop(self, obs: np.ndarray | None) -> None:
        """Count a lost step; a new piece begins at obs (D,), None if that is not known either."""
        self.dropped += 1
        if not self.pieces[-1]["action"]:
            self.pieces.pop()
        self.pieces.append(new_piece(obs))

    @property
    def steps(self) -> int:
        return sum(len(piece["action"]) for piece in self.pieces)

    @property
    def interventions(self) -> int:
        """Steps that the operator led."""
        return sum(sum(piece["intervention"]) for piece in self.pieces)

    def save(self, path: str | Path, task: Layout, success: bool, seed: int = 0) -> bool:
        """Write the episode atomically; `success` labels its last step.

        Returns False, and writes nothing, if there is no step.
        """
        demonstrations = []
        for piece in self.pieces:
            if piece["action"]:
                is_last = piece is self.pieces[-1]  # a label never goes to a step before a hole
                failed = is_last and self.outcome == "fail"
                demonstrations.append(as_demonstration(piece, is_last and success, failed, seed))
        if not demonstrations:
            return False
        settings = {"env_name": task.env_name, "env_kwargs": {}, "outcome": self.outcome}
        if task.token_shape is not None:
            settings["token_shape"] = task.token_shape
        hdf5.save(path, task, settings, demonstrations)
        return True


def new_piece(obs: np.ndarray | None) -> dict[str, list]:
    """Begin a stretch of steps at this observation; None if it is unknown."""
    first = [] if obs is None else [obs]
    return {"obs": first, "action": [], "requested": [], "intervention": []}


def as_demonstration(piece: dict[str, list], success: bool, failed: bool, seed: int) -> dict:
    """Turn a piece of at least one step into what demos.hdf5.save writes."""
    steps = len(piece["action"])
    labels = np.zeros(steps, bool)
    labels[-1] = success
    requested = np.nan_to_num(np.stack(piece["requested"]), posinf=0.0, neginf=0.0)
    return {
        "obs": np.stack(piece["obs"]).astype(np.float32),
        "action": np.stack(piece["action"]),
        "success": labels,
        "failed": failed,
        "seed": seed,
        "states": np.zeros((steps, 0), np.float32),
        "extra": {"intervention": np.array(piece["intervention"], bool), "requested": requested},
    }


# ---- the files of a folder


def numbered(folder: str | Path) -> list[Path]:
    """List the episode files of a folder in the order they were played."""
    files = [path for path in Path(folder).glob("episode_*.hdf5") if number_of(path) >= 0]
    return sorted(files, key=number_of)


def number_of(path: Path) -> int:
    """Read the number in a file's name; -1 for somebody else's file."""
    found = re.fullmatch(r"episode_(\d+)", path.stem)
    return int(found[1]) if found else -1


def next_file(folder: str | Path) -> tuple[int, Path]:
    """Number and path of the next episode: after the last, even if earlier ones were deleted."""
    number = max(map(number_of, numbered(folder)), default=-1) + 1
    return number, Path(folder) / f"episode_{number:05d}.hdf5"


def digest(path: str | Path) -> str | None:
    """Hash a file's content; None if there is no file.

    Names do not identify episodes: a number is used again once its file is gone.
    """
    try:
        stat = Path(path).stat()
        return _digest(Path(path), stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        return None


@functools.cache  # the learner asks several times a second, for all files of a run
def _digest(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refuse_loss(run_dir: str | Path, robot: str) -> None:
    """Raise UserError if a new run, on `robot`, would delete episodes of a real arm."""
    count = len(numbered(Path(run_dir) / "episodes"))
    if robot == "sim":
        with contextlib.suppress(
            UserError
        ):  # without args.json nobody knows whose episodes these are
            robot = read_args(run_dir).get("robot", robot)
    if count and robot != "sim":
        raise UserError(
            f"{run_dir} holds {count} episodes played on {robot}, which no new run deletes: "
            f"move the folder away, or go on with --resume {run_dir}"
        )


# ---- what the files hold


def load(paths: Sequence[str | Path], task: Layout) -> dict[str, np.ndarray]:
    """Read all steps of these files in order, as demos.hdf5.load does.

    Raises UserError for a file that does not fit the task.
    """
    try:
        parts = [hdf5.load(path, task) for path in paths]
    except (ValueError, OSError) as error:
        columns = ", ".join(f"{key} {size}" for key, size in zip(task.obs_keys, task.obs_sizes))
        raise UserError(
            f"{error} (this arm's observation is {columns}: recorded with other --observe, "
            "cameras, --encoder, --backbone or --instruction?)"
        ) from error
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open an episode: the file, and the groups of its demonstrations by name.

    Whatever a damaged file raises meanwhile becomes a UserError of one sentence with its name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no episode {path}")
    try:
        with hdf5.opened(path) as file:
            names = hdf5.names(file)
            yield file, {name: hdf5.demonstration(path, file, name) for name in names}
    except (ValueError, OSError) as error:
        if isinstance(error.__cause__, OSError) and is_busy(error.__cause__):
            raise UserError(str(error)) from error  # the file itself is whole
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise UserError(f"{path} is damaged ({reason}): remove it, nothing else is lost") from error


def is_busy(error: OSError) -> bool:
    """Tell whether a file may not be read now, because of a lock or its permissions."""
    return isinstance(error, PermissionError) or locked(error)


def outcome(path: str | Path) -> str | None:
    """Read how the episode of this file ended."""
    with opened(path) as (file, _):
        label = hdf5.described_world(Path(path), file["data"]).get("outcome")
        if label is not None and not isinstance(label, str):
            raise DataError(f"its outcome is {label!r:.40}")
        return label


def length(path: str | Path) -> int:
    """Count the steps of this file, by the shapes of its actions."""
    with opened(path) as (_, groups):
        return sum(steps_of(path, name, group) for name, group in groups.items())


def steps_of(path: str | Path, name: str, group: Any) -> int:
    """Count the steps of a demonstration without reading them."""
    import h5py

    actions = hdf5.member(group, "actions")
    if not isinstance(actions, h5py.Dataset) or not actions.shape:
        raise DataError(f"data/{name} has no actions")
    Allowance(Path(path)).take(f"data/{name}/actions", actions.shape, actions.dtype.itemsize)
    return int(actions.shape[0])


def workspace_of(paths: Sequence[str | Path]) -> np.ndarray:
    """Find the lowest and highest place of the tool in these episodes, (2, 3) in metres."""
    places = []
    for path in paths:
        with opened(path) as (_, groups):
            allowance = Allowance(Path(path))
            for name, group in groups.items():
                pose = hdf5.column(f"data/{name}", group, "obs/eef", 9, allowance)
                places.append(pose[:, :3])
    if not places:
        raise UserError("--box-from-demos: there are no recorded episodes in --data")
    places = np.concatenate(places)
    return np.array([places.min(axis=0), places.max(axis=0)])


def merge(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write one file of many, atomically; robomimic's own SequenceDataset opens it."""
    out = Path(out)
    total = 0
    names = []
    with hdf5.building(out) as file:
        data = file.create_group("data")
        for path in paths:
            with opened(path) as (source, groups):
                copy_attributes(source["data"], data, ("env_args", "task", "mujoco_version"))
                allowance = Allowance(Path(path))
                for name, group in groups.items():
                    names.append(f"demo_{len(names)}")
                    target = data.create_group(names[-1])
                    copy_columns(f"data/{name}", group, target, allowance)
                    copy_attributes(group, target, ("failed", "seed"))
                    target.attrs["num_samples"] = steps_of(path, name, group)
                    total += target.attrs["num_samples"]
        data.attrs["total"] = total
        file.create_dataset("mask/train", data=np.array(names, dtype="S"))
    return out


def copy_attributes(source: Any, target: Any, names: Sequence[str]) -> None:
    for name in names:
        if name in source.attrs:
            target.attrs[name] = source.attrs[name]


def copy_columns(where: str, source: Any, target: Any, allowance: Allowance) -> None:
    """Copy a demonstration's arrays of numbers, each checked before it is read.

    HDF5's own copy of a whole group crashes on damaged ones.
    """
    import h5py

    keys = []
    for key in source:
        inside = hdf5.member(source, key)
        keys += [f"{key}/{part}" for part in inside] if isinstance(inside, h5py.Group) else [key]
    for key in keys:
        column = hdf5.member(source, key)
        if not isinstance(column, h5py.Dataset) or column.dtype.kind not in "bifu":
            raise DataError(f"{where}/{key} is no array of numbers")
        allowance.take(f"{where}/{key}", column.shape or (), column.dtype.itemsize)
        target[key] = column[()]
