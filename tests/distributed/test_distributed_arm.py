"""An arm's learner on another machine, with no Ray: why it ended, which episodes it has.

    python -m pytest tests/distributed/test_distributed_arm.py

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

import numpy as np
import pytest
import torch

from distributed import arm, arm_learner
from distributed.arm import RemoteLearner
from distributed.arm_learner import HubInbox, HubOutbox, LearnerActor
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
        return SimpleNamespace(
            remote=lambda *args: SimpleNamespace(value=getattr(self.one, name)(*args))
        )


class Far(RemoteLearner):
    """Its learner is learn(outbox), started again as often as the real one."""

    def __init__(self, folder, learn=None):
        self.ray = Ray()
        self.hub = Remote(hub_class()(1))
        self.folder = folder / "arm"
        self.args = SimpleNamespace(run_dir="run")
        self.learn = learn
        self.started = 0
        self.there = folder / "there"
        for path in (self.folder / "episodes", self.there / "episodes"):
            path.mkdir(parents=True)
        self.prepare()
        self.inbox = HubInbox(self.ray, self.hub, self.there / "episodes")
        self.outbox = HubOutbox(self.ray, self.hub, self.there)

    def start(self):
        def run():
            try:
                self.learn(HubOutbox(self.ray, self.hub, self.there))
            except RayError as error:
                self.future.error = error

        self.started += 1
        self.sent = set()
        self.future = threading.Thread(target=run, daemon=True)
        self.future.error = None
        self.future.start()

    def begin(self):
        self.start()
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
    for module in (arm, arm_learner):
        monkeypatch.setattr(module, "PERIOD", 0.01)


def say(outbox, updates):
    outbox.publish(torch.zeros(3), {"updates": updates, "behind": 3})


# ---- why it ended


def test_a_learner_that_diverged_says_so_and_no_other_is_started(tmp_path):
    """Also where a note without a message follows: the hub keeps the last one only."""

    def learn(outbox):
        say(outbox, 500)
        outbox.send_last({"failed": "the critic returned a non-finite Q"})
        outbox.send({})

    far = Far(tmp_path, learn)
    far.begin()
    assert far.told() == "the learner stopped: the critic returned a non-finite Q"
    time.sleep(0.1)
    assert far.started == 1 and far.report() == {"updates": 500}
    far.close()


def crash(outbox):
    raise RayTaskError


@pytest.mark.parametrize(
    "end, reason", [(lambda outbox: None, "it ended although nobody"), (crash, "out of memory")]
)
def test_a_learner_that_ends_again_and_again_ends_the_run(end, reason, tmp_path):
    """Each makes the same updates again: they are no progress."""

    def learn(outbox):
        outbox.send({})
        say(outbox, 20)
        time.sleep(0.05)  # so that this is heard, too
        say(outbox, 40)
        end(outbox)

    far = Far(tmp_path, learn)
    far.begin()
    assert "fails again and again" in (told := far.told()) and reason in told
    assert arm.PATIENCE <= far.failures <= far.started
    far.close()


def test_failures_between_which_it_gets_on_are_forgiven(tmp_path):
    def learn(outbox):
        say(outbox, 20 * far.started)
        if far.started < 8:
            crash(outbox)
        while not far.closing:
            time.sleep(0.01)

    far = Far(tmp_path, learn)
    far.begin()
    assert far.told(2.0) is None and far.started == 8
    far.close()


def test_why_it_could_not_save_at_the_end_is_told(tmp_path, capfd):
    def learn(outbox):
        say(outbox, 20)
        while not far.closing:
            time.sleep(0.01)
        outbox.send_last({"failed": "the policy became non-finite"})

    far = Far(tmp_path, learn)
    far.begin()
    assert far.told(0.2) is None
    far.close()
    assert "the learner stopped: the policy became non-finite" in capfd.readouterr().err


def test_the_last_message_is_heard_where_the_weights_are_lost_with_their_machine(tmp_path):
    class Lost:
        @property
        def value(self):
            raise RayError

    far = Far(tmp_path)
    far.ray.put = lambda value: Lost()
    far.outbox.publish(torch.zeros(3), {"failed": "a non-finite Q"})
    with pytest.raises(RayError):
        far._exchange()
    assert far.told(0.1) == "the learner stopped: a non-finite Q"


@pytest.mark.parametrize("speaks, count", [(False, 1), (True, 0)])
def test_a_learner_that_cannot_begin_is_told_once(speaks, count, tmp_path, monkeypatch, capfd):
    """Another run may have its machine: Ray waits, and whoever stands at the arm should know."""
    monkeypatch.setattr(arm, "TIMEOUT", 0.2)

    def learn(outbox):
        if speaks:
            outbox.send({})
        time.sleep(1)
        say(outbox, 0)
        while not far.closing:
            time.sleep(0.01)

    far = Far(tmp_path, learn)
    far.args = dataclasses.make_dataclass("Args", ["resume", "learner"])(False, "gpu:6379")
    far.demonstrations, far.task = [], None
    assert far.pretrain(None)
    far.close()
    assert capfd.readouterr().err.count("has not begun") == count


def test_a_learner_that_stands_still_is_told_once_and_only_while_it_owes_an_answer(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(arm, "SILENT", 0.2)
    far = Far(tmp_path)
    say(far.outbox, 20)
    far._exchange()
    time.sleep(0.3)
    far.report()
    assert capfd.readouterr().err == ""  # nothing was asked
    path = far.folder / "episodes/episode_00000.hdf5"
    path.write_bytes(b"one")
    far.absorb(path)
    far._exchange()
    time.sleep(0.3)
    far._exchange()
    assert far.report() == {"updates": 20} == far.report()
    assert capfd.readouterr().err.count("the learner has said nothing") == 1
    far.outbox.send({"behind": 10})
    far._exchange()
    assert far.unanswered is None


def test_a_full_disk_there_is_not_taken_for_the_end_of_the_arm(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arm_learner, "write", full)
    far = Far(tmp_path)
    far.hub.push.remote("episode_00000.hdf5", b"")
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        far.inbox.get(0)


def test_the_end_of_the_run_ends_the_learner(tmp_path):
    far = Far(tmp_path)
    far.hub.push.remote("episode_00000.hdf5", np.frombuffer(b"one", np.uint8))
    far.hub.push.remote("", None)
    assert far.inbox.get(0) == far.there / "episodes/episode_00000.hdf5"
    with pytest.raises(EOFError):
        far.inbox.get(0)


# ---- which episodes it has


def exchange(far):
    """Let both ends work once; return the names the learner was told of and what is in them."""
    far.outbox.send({})
    far._exchange()
    time.sleep(2 * arm.PERIOD)
    told = []
    while (path := far.inbox.get(0)) is not None:
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
    far.sent = set()  # another learner in the same folder
    assert exchange(far) == []
    for path in (one, far.there / "episodes" / one.name):
        path.unlink()
    assert exchange(far) == []  # deleted at both ends


@dataclasses.dataclass
class Settings:
    run_dir: str = ""
    data: str = ""


def content(text):
    return np.frombuffer(text, np.uint8)


@pytest.fixture
def actor(tmp_path, monkeypatch):
    """Far whose learner is the real actor, up to the networks; and what that one found on disk."""
    far = Far(tmp_path)
    far.options, far.seen = {}, []
    folder = tmp_path / "runs/one"

    def learn(args, task, inbox, outbox):
        far.seen.append({path.name for path in (folder / "episodes").iterdir()})
        far.trained_on = Path(args.data)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", far.ray)
    stub = SimpleNamespace(pretrain=lambda save: None)
    monkeypatch.setattr(arm_learner, "Learner", lambda args, task: stub)
    monkeypatch.setattr(arm_learner, "learn", learn)
    remote = SimpleNamespace(remote=lambda: Remote(LearnerActor()))
    far.ray.remote = lambda kind: SimpleNamespace(options=lambda **_: remote)
    (folder / "episodes").mkdir(parents=True)
    return far


def test_a_learner_starts_without_what_the_arm_has_deleted_or_recorded_again(actor, tmp_path):
    """What it had is renamed, not lost; demonstrations are the arm's of today."""
    here = tmp_path / "runs/one/episodes"
    for number in range(3):
        for folder in (here, actor.folder / "episodes"):
            (folder / f"episode_0000{number}.hdf5").write_bytes(b"%d" % number)
    (actor.folder / "episodes/episode_00000.hdf5").unlink()
    (actor.folder / "episodes/episode_00002.hdf5").write_bytes(b"again")
    for data in (b"old", b"new"):
        actor.job = (Settings(), None, {"demo.hdf5": content(data)}, "one")
        RemoteLearner.start(actor)
    assert actor.seen[-1] == {"episode_00000.gone", "episode_00001.hdf5", "episode_00002.gone"}
    assert (here / "episode_00001.hdf5").read_bytes() == b"1"
    assert actor.trained_on == Path("runs/one/demos/demo.hdf5")
    assert actor.trained_on.read_bytes() == b"new"


def test_a_recording_that_the_arm_has_deleted_is_no_demonstration_any_more(actor):
    files = {f"episode_0000{number}.hdf5": content(b"%d" % number) for number in range(3)}
    for kept in ((0, 1, 2), (0, 2)):
        names = [f"episode_0000{number}.hdf5" for number in kept]
        actor.job = (Settings(), None, {name: files[name] for name in names}, "one")
        RemoteLearner.start(actor)
        assert sorted(path.name for path in actor.trained_on.glob("*.hdf5")) == names


def test_a_learner_that_cannot_use_its_files_says_why(actor, monkeypatch):
    def refuse(args, task):
        raise UserError("demos/episode_00000.hdf5 is damaged")

    monkeypatch.setattr(arm_learner, "Learner", refuse)
    actor.job = (Settings(), None, {"demo.hdf5": content(b"old")}, "one")
    RemoteLearner.start(actor)
    actor._exchange()
    assert actor.told(0.1) == "the learner stopped: demos/episode_00000.hdf5 is damaged"
    assert actor.seen == []
