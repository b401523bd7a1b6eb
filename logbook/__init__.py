"""A run's folder: arguments, CSV files, TensorBoard, atomic checkpoints, exact resume, the learning curve.

    from logbook import Logbook, UserError, cli, curve, load_checkpoint, save_checkpoint       # this file, and others
    from logbook import Clock, Interrupt, Progress                                             # console.py
    from logbook import check_end, must_fit, usable_device, user_errors                       # errors.py
    from logbook import Report                                                                 # report.py

    book = Logbook.create("runs/lift-poco-s0", args, columns=["success", "time/env"])
    book.log(1000, success=0.6, **{"time/env": 3.2})
    book.save("last.pt", {"step": 1000, "policy": policy.state_dict()})

    book = Logbook.resume("runs/lift-poco-s0", columns=["success", "time/env"])      # the next day
    state = book.load("last.pt")
    book.rewind(state["step"])

Log and evaluate first, then save: what a kill interrupts in between is rewound and done again, never doubled.
`python -m logbook runs/lift-poco-s0` redraws its curve.png.
Imports no project file. Not here: seeding and generators (each script owns its own), and what is worth logging.
"""
import contextlib
import csv
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from .console import Clock, Interrupt, Progress       # noqa: F401, offered here so that one import is enough
from .errors import (                                 # noqa: F401
    UserError, check_end, check_kept, check_numbers, cli, must_fit, reason, usable_device, user_errors)
from .intervals import wilson                         # noqa: F401
from .report import Report                            # noqa: F401

VERSION = 2                                           # of a checkpoint: raise it when old ones are no use
EVAL_COLUMNS = ["step", "acting", "seed", "success", "length", "return"]
RUN_FILES = ["args.json", "progress.csv", "eval.csv", "last.pt", "best.pt", "curve.png"]

fitting, plainly = must_fit, user_errors             # names of files that are still to be rewritten


@contextlib.contextmanager
def replacing(path):
    """A file that takes the place of `path` once it is complete and on the disk; on failure `path` stays."""
    path = Path(path)
    # one fixed name: what a killed process leaves behind is overwritten by the next save and never piles up
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)                          # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _plain(value, where="state"):
    """Only what torch.load(weights_only=True) accepts; the rest is refused now rather than at load time."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        # torch.save writes the whole storage under a view: a slice of a big buffer would cost the big buffer
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, np.ndarray):
        return torch.tensor(value)                    # comes back as a tensor
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain(k, where): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        values = [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(values) if isinstance(value, tuple) else values
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds only tensors, numbers, "
                    "strings, lists and dicts")


def save_checkpoint(path, state):
    """Write `state` (a dict) atomically: at every instant `path` is the old checkpoint or the new one."""
    path, state = Path(path), {**_plain(state), "version": VERSION}
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is intact" if path.exists() else "no checkpoint was written"
        raise UserError(f"cannot save {path}: {reason(error)}; {kept}") from error


def refuse_nonfinite(state, where, advice):
    """Raise a UserError that names the first tensor of nested dicts with a non-finite value: not to be saved."""
    if isinstance(state, dict):
        for name, value in state.items():
            refuse_nonfinite(value, f"{where}.{name}", advice)
    elif isinstance(state, torch.Tensor) and state.is_floating_point() and not torch.isfinite(state).all():
        raise UserError(f"{where} became non-finite {advice}")


def load_checkpoint(path, device="cpu"):
    """A checkpoint, or a run folder's last.pt. Generator states belong on the CPU: load_state_dict moves the rest."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else path
    torch.empty(0, device=device)                     # a missing GPU is not the file's fault
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:                        # foreign bytes make the reader fail in any way at all
        raise UserError(f"{path} is truncated or no POCO checkpoint; nothing in it was executed") from error
    if not isinstance(state, dict) or not isinstance(state.get("version"), int):
        raise UserError(f"{path} is not a POCO checkpoint: it has no version field")
    if state["version"] != VERSION:
        raise UserError(f"{path} is a checkpoint of version {state['version']}, "
                        f"this code reads version {VERSION}")
    return state


def keep_rate(optimizer):
    """What is loaded into this optimiser leaves its learning rate and what its device needs alone. Returns it."""
    def restored(optimizer, state):
        own = [{name: group[name] for name in ("lr", "fused", "capturable")} for group in optimizer.param_groups]
        return state | {"param_groups": [saved | kept for saved, kept in zip(state["param_groups"], own)]}
    optimizer.register_load_state_dict_pre_hook(restored)
    return optimizer


