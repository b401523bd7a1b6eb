"""A run's args.json: what it was asked, with which versions, and what a resumed run changed.

    args = read_args("runs/lift-poco-s0", task="lift")

Not here: types and limits of the values (options.py), which of them may change (each script).
"""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from .checkpoints import replacing
from .errors import UserError

LARGEST_FILE = 1 << 20  # bytes
DEEPEST = 8  # lists and dicts within each other


def read_args(folder: str | Path, **asked: Any) -> dict[str, Any]:
    """Return a run's arguments: plain numbers, strings, lists and dicts.

    Raises UserError where args.json is missing or damaged, and where the run has another value
    than the `task` or `method` asked for.
    """
    args = read_file(folder)["args"]
    for name, value in asked.items():
        if value is not None and args.get(name) != value:
            raise UserError(
                f"{folder} is a run of {name} {args.get(name)!s:.80}, not of {name} {value}"
            )
    return args


def read_file(folder: str | Path) -> dict[str, Any]:
    """Return all of args.json: "args", "versions" and, of a run resumed otherwise, "earlier"."""
    try:
        with open(Path(folder) / "args.json", "rb") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        content = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(content, dict) or not isinstance(content.get("args"), dict):
            raise ValueError("it holds no args")
        for name, value in content["args"].items():
            _check_plain(name, value)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run folder: it has no args.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder} is not a run folder: its args.json is damaged ({error})"
        ) from error
    return content


def write_args(folder: Path, args: dict[str, Any]) -> None:
    """Write a new run's arguments and versions."""
    _write(folder, {"args": args, "versions": versions()})


def amend_args(folder: Path, args: dict[str, Any]) -> dict[str, Any]:
    """Write what a resumed run goes on with; what it replaces stays in the list "earlier".

    Returns the arguments as they are stored now.
    """
    stored = read_file(folder)
    before = stored["args"]
    given = json.loads(json.dumps(args, default=str))
    given.pop("resume", None)
    after = before | given
    replaced = {name: before.get(name) for name in after if before.get(name) != after[name]}
    now = versions()
    if replaced or now != stored.get("versions"):
        earlier = {"args": replaced, "versions": stored.get("versions")}
        history = [*stored.get("earlier", []), earlier]
        _write(folder, {"args": after, "versions": now, "earlier": history})
    return after


def versions() -> dict[str, str]:
    """Return what a reader needs to repeat the run, without what is not installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "mujoco", "robosuite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        found["commit"] = done.stdout.strip()
    return found


def _write(folder: Path, content: dict[str, Any]) -> None:
    with replacing(folder / "args.json") as file:
        file.write(json.dumps(content, indent=2, default=str).encode() + b"\n")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError where a name stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands there twice")
    return content


def _check_plain(where: str, value: Any, depth: int = 0) -> None:
    """Raise a ValueError that names the argument which no run can have stored."""
    if depth > DEEPEST:
        raise ValueError(f"{where:.80} is nested too deeply")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_plain(f"{where}.{name}", inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(where, inner, depth + 1)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where:.80} is too large")
    elif isinstance(value, str) and not _is_printable(value):
        raise ValueError(f"{where:.80} is no text")


def _is_printable(text: str) -> bool:
    """Say whether text can be a file's name and be printed."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return "\0" not in text
