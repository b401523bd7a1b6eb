"""Downloads from a loopback server that answers as the hosts do, or fails as hosts do.

    python -m pytest tests/data/test_download.py

Resuming, redirects and caching are the libraries' own and tested there.
"""

import hashlib
import http.server
import io
import threading

import numpy as np
import pytest
from huggingface_hub import constants

from demos import download
from demos.download import DownloadError, fetch
from envs import TASKS

CONTENT = bytes(range(256)) * 400


def archive():
    stream = io.BytesIO()
    np.savez(stream, observations=np.arange(1000.0))
    return stream.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for files by their paths; `server.files` holds path -> what to do."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server = self.server
        server.seen.append((self.command, self.path))
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        if server.silent:
            server.closing.wait(5)
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{server.checksum or hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(content[: server.sent])
        return None


@pytest.fixture
def server(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = {}
        server.seen = []
        server.silent = False
        server.checksum = None
        server.sent = None
        server.closing = threading.Event()
        server.daemon_threads = True
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("ogbench.utils.DATASET_URL", url + "/ogbench")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


def hub_path(repository, file):
    return f"/datasets/{repository}/resolve/main/{file}"


CAN = "v1.5/can/mh/low_dim_v15.hdf5"


def test_robomimics_file_arrives_where_it_is_looked_for(server):
    server.files[hub_path(download.ROBOMIMIC[0], CAN)] = CONTENT
    path = fetch("can")
    assert path == download.places("can")[0] and path.read_bytes() == CONTENT


def test_the_name_that_the_data_set_had_before_is_tried_next(server):
    server.files[hub_path(download.ROBOMIMIC[1], CAN)] = CONTENT
    assert fetch("can").read_bytes() == CONTENT


def test_wrong_content_of_the_right_size_is_thrown_away(server):
    server.files[hub_path(download.ROBOMIMIC[0], CAN)] = CONTENT
    server.checksum = "0" * 64
    with pytest.raises(DownloadError, match="robomimic_datasets: the file's checksum is wrong"):
        fetch("can")
    assert not download.places("can")[0].exists()


def test_play_comes_by_ogbenchs_own_downloader(server):
    for part in ("", "-val"):
        server.files[f"/ogbench/scene-play-v0{part}.npz"] = archive()
    path = fetch("scene")
    assert path == download.places("scene")[0] and path.read_bytes() == archive()
    assert all(path.startswith("/ogbench/") for _, path in server.seen)


def test_where_ogbenchs_host_is_down_the_mirror_is_used(server):
    server.files[hub_path(download.OGBENCH_MIRROR, "scene-play-v0.npz")] = archive()
    path = fetch("scene")
    assert path == download.places("scene")[0] and path.read_bytes() == archive()


def test_a_connection_that_breaks_leaves_no_half_file(server):
    """OGBench's downloader renames what it has got; a later run would train on it."""
    server.files["/ogbench/scene-play-v0.npz"] = archive()
    server.files["/ogbench/scene-play-v0-val.npz"] = archive()
    server.sent = 2000
    with pytest.raises(DownloadError, match="OGBench: .*(damaged|retrieval incomplete)"):
        fetch("scene")
    assert not download.places("scene")[0].exists()


def test_a_silent_host_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.files["/ogbench/scene-play-v0.npz"] = archive()
    server.silent = True
    with pytest.raises(DownloadError, match="OGBench: .*timed out"):
        fetch("scene")


def test_offline_is_one_sentence_with_the_way_out(server):
    with pytest.raises(DownloadError, match="no host delivered low_dim_v15.hdf5") as caught:
        fetch("can")
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in download.ROBOMIMIC)
    assert f"put the file at {download.places('can')[0]}" in message


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_hosts_and_a_place(name):
    suffix = ".hdf5" if TASKS[name].suite == "robosuite" else ".npz"
    assert download.places(name)[0].suffix == suffix
    assert len(download.hosts(TASKS[name])) == 2
