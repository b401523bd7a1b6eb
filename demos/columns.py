"""What every reader of demonstrations checks before and after it reads, and what the steps become.

    from demos.columns import Allowance, DataError, check_layout, finite, label, within_limits

A file is refused in one sentence that starts with its name. Names, types and shapes are checked
before anything is read, so that a damaged or hostile file cannot claim more memory than its size
justifies. Not here: the formats themselves (hdf5.py, npz.py, minari_data.py).

Shapes: T steps of a demonstration, N steps of a file, D observation, A action.
"""

import contextlib
import errno
import math
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from envs import TASKS, Task
from simulators.gym_env import from_unit

ROUNDING = 1e-3  # an action may exceed its limits by this much
SMALL = 64 << 20  # bytes that any file may unpack to
EXPANSION = 50  # beyond that, how many times its own size
SPARSE = ("robosuite", "arm")  # suites whose reward is paid for success alone


class DataError(ValueError):
    """Demonstrations that cannot be used. The message names the file and what to do."""


def existing(path: str | Path, task: str | Task | None = None) -> Path:
    """Return the path of a file that is there.

    Raises DataError for a folder or an address, FileNotFoundError with the command that makes one.
    """
    text = str(path)
    if "://" in text or text.startswith(("http:/", "https:/", "hf:/", "s3:/")):
        raise DataError(f"{text} is an address: download the file and name it with --data FILE")
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(one.name for one in path.iterdir() if one.suffix in (".hdf5", ".h5", ".npz"))
        inside = f", for instance {path / files[0]}" if files else ""
        raise DataError(f"{path} is a folder: name a file in it{inside}")
    if not path.is_file():
        name = task.name if isinstance(task, Task) else task
        hint = f"; make some: {make_command(name, path)}" if name in TASKS else ""
        raise FileNotFoundError(f"no demonstrations at {path}{hint}")
    return path


def make_command(task: str, path: str | Path) -> str:
    """Return the command that makes demonstrations of a task of the table."""
    return f"python -m demos --task {task} --out {shlex.quote(str(path))}"


@contextlib.contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file raises while it is read into one sentence with its name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # damaged files raise almost anything, MemoryError included
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if locked(error):
            raise DataError(
                f"{path} is in use by another program, or its file system cannot lock files "
                f"({detail}): close that program, or set HDF5_USE_FILE_LOCKING=FALSE"
            ) from error
        if isinstance(error, PermissionError):
            raise DataError(f"{path} cannot be read: permission denied") from error
        raise DataError(
            f"{path}: not {kind}, truncated or damaged perhaps ({detail}); make or fetch it again"
        ) from error


def locked(error: Exception) -> bool:
    """Tell whether a file could not be opened because of a lock."""
    numbers = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOLCK)
    is_lock = isinstance(error, OSError) and error.errno in numbers
    return is_lock or "unable to lock file" in str(error)


class Allowance:
    """The bytes a file may still unpack to: what its size justifies and what memory is free."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        self.limit = SMALL + EXPANSION * self.size
        self.free = free_memory()
        self.used = 0

    def take(self, where: str, shape: tuple[int, ...], itemsize: int) -> None:
        """Claim an array of this shape. Raises DataError beyond the allowance."""
        self.check(where, shape, itemsize)
        self.used += math.prod(shape) * max(itemsize, 4)  # numbers become float32

    def check(self, where: str, shape: tuple[int, ...], itemsize: int) -> None:
        """Raise DataError if an array of this shape would go beyond the allowance."""
        needed = self.used + math.prod(shape) * max(itemsize, 4)
        if needed > self.limit:
            raise DataError(
                f"{where} claims {shape}, {needed / 1e6:,.0f} MB in all, more than a file of "
                f"{self.size / 1e3:,.0f} kB can hold: it is damaged"
            )
        if needed > self.free:
            raise DataError(
                f"{self.path} needs more than {needed / 1e9:.1f} GB of memory, "
                f"{self.free / 1e9:.1f} GB are free: take fewer demonstrations (--demo-episodes)"
            )


def free_memory() -> float:
    """Return the bytes of memory that are free on Linux, infinity elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(sizes[0]) if sizes else math.inf


