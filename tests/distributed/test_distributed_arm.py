"""An arm's learner on another machine, on a Ray that is not there: why it ended, and which episodes it has.

    python -m pytest tests/test_distributed_arm.py

Not here: the same on a cluster (test_distributed_ray.py).
"""
import contextlib
import dataclasses
import errno
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distributed import arm
from distributed.cluster import hub_class
from logbook import UserError


class RayError(Exception):
    pass


class RayTaskError(RayError):
    cause = ZeroDivisionError("out of memory")


class Ray:
    """Calls are made at once; a learner's is a thread."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def put(self, value):
        return SimpleNamespace(value=value)

    def get(self, reference, timeout):
        if isinstance(reference, threading.Thread):
            reference.join()
            if reference.error is not None:
                raise reference.error
            return None
        return reference.value

    def wait(self, references, timeout):
        return [one for one in references if not one.is_alive()], []

    def kill(self, actor):
        pass


class Remote:
    """An actor here: `actor.method.remote(...)`."""

    def __init__(self, one):
        self.one = one

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: SimpleNamespace(value=getattr(self.one, name)(*args)))


class Far(arm.Faraway):
    """Its learner is learn(line), started again as often as the real one."""

    def __init__(self, folder, learn=None):
        self.ray, self.hub, self.paths, self.sent = Ray(), Remote(hub_class()(1)), [], set()
        self.newest, self.used, self.stats, self.stamp = (0, None), 0, {}, None
        self.failures, self.error, self.silent, self.closing = 0, None, False, False
        self.folder, self.args, self.learn, self.started = folder / "arm", SimpleNamespace(run_dir="run"), learn, 0
        self.there = folder / "there"
        for path in (self.folder / "episodes", self.there / "episodes"):
            path.mkdir(parents=True)
        self.line = arm.Line(self.ray, self.hub, self.there)

    def _start(self):
        def run():
            try:
                self.learn(arm.Line(self.ray, self.hub, self.there))
            except RayError as error:
                self.future.error = error
        self.started, self.future, self.sent = self.started + 1, threading.Thread(target=run, daemon=True), set()
        self.future.error = None
        self.future.start()

    def begin(self):
        self._start()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def told(self, seconds=10.0):
        """What check() says, if it does in time."""
        end = time.monotonic() + seconds
        with contextlib.suppress(UserError):
            while time.monotonic() < end:
                self.check()
                time.sleep(0.01)
        try:
            self.check()
        except UserError as error:
            return str(error)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(arm, "PERIOD", 0.01)


def say(line, updates):
    line.copy_(torch.zeros(3))
    line.value += 1
    line.send({"updates": updates, "behind": 3})


# ---- why it ended

def test_a_learner_that_diverged_says_so_and_no_other_is_started(tmp_path):
    """Also where a note without words follows: the hub keeps the last one only."""
    def learn(line):
        say(line, 500)
        line.send({"failed": "the critic returned a non-finite Q"})
        line.send({})
    far = Far(tmp_path, learn)
    far.begin()
    assert far.told() == "the learner stopped: the critic returned a non-finite Q"
    time.sleep(0.1)
    assert far.started == 1 and far.report() == {"updates": 500}
    far.close()


def crash(line):
    raise RayTaskError


@pytest.mark.parametrize("end, reason", [(lambda line: None, "it ended although nobody"), (crash, "out of memory")])
def test_a_learner_that_ends_again_and_again_ends_the_run(end, reason, tmp_path):
    """Each makes the same updates again: they are no progress."""
    def learn(line):
        line.send({})
        say(line, 20)
        time.sleep(0.05)                                                           # so that this is heard, too
        say(line, 40)
        end(line)
    far = Far(tmp_path, learn)
    far.begin()
    assert "fails again and again" in (told := far.told()) and reason in told
    assert arm.PATIENCE <= far.failures <= far.started
    far.close()


def test_failures_between_which_it_gets_on_are_forgiven(tmp_path):
    def learn(line):
        say(line, 20 * far.started)
        if far.started < 8:
            crash(line)
        while not far.closing:
            time.sleep(0.01)
    far = Far(tmp_path, learn)
    far.begin()
    assert far.told(2.0) is None and far.started == 8
    far.close()


def test_why_it_could_not_save_at_the_end_is_told(tmp_path, capfd):
    def learn(line):
        say(line, 20)
        while not far.closing:
            time.sleep(0.01)
        line.send({"failed": "the policy became non-finite"})
    far = Far(tmp_path, learn)
    far.begin()
    assert far.told(0.2) is None
    far.close()
    assert "the learner stopped: the policy became non-finite" in capfd.readouterr().err


def test_last_words_are_heard_also_where_the_weights_went_with_their_machine(tmp_path):
    class Lost:
        @property
        def value(self):
            raise RayError
    far = Far(tmp_path)
    far.ray.put = lambda value: Lost()
    far.line.copy_(torch.zeros(3))
    far.line.value += 1
    far.line.send({"failed": "a non-finite Q"})
    with pytest.raises(RayError):
        far._exchange()
    assert far.told(0.1) == "the learner stopped: a non-finite Q"


def test_a_learner_that_cannot_begin_is_told_once(tmp_path, monkeypatch, capfd):
    """Another run has its machine, for example: Ray waits, whoever stands at the arm should know."""
    monkeypatch.setattr(arm, "TIMEOUT", 0.2)
    for speaks, count in ((False, 1), (True, 0)):
        def learn(line):
            if speaks:
                line.send({})
            time.sleep(1)
            say(line, 0)
            while not far.closing:
                time.sleep(0.01)
        far = Far(tmp_path / str(count), learn)
        far.args = dataclasses.make_dataclass("Args", ["resume", "learner"])(False, "gpu:6379")
        far.demos, far.task = [], None
        assert far.pretrain(None)
        far.close()
        assert capfd.readouterr().err.count("has not begun") == count


def test_a_full_disk_there_is_no_end_of_the_arm(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(arm, "write", full)
    far = Far(tmp_path)
    far.hub.push.remote("episode_00000.hdf5", b"")
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        far.line.poll(0)


# ---- which episodes it has

def exchange(far):
    """A round of both ends; the paths the learner was told of, with what was then in them."""
    far.line.send({})
    far._exchange()
    time.sleep(2 * arm.PERIOD)
    told = []
    while far.line.poll(0):
        path = Path(far.line.recv_bytes().decode())
        told.append((path.name, path.read_bytes()))
    return told


def test_an_episode_recorded_again_replaces_the_learners_copy(tmp_path):
    far = Far(tmp_path)
    one, two = (far.folder / f"episodes/episode_0000{i}.hdf5" for i in range(2))
    for path in (one, two):
        path.write_bytes(b"first of " + path.name.encode())
        far.absorb(path)
    assert [name for name, _ in exchange(far)] == [one.name, two.name] and exchange(far) == []
    two.write_bytes(b"again")
    far.absorb(two)
    assert exchange(far) == [(two.name, b"again")] and exchange(far) == []
    assert (far.there / "episodes" / two.name).read_bytes() == b"again"
    far.sent = set()                                                               # another learner in the same folder
    assert exchange(far) == []
    for path in (one, far.there / "episodes" / one.name):
        path.unlink()
    assert exchange(far) == []                                                     # deleted at both ends


def test_a_learner_starts_without_what_the_arm_has_deleted_or_recorded_again(tmp_path, monkeypatch):
    """What it had is renamed, not lost; demonstrations are the arm's of today."""
    seen, far = [], Far(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", far.ray)
    monkeypatch.setattr(arm, "Learner", lambda settings, task: SimpleNamespace(pretrain=lambda save: None))
    monkeypatch.setattr(arm, "serve", lambda *_: seen.append(sorted(path.name for path in here.iterdir())))
    here, demos = tmp_path / "runs/one/episodes", tmp_path / "runs/one/demos"
    here.mkdir(parents=True)
    for number in range(3):
        for folder in (here, far.folder / "episodes"):
            (folder / f"episode_0000{number}.hdf5").write_bytes(b"%d" % number)
    (far.folder / "episodes/episode_00000.hdf5").unlink()
    (far.folder / "episodes/episode_00002.hdf5").write_bytes(b"again")
    actor = SimpleNamespace(remote=lambda: Remote(arm.Pupil()))
    far.ray.remote = lambda kind: SimpleNamespace(options=lambda **_: actor)
    for data in (b"old", b"new"):
        far.job, far.options = ({}, None, {"demo.hdf5": torch.tensor(list(data), dtype=torch.uint8).numpy()}, "one"), {}
        arm.Faraway._start(far)
    assert seen[-1] == ["episode_00000.gone", "episode_00001.hdf5", "episode_00002.gone"]
    assert (here / "episode_00001.hdf5").read_bytes() == b"1" and (demos / "demo.hdf5").read_bytes() == b"new"
