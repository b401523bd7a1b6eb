"""
Public data sets: where they are looked for, where they come from, and a download that does not trust the network.

robomimic's multi-human low-dimensional files (v1.5, for robosuite 1.5) and OGBench's play files. Mirrors are tried in
order; a `.part` file is kept and continued after an interruption; the size, and the checksum where the host tells it,
must be right before the file gets its name. Files lie where robomimic's and OGBench's other users have them.
HF_ENDPOINT names another Hugging Face host, as it does for Hugging Face's own tools. Nothing here ever unpickles.
"""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from envs import Task

TIMEOUT = 30.0  # seconds without a byte after which a server is given up
ATTEMPTS = 3  # connections to a mirror that bring nothing new, before the next mirror
PAUSE = 1.0  # seconds before a busy server is asked again
BLOCK = 1 << 20


class DownloadError(RuntimeError):
    """No mirror delivered; the message names each with its reason."""


def places(task: Task) -> list[Path]:
    """Where the task's public file is looked for; the first is where a download goes."""
    if task.suite == "robosuite":
        home, file = Path("~/.robomimic").expanduser(), f"{task.name}/mh/low_dim_v15.hdf5"
        return [home / file, home / "v1.5" / file]
    return [Path("~/.ogbench/data").expanduser() / f"{task.name}-play-v0.npz"]


def mirrors(task: Task) -> list[str]:
    """URLs of the task's public file, the best first."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/datasets"
    if task.suite == "robosuite":
        file = f"v1.5/{task.name}/mh/low_dim_v15.hdf5"  # moved from amandlek/robomimic, which may still answer
        return [f"{hub}/{repository}/resolve/main/{file}"
                for repository in ("robomimic/robomimic_datasets", "amandlek/robomimic")]
    file = f"{task.name}-play-v0.npz"
    return [f"https://rail.eecs.berkeley.edu/datasets/ogbench/{file}",  # OGBench's own host, at times down for weeks
            f"{hub}/zhouzypaul/ogbench_datasets/resolve/main/{file}"]


def fetch(urls: list[str], target, progress: bool = True, timeout: float = TIMEOUT) -> Path:
    """The first mirror's file that is whole, as `target`. DownloadError if none is; what arrived is kept for later."""
    target, reasons = Path(target), []
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        for url in urls if not target.exists() else ():  # it may: another process was faster
            partial = target.with_name(f"{target.name}.{zlib.crc32(url.encode()):08x}.part")  # mirrors are never mixed
            try:
                _fetch_from(url, partial, progress, timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons.append(f"{url}: {_reason(error)}")
                continue
            os.replace(partial, target)
            break
    if not target.exists():
        raise DownloadError(
            f"no mirror delivered {target.name} ({'; '.join(reasons)}); "
            f"with a connection, run again (it continues) or put the file at {target}"
        )
    return target


@contextlib.contextmanager
def _alone(target: Path):
    """Runs that start together take turns: the first one downloads, the others find its file."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    lock = target.with_name(f"{target.name}.lock")
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        if target.exists():  # while it does not, the next process must wait for this same lock
            lock.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return "the server has gone silent"
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _fetch_from(url: str, partial: Path, progress: bool, timeout: float) -> None:
    """Fills `partial`, over several connections if need be."""
    failures, announced = 0, None
    while True:
        before = _length(partial)
        try:
            size, checksum = announced = announced or _announced(url, timeout)
            _continue(url, partial, size, progress, timeout)
            break
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if _length(partial) > before else failures + 1
            if failures >= ATTEMPTS or not _passing(error):
                raise
            if isinstance(error, urllib.error.HTTPError):
                time.sleep(PAUSE)
    if checksum is not None and _sha256(partial) != checksum:
        partial.unlink()
        raise ValueError("the file's checksum is wrong; it was thrown away")


def _passing(error: Exception) -> bool:
    """Whether the same request may be answered a moment later: a busy server's refusal, a broken connection."""
    return not isinstance(error, urllib.error.HTTPError) or error.code >= 500 or error.code in (408, 429)


def _announced(url: str, timeout: float) -> tuple[int | None, str | None]:
    """Size and SHA-256 by the host's own record of the file (Hugging Face: a Git LFS pointer), if it keeps one."""
    if "/resolve/" not in url:
        return None, None
    try:
        with urllib.request.urlopen(url.replace("/resolve/", "/raw/"), timeout=timeout) as response:
            text = response.read(1024).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        if _passing(error):
            raise
        return None, None  # the file itself may be there
    size, checksum = re.search(r"^size (\d+)$", text, re.M), re.search(r"^oid sha256:([0-9a-f]{64})$", text, re.M)
    return (int(size[1]), checksum[1]) if size and checksum else (None, None)


def _continue(url: str, partial: Path, size: int | None, progress: bool, timeout: float) -> None:
    """One connection: asks for what is missing and appends it. Returns when the file has the size it should have."""
    have = _length(partial)
    if size is not None and have > size:
        partial.unlink()
        have = 0
    if size is not None and have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        partial.unlink()  # nothing beyond what is here: it was another file, or whole without our knowing
        return _continue(url, partial, size, progress, timeout)
    with response:
        resumed = response.status == 206
        total = _total(response, have if resumed else 0)
        if size is not None and total != size:
            raise ValueError(f"the server offers {total} bytes, its own record says {size}")
        _receive(response, partial, have if resumed else 0, total, progress)
    if _length(partial) != total:
        raise OSError(f"the connection ended after {_length(partial)} of {total} bytes")


def _receive(response, partial: Path, start: int, total: int, progress: bool) -> None:
    from tqdm import tqdm

    name = partial.name.split(".")[0]
    with open(partial, "ab" if start else "wb") as file, \
            tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
        while block := response.read1(BLOCK):  # read1: what has arrived is kept if the connection then stalls
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())


def _total(response, start: int) -> int:
    """The whole file's size as this answer tells it."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != start:
            raise ValueError("the server continues at another place than it was asked to")
        return int(found[2])
    length = response.headers.get("Content-Length", "")
    if not length.isdigit():
        raise ValueError("the server does not say how long the file is")
    return int(length)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
