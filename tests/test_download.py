"""Downloads from a loopback server that stalls, truncates, lies about the size, forgets ranges, or is not there."""
import hashlib
import http.server
import threading

import pytest

from demos import download
from demos.download import DownloadError, fetch
from envs import TASKS

CONTENT = bytes(range(256)) * 4000  # 1 MB
FAST = dict(progress=False, timeout=0.3)


class Handler(http.server.BaseHTTPRequestHandler):
    """The first part of a path says how the server behaves; each request is noted."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, kind = self.server, self.path.split("/")[1]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.seen.append((kind, start))
        if kind == "busy" and server.seen.count((kind, start)) in server.busy:
            return self.send_error(503)
        if "/raw/" in self.path:
            return self.answer(200, server.record.encode())
        if kind == "gone":
            return self.send_error(404)
        content, status = server.content, 206 if start and kind != "norange" else 200
        body = content[start:] if status == 206 else content
        length = len(body) + (1000 if kind == "more" else -1000 if kind == "less" else 0)
        cut = {"cut": 300_000, "stall": 200_000, "more": len(body), "mute": 0}.get(kind, length)
        wait = kind in ("stall", "mute") and len(server.seen) < server.patience
        self.answer(status, body[: cut if kind in ("cut", "more") or wait else None], length, start,
                    len(content) + (1000 if kind == "more" else 0))
        if wait:
            server.closing.wait(2)

    def answer(self, status, body, length=None, start=0, total=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        try:
            self.wfile.write(body[: length])
            self.wfile.flush()
        except OSError:
            pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.seen, server.closing, server.patience = CONTENT, [], threading.Event(), 1000
        server.record = f"version x\noid sha256:{hashlib.sha256(CONTENT).hexdigest()}\nsize {len(CONTENT)}\n"
        server.daemon_threads = True
        server.url = lambda kind, way="file": f"http://127.0.0.1:{server.server_port}/{kind}/{way}/a.bin"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


def leftovers(folder):
    return sorted(path.suffix for path in folder.iterdir() if path.name != "a.bin")


def test_a_whole_file_arrives_and_nothing_else(server, tmp_path):
    path = fetch([server.url("fine")], tmp_path / "new" / "a.bin", **FAST)
    assert path.read_bytes() == CONTENT and leftovers(path.parent) == []
    assert fetch([server.url("fine")], path, **FAST) == path and len(server.seen) == 1  # not fetched twice


def test_a_connection_that_breaks_is_continued_where_it_broke(server, tmp_path):
    assert fetch([server.url("cut")], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT
    assert [start for _, start in server.seen] == [0, 300_000, 600_000, 900_000]


def test_a_server_that_stalls_is_asked_again(server, tmp_path):
    server.patience = 2
    assert fetch([server.url("stall")], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT
    assert [start for _, start in server.seen] == [0, 200_000]


@pytest.mark.parametrize("busy", [(1,), (2,), (1, 3)])  # the record's server, then the file's; both
def test_a_busy_server_is_asked_again(server, tmp_path, monkeypatch, busy):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server.busy = busy
    assert fetch([server.url("busy", "resolve")], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT
    assert len(server.seen) == 2 + len(busy)
    server.busy = range(100)
    with pytest.raises(DownloadError, match="503"):
        fetch([server.url("busy", "resolve")], tmp_path / "b.bin", **FAST)


def test_an_interrupted_download_is_continued_by_the_next_run(server, tmp_path, monkeypatch):
    whole = download._receive

    def interrupted(response, partial, *_):
        partial.write_bytes(response.read(5000))
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch([server.url("fine")], tmp_path / "a.bin", **FAST)
    assert leftovers(tmp_path) == [".lock", ".part"]
    monkeypatch.setattr(download, "_receive", whole)
    assert fetch([server.url("fine")], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT
    assert server.seen[-1] == ("fine", 5000)


def test_a_server_without_ranges_starts_over(server, tmp_path, monkeypatch):
    url = server.url("norange")
    partial = tmp_path / f"a.bin.{download.zlib.crc32(url.encode()):08x}.part"
    partial.write_bytes(b"x" * 5000)
    assert fetch([url], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT


def test_a_part_of_another_file_is_thrown_away_by_its_checksum(server, tmp_path):
    url = server.url("fine", "resolve")
    partial = tmp_path / f"a.bin.{download.zlib.crc32(url.encode()):08x}.part"
    partial.write_bytes(b"x" * 5000)
    with pytest.raises(DownloadError, match="checksum is wrong"):
        fetch([url], tmp_path / "a.bin", **FAST)
    assert leftovers(tmp_path) == [".lock"]
    assert fetch([url], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT


@pytest.mark.parametrize("kind, reason", [
    ("gone", "404"), ("mute", "gone silent"), ("more", "ended after 1024000 of 1025000 bytes")])
def test_a_bad_mirror_is_named_with_its_reason_and_the_next_one_is_used(server, tmp_path, kind, reason):
    with pytest.raises(DownloadError, match=reason) as caught:
        fetch([server.url(kind)], tmp_path / "a.bin", **FAST)
    assert server.url(kind) in str(caught.value) and str(tmp_path / "a.bin") in str(caught.value)
    assert not (tmp_path / "a.bin").exists()
    assert fetch([server.url(kind), server.url("fine")], tmp_path / "a.bin", **FAST).read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["more", "less"])
def test_a_size_that_is_not_the_hosts_own_record_is_refused_before_the_transfer(server, tmp_path, kind):
    with pytest.raises(DownloadError, match="its own record says 1024000"):
        fetch([server.url(kind, "resolve")], tmp_path / "a.bin", **FAST)


def test_wrong_content_of_the_right_size_is_refused(server, tmp_path):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match="checksum is wrong"):
        fetch([server.url("fine", "resolve")], tmp_path / "a.bin", **FAST)
    assert not (tmp_path / "a.bin").exists()


def test_offline_is_one_sentence_with_the_way_out(tmp_path):
    with pytest.raises(DownloadError, match="refused.*run again") as caught:
        fetch(["http://127.0.0.1:9/a.bin"], tmp_path / "a.bin", **FAST)
    assert "\n" not in str(caught.value)


def test_runs_that_start_together_download_once(server, tmp_path):
    jobs = [threading.Thread(target=fetch, args=([server.url("cut")], tmp_path / "a.bin"), kwargs=FAST) for _ in "123"]
    [job.start() for job in jobs]
    [job.join() for job in jobs]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and len(server.seen) == 4


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_mirrors_and_a_place(name, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test/")
    assert any(url.startswith("http://hub.test/datasets/") for url in download.mirrors(TASKS[name]))
    assert {download.places(TASKS[name])[0].suffix} == {"." + url.rpartition(".")[2]
                                                       for url in download.mirrors(TASKS[name])}
