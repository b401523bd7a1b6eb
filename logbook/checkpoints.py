"""Files of tensors that are never half written and never silently damaged.

    from logbook import load_checkpoint, load_tensors, replacing, save_checkpoint

    save_checkpoint("last.pt", {"step": 1000, "policy": policy.state_dict()})
    state = load_checkpoint("last.pt")
    encoder.load_state_dict(load_tensors("encoder.pt"))

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, with a version. torch.save
writes a zip archive; torch.load ignores its checksums, so they are verified here. No code in a file
is ever executed.
Not here: what a run saves and when (train_online.py), optimiser states (optimizers.py).
"""

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .errors import UserError, reason

VERSION = 2  # of a checkpoint: raise it when old ones are of no use


@contextlib.contextmanager
def replacing(path: str | Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` once it is complete and on the disk.

    On failure `path` stays as it was. shared: several processes may write it at once, so each has
    a temporary file of its own.
    """
    path = Path(path)
    # One fixed name: the next save overwrites what a killed process left, so nothing piles up.
    temporary = path.with_name(f".{path.name}.tmp")
    if shared:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- saving --------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` atomically: at every instant `path` is the old checkpoint or the new one.

    Raises UserError where the disk refuses it, TypeError for what could not be loaded again.
    """
    path = Path(path)
    state = {**_plain(state, "state"), "version": VERSION}
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is intact" if path.exists() else "no checkpoint was written"
        raise UserError(f"cannot save {path}: {reason(error)}; {kept}") from error


def _plain(value: Any, where: str) -> Any:
    """Return value as torch.load(weights_only=True) accepts it. Raises TypeError naming `where`."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        # torch.save writes the whole storage under a view: a slice would cost the whole buffer
        is_slice = value.untyped_storage().nbytes() > value.nbytes
        return value.clone() if is_slice else value
    if isinstance(value, np.ndarray):
        return torch.tensor(value)  # comes back as a tensor
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {
            _plain(name, where): _plain(inner, f"{where}[{name!r}]")
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        values = [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
        return tuple(values) if isinstance(value, tuple) else values
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}: a checkpoint holds only tensors, numbers, "
        "strings, lists and dicts"
    )


def refuse_nonfinite(state: Any, where: str, advice: str) -> None:
    """Raise a UserError that names the first tensor in nested dicts with a non-finite value."""
    if isinstance(state, dict):
        for name, value in state.items():
            refuse_nonfinite(value, f"{where}.{name}", advice)
    elif isinstance(state, torch.Tensor) and not torch.isfinite(state).all():
        raise UserError(f"{where} became non-finite {advice}")


# ---- loading -------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, or a run folder's last.pt.

    States of generators belong on the CPU: load there, load_state_dict moves the rest.
    Raises UserError where the file is missing, damaged, foreign or of another version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    state = _read(path, device, "checkpoint")
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int:  # True is an int, too
        raise UserError(f"{path} is not a POCO checkpoint: it has no version field")
    if version != VERSION:
        raise UserError(
            f"{path} is a checkpoint of version {version}, this code reads version {VERSION}"
        )
    return state


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read a file of weights, a module's state_dict, as written by torch.save.

    Raises UserError where the file is missing, damaged or anything else.
    """
    state = _read(Path(path), device, "file of weights")
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no state_dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path} holds no state_dict of tensors: {name!r:.80} is none")
        if not torch.isfinite(value).all():
            raise UserError(f"{path} holds a non-finite number in {name}")
    return dict(state)


def _read(path: Path, device: str | torch.device, kind: str) -> Any:
    """Verify and read what torch.save wrote. Raises UserError; `kind` names the file in it."""
    torch.empty(0, device=device)  # a missing GPU is not the file's fault
    try:
        with open(path, "rb") as file:
            _verify(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {kind} {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"there is not enough memory to load {path} ({device})") from error
    except Exception as error:  # foreign bytes make the readers fail in any way at all
        raise UserError(
            f"{path} is damaged, or no {kind} written by torch.save; nothing in it was executed"
        ) from error


def _verify(file: IO[bytes]) -> None:
    """Compare the archive with its checksums. Raises ValueError or an error of zipfile."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        # What torch.save writes is not compressed: no small file can claim a big one's memory.
        if sum(record.file_size for record in archive.infolist()) > size:
            raise ValueError("the archive claims more bytes than the file has")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} does not match its checksum")
