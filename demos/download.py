"""Public data sets: where they are looked for, and how the libraries of their hosts fetch them.

    path = download.fetch("can")                           # robomimic's, by huggingface_hub
    path = download.fetch("scene")                         # OGBench's play, by ogbench

These are robomimic's multi-human low-dimensional files (v1.5, for robosuite 1.5) and OGBench's play
files. They lie where robomimic's and OGBench's other users have them. huggingface_hub resumes,
and obeys HF_ENDPOINT and HF_HUB_OFFLINE; the checksum that the host states is compared here.
"""

import contextlib
import hashlib
import os
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from envs import Task, get_task

TIMEOUT = 30.0  # seconds without a byte after which a server is given up
ROBOMIMIC = ("robomimic/robomimic_datasets", "amandlek/robomimic")  # its name today, and before
OGBENCH_MIRROR = "zhouzypaul/ogbench_datasets"


class DownloadError(RuntimeError):
    """No host delivered; the message names each with its reason."""


def places(task: str | Task) -> list[Path]:
    """Return where a task's public file is looked for."""
    task = get_task(task)
    if task.suite == "robosuite":
        home = Path("~/.robomimic").expanduser()
        return [home / robomimic_file(task), home / f"{task.name}/mh/low_dim_v15.hdf5"]
    return [ogbench_folder() / f"{task.name}-play-v0.npz"]


def robomimic_file(task: Task) -> str:
    return f"v1.5/{task.name}/mh/low_dim_v15.hdf5"


def ogbench_folder() -> Path:
    return Path("~/.ogbench/data").expanduser()


def fetch(task: str | Task) -> Path:
    """Download a task's public file and return its path.

    Hosts are tried in order. Raises DownloadError if none delivers.
    """
    task = get_task(task)
    reasons = []
    for host, download in hosts(task):
        try:
            return download()
        except Exception as error:  # whatever a host or its library raises, the next one may work
            reasons.append(f"{host}: {reason(error)}")
    raise DownloadError(
        f"no host delivered {places(task)[0].name} ({'; '.join(reasons)}); "
        f"with a connection run again, or put the file at {places(task)[0]}"
    )


def hosts(task: Task) -> list[tuple[str, Callable[[], Path]]]:
    """List the hosts of a task's file, the best first, each with its download."""
    if task.suite == "robosuite":
        home = Path("~/.robomimic").expanduser()
        return [
            (repository, lambda name=repository: from_hub(name, robomimic_file(task), home))
            for repository in ROBOMIMIC
        ]
    name = f"{task.name}-play-v0"
    return [
        ("OGBench", lambda: from_ogbench(name)),
        (OGBENCH_MIRROR, lambda: from_hub(OGBENCH_MIRROR, f"{name}.npz", ogbench_folder())),
    ]


def from_hub(repository: str, file: str, folder: Path) -> Path:
    """Download a file of a Hugging Face data set into `folder`, and compare its checksum."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    folder.mkdir(parents=True, exist_ok=True)
    path = Path(hf_hub_download(repository, file, repo_type="dataset", local_dir=folder))
    record = get_hf_file_metadata(hf_hub_url(repository, file, repo_type="dataset"))
    if record.etag and len(record.etag) == 64:  # of a large file: its SHA-256
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != record.etag:
            path.unlink()
            raise ValueError("the file's checksum is wrong; it was thrown away")
    return path


def from_ogbench(name: str) -> Path:
    """Download a data set by OGBench's own downloader, which also fetches its validation part."""
    import ogbench

    path = ogbench_folder() / f"{name}.npz"
    with waiting_at_most(TIMEOUT):
        ogbench.download_datasets([name], str(ogbench_folder()))
    try:
        with zipfile.ZipFile(path) as archive:  # it renames what a broken connection left
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged:
        os.unlink(path)
        raise ValueError(f"the file arrived damaged ({damaged}); it was thrown away")
    return path


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Give connections made meanwhile a timeout: OGBench's downloader sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def reason(error: Exception) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