def check_layout(where: str, shape: tuple[int, ...] | None, dtype, width: int | None) -> None:
    """Check an array before it is read: numbers, (T,), or (T, width)."""
    if shape is None or dtype.kind not in "bifu":
        raise DataError(f"{where} is not an array of numbers")
    expected = shape[:1] if width is None else (*shape[:1], width)
    if len(shape) < 1 or shape != expected:
        wanted = "(T,)" if width is None else f"(T, {width})"
        raise DataError(f"{where} must be {wanted}, found {shape}")


def finite(where: str, array: np.ndarray) -> np.ndarray:
    """Return the array as float32. Raises DataError if a value is not finite then."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise DataError(f"{where} has non-finite values")
    return array


def same_length(where: str, columns: dict[str, np.ndarray], least: int = 1) -> None:
    """Raise DataError unless all columns have the same length of at least `least`."""
    lengths = sorted({len(column) for column in columns.values()})
    if len(lengths) != 1 or lengths[0] < least:
        raise DataError(
            f"{where}: all keys must have the same positive length, at least {least}, "
            f"found {lengths}"
        )


def within_limits(where: str, actions: np.ndarray, clip: bool = False) -> np.ndarray:
    """Return the actions in [-1, 1].

    Raises DataError where values lie outside by more than rounding, unless `clip` asks for them to
    be cut: the environment would execute another action than the file says.
    """
    outside = np.abs(actions) > 1.0 + ROUNDING
    if outside.any():
        share = f"{100 * outside.mean():.2g} % of the action values lie outside [-1, 1]"
        most = float(np.abs(actions).max())
        if not clip:
            raise DataError(
                f"{where}: {share}, up to {most:.3g}; the environment would not execute them so: "
                "scale them to [-1, 1], or have them cut with --clip-actions"
            )
    return np.clip(actions, -1.0, 1.0).astype(np.float32)


def environment_units(actions: np.ndarray, task: Task) -> np.ndarray:
    """Turn actions (N, A) in [-1, 1] into the environment's own units, as files hold them."""
    if not task.action_low:
        return actions
    low = np.array(task.action_low)
    high = np.array(task.action_high)
    return from_unit(actions, low, high).astype(np.float32)


def label(steps: dict[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """Turn the raw steps of one demonstration into what the environment would have returned.

    steps: obs (T, D), action (T, A), reward (T,) as recorded, next_obs (T, D), terminated (T,).
    Where success alone is paid, the first success ends the demonstration and the reward is the
    task's; elsewhere rewards and ends stay as recorded. The last step is truncated unless terminal.
    """
    if task.suite in SPARSE:
        success = steps["reward"] > 0
        length = int(success.argmax()) + 1 if success.any() else len(success)
        steps = {name: column[:length] for name, column in steps.items()}
        success = success[:length]
        steps["terminated"] = success | steps["terminated"]
        steps["reward"] = np.array([task.reward(bool(one)) for one in success], np.float32)
    truncated = np.zeros(len(steps["reward"]), bool)
    truncated[-1] = not steps["terminated"][-1]
    return steps | {"truncated": truncated}


def joined(path: str | Path, episodes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put labelled demonstrations one after the other. Raises DataError if there is none."""
    if not episodes:
        raise DataError(f"{path}: holds no demonstration")
    return {name: np.concatenate([one[name] for one in episodes]) for name in episodes[0]}


def first_episodes(path: str | Path, count: int, wanted: int | None, noun: str) -> int:
    """Return how many demonstrations to read. Raises DataError if the file holds fewer."""
    if wanted is None:
        return count
    if not 0 < wanted <= count:
        raise DataError(
            f"{path}: holds {count} {noun}, {wanted} were asked for: "
            f"--demo-episodes {count} takes all"
        )
    return wanted