def noise_state(device):
    """Where torch's global random numbers are, on the processor and on the device that draws them, for a checkpoint."""
    gpu = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *gpu]


def restore_noise(state, device):
    """Go on there; numbers that another kind of device drew cannot be continued and start anew."""
    processor, *gpu = [state] if torch.is_tensor(state) else state                # a tensor: older checkpoints
    torch.set_rng_state(processor)
    if gpu and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(gpu[0])


def _versions():
    """What a reader needs to repeat the run; whatever is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "mujoco", "robosuite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                                         timeout=10, check=True).stdout.strip()
    return found


class Logbook:
    """One run's folder. Made by `Logbook.create` or `Logbook.resume`, never directly."""

    def __init__(self, folder, args, columns):
        self.folder, self.args = Path(folder), args
        self.columns = ["step"] + [name for name in columns if name != "step"]
        self._events, self._purge_step = None, None

    @classmethod
    def create(cls, folder, args, columns, overwrite=False):
        """Start a run. A folder that already holds a checkpoint is refused unless `overwrite`."""
        folder, args = Path(folder), dict(args)
        book, is_new, is_begun = cls(folder, args, columns), not os.path.exists(folder), False
        try:
            cls.refuse_existing(folder, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            book._claim()
            book._write_args({"args": args, "versions": _versions()})        # first: if this fails, nothing was removed
            is_begun = True
            for path in [*(folder / name for name in RUN_FILES[1:]), *folder.glob("events.out.tfevents.*")]:
                path.unlink(missing_ok=True)
            book._rewrite("progress.csv", book.columns, [])
            book._rewrite("eval.csv", EVAL_COLUMNS, [])
        except OSError as error:
            with contextlib.suppress(OSError):
                for name in RUN_FILES if is_begun else []:
                    (folder / name).unlink(missing_ok=True)
                (folder / ".lock").unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()
            raise UserError(f"cannot write to the run folder {folder}: {reason(error)}; "
                            "choose another with --run-dir DIR") from error
        return book

    def _claim(self):
        """The folder is this process's until it ends: two that write to one folder would mix their rows."""
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is writing to {self.folder}: wait until it has finished, or choose "
                            "another folder with --run-dir DIR") from None
        except OSError:
            pass                                      # a file system without locks

    @staticmethod
    def refuse_existing(folder, overwrite):
        """UserError where `create` would."""
        if not overwrite and any((Path(folder) / name).exists() for name in ("last.pt", "best.pt")):
            raise UserError(f"{folder} already holds a run: continue it with --resume {folder}, "
                            "replace it with --overwrite, or choose another folder with --run-dir DIR")

    @classmethod
    def resume(cls, folder, columns, task=None, method=None):
        """Reopen a run that has a last.pt; its arguments are in `.args`. Load, then call `.rewind`."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}")
        if not (folder / "last.pt").is_file():
            raise UserError(f"{folder} has no checkpoint last.pt: start the run again without --resume")
        book = cls(folder, read_args(folder, task=task, method=method), columns)
        with _writing(folder):
            book._claim()
        header = next(iter(_read_csv(folder / "progress.csv")), book.columns)
        if header != book.columns:
            changed = ", ".join(sorted(set(header) ^ set(book.columns))) or "their order"
            raise UserError(f"{folder}/progress.csv has other columns ({changed}): start a new run")
        return book

    def amend(self, args):
        """The arguments and versions a resumed run goes on with; what they replace stays in args.json as "earlier"."""
        with _writing(self.folder / "args.json"):
            text, versions = (self.folder / "args.json").read_text(), _versions()
            stored, given = json.loads(text), json.loads(json.dumps(dict(args), default=str))
            before = stored["args"]
            self.args = before | {name: value for name, value in given.items() if name != "resume"}
            replaced = {name: before.get(name) for name, value in self.args.items() if before.get(name) != value}
            if replaced or versions != stored.get("versions"):
                earlier = [*stored.get("earlier", []), {"args": replaced, "versions": stored.get("versions")}]
                self._write_args({"args": self.args, "versions": versions, "earlier": earlier})

    def log(self, step, **scalars):
        """One row of progress.csv, one point per TensorBoard curve; a name not in `columns` is a KeyError."""
        for name in scalars:
            if name not in self.columns:
                raise KeyError(f"{name} is not a column of {self.folder}/progress.csv: declare it in columns")
        scalars = {k: v.item() if hasattr(v, "item") else v for k, v in scalars.items() if v is not None}
        row, path = {"step": step, **scalars}, self.folder / "progress.csv"
        with _writing(path), open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([row.get(name, "") for name in self.columns])
        self._scalars(step, scalars)

    def evaluation(self, step, acting, rows):
        """One row of eval.csv per episode; `rows` are dicts with seed, success, length and return.

        All of them or none, and an evaluation that is repeated at the same step replaces the earlier one.
        """
        rows = [{**row, "step": step, "acting": acting, "success": int(row["success"])} for row in rows]
        path = self.folder / "eval.csv"
        kept = [row for row in _read_csv(path)[1:] if row[:2] != [str(step), acting]]
        kept += [[row[name] for name in EVAL_COLUMNS] for row in rows]
        with _writing(path):
            self._rewrite(path.name, EVAL_COLUMNS, kept)
        if rows:
            rate = sum(row["success"] for row in rows) / len(rows)
            self._scalars(step, {f"eval/success_{acting}": rate})

    def save(self, name, state):
        save_checkpoint(self.folder / name, state)

    def load(self, name, device="cpu"):
        return load_checkpoint(self.folder / name, device)

    def last_good(self):
        """What a run that has to stop leaves behind, in words."""
        path = self.folder / "last.pt"
        return f"{path} is the last good checkpoint" if path.is_file() else "nothing was saved yet"

    def rewind(self, step):
        """Forget every row after `step`, so that a killed and resumed run leaves no row twice."""
        for name, header in (("progress.csv", self.columns), ("eval.csv", EVAL_COLUMNS)):
            # a row cut short by a kill has too few cells; it is from after the checkpoint anyway
            with must_fit(self.folder / name, "put it right, or start a new run"):
                rows = [row for row in _read_csv(self.folder / name)[1:]
                        if len(row) == len(header) and float(row[0]) <= step]
            with _writing(self.folder / name):
                self._rewrite(name, header, rows)
        self.close()
        self._purge_step = step + 1                   # TensorBoard hides what earlier files say from here on
        self._scalars(step, {})                       # said now: the next interruption may come before a row

    def close(self):
        if self._events is not None:
            self._events.close()
        self._events = None

    def _write_args(self, content):
        with replacing(self.folder / "args.json") as file:
            file.write(json.dumps(content, indent=2, default=str).encode() + b"\n")

    def _rewrite(self, name, header, rows):
        with replacing(self.folder / name) as file:
            file.write("".join(",".join(map(str, row)) + "\n" for row in [header, *rows]).encode())

    def _scalars(self, step, values):
        # tensorboard's own SummaryWriter works in a thread, where a full disk is a traceback nobody can catch
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
        events = [Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)
                                                          for tag, value in values.items()]))]
        with _writing(self.folder / "TensorBoard events"):
            if self._events is None:
                # by time, because TensorBoard reads the files in the order of their names
                file = open(self.folder / f"events.out.tfevents.{time.time_ns()}", "wb", buffering=0)
                self._events = RecordWriter(file)
                events.insert(0, Event(file_version="brain.Event:2"))
                if self._purge_step is not None:
                    start = SessionLog(status=SessionLog.START)
                    events.insert(1, Event(step=self._purge_step, session_log=start))
                    self._purge_step = None           # a file opened later must not hide this one
            for event in events:
                event.wall_time = time.time()
                self._events.write(event.SerializeToString())


@contextlib.contextmanager
def _writing(path):
    """A full disk or a lost mount is the user's to repair."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def _read_csv(path):
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            return list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): put it right, or start a new run") from error


def read_args(folder, **asked):
    """The arguments of a run; refused where it is not of the `task` or `method` asked for."""
    try:
        args = json.loads((Path(folder) / "args.json").read_text())["args"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a run folder: its args.json is missing or damaged") from error
    if not isinstance(args, dict):
        raise UserError(f"{folder} is not a run folder: its args.json is damaged")
    for name, value in asked.items():
        if value is not None and args.get(name) != value:
            raise UserError(f"{folder} is a run of {name} {args.get(name)}, not of {name} {value}")
    return args


def curve(*folders, out=None):
    """Draw curve.png of one run, or one figure of several; returns the path of the picture."""
    from .figure import draw                          # matplotlib is loaded only here
    return draw(folders, out)
