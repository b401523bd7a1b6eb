"""An arm's learner in its own process: nobody listens for a while, it does not end, it dies.

    python -m pytest tests/robot/test_background.py

Not here: what it learns (test_learner.py), how its death ends a session (test_session.py).
"""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from arm_data import TASK, settings, write_episode

from arms import background as module
from arms.background import STARVED, BackgroundLearner, learn
from arms.learner import Learner
from arms.pipe import SharedWeights
from logbook import UserError
from train_online import POCO

OWED = 20_000


class Networks:
    """What stands for POCO: two networks of one number each."""

    def __init__(self, *_):
        self.actor = torch.nn.Linear(1, 1)
        self.critic = torch.nn.Linear(1, 1)


class Quick:
    """A learner whose updates cost nothing."""

    absorbed = updates = 0

    def __init__(self, args, task):
        self.args = args
        self.agent = Networks()

    def load_state_dict(self, state, folder):
        pass

    def owed(self):
        return OWED - self.updates

    def update(self):
        self.updates += 1

    def report(self):
        return dict.fromkeys(POCO.stats, 0.0) | {"updates": self.updates}

    def save(self, path):
        path.write_text(str(self.updates))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts such a learner in a forked process, so that it is the one given here."""
    made, context = [], multiprocessing.get_context("fork")

    def begin(learner=Quick):
        for name, value in (
            ("Learner", learner),
            ("load_checkpoint", lambda path: {}),
            ("make_policy", lambda args, task: None),
            ("POCO", Networks),
            ("multiprocessing", SimpleNamespace(get_context=lambda name: context)),
        ):
            monkeypatch.setattr(module, name, value)
        args = SimpleNamespace(run_dir=str(tmp_path), threads=1, save_every=OWED)
        made.append(BackgroundLearner(args, None))
        return made[-1]

    yield begin
    for one in made:
        one.process.kill()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


# ---- messages


def test_it_learns_on_while_nobody_listens_and_ends_at_once(start, tmp_path):
    """A thousand messages are more than a pipe holds; the last comes once there is room."""
    background = start()
    until(lambda: background.pull() > OWED // 20)
    until(lambda: background.report().get("updates") == OWED, 10)
    background = start()
    until(lambda: background.pull() > OWED // 20)
    since = time.monotonic()
    background.close()
    assert time.monotonic() - since < 5 and background.process.exitcode == 0
    assert (tmp_path / "last.pt").read_text() == str(OWED)


def test_a_number_used_again_is_another_episode_and_a_deleted_one_is_none(start, tmp_path):
    class Reading(Quick):
        def add(self, path):
            Path(path).read_bytes()
            self.absorbed += 1

        def owed(self):
            return 2 * self.absorbed - self.updates

    background, path = start(Reading), tmp_path / "episodes/episode_00000.hdf5"
    path.parent.mkdir()
    for content, updates in ((b"one", 2), (b"one", 2), (b"again", 4), (None, 4), (b"back", 6)):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        background.absorb(path)
        time.sleep(0.5)  # too many would come soon, too
        until(lambda updates=updates: background.report().get("updates", 0) >= updates, 10)
        background.check()
        assert background.report()["updates"] == updates


class Pipe:
    def __init__(self, *messages):
        self.messages = list(messages)

    def poll(self):
        return bool(self.messages)

    def recv(self):
        return self.messages.pop(0)


def silent_learner():
    background = BackgroundLearner.__new__(BackgroundLearner)
    background.stats, background.warned, background.unanswered = {}, set(), None
    background.args, background.version = SimpleNamespace(run_dir="run"), 7
    background.process = SimpleNamespace(pid=4711)
    background.connection = Pipe()
    return background


def test_a_learner_that_falls_behind_is_told_once(capfd):
    background = silent_learner()
    for behind in (STARVED, STARVED + 1, 10, 2 * STARVED):
        background.connection = Pipe({"updates": 3, "behind": behind})
        assert background.report() == {"updates": 3}
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"{STARVED + 1} updates behind" in err
    assert "--updates-per-step" in err


def test_a_learner_that_stands_still_is_told_once_and_only_while_it_owes_an_answer(
    monkeypatch, capfd
):
    monkeypatch.setattr(module, "SILENT", 0.1)
    background = silent_learner()
    background.connection.send_bytes = lambda name: None
    background.connection = Pipe()
    background.connection.send_bytes = lambda name: None
    background.report()
    time.sleep(0.2)
    background.report()
    assert capfd.readouterr().err == ""  # nothing was asked
    background.absorb(Path("episode"))
    time.sleep(0.2)
    background.absorb(Path("another"))
    background.report()
    background.report()
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "goes on with weights 7. Was its process 4711 stopped" in err
    background.connection.messages.append({"behind": 3})
    background.report()
    assert background.unanswered is None


def test_a_stopped_process_is_told_and_does_not_stop_the_session(start, monkeypatch, capfd):
    monkeypatch.setattr(module, "SILENT", 0.5)
    monkeypatch.setattr(module, "END", 0.5)
    background = start()
    until(lambda: background.pull() > 0)
    os.kill(background.process.pid, signal.SIGSTOP)
    until(lambda: "updates" in background.report())
    since = time.monotonic()
    background.absorb(Path("episode"))
    time.sleep(0.7)
    assert background.report()["updates"] > 0 and background.pull() > 0
    background.check()
    background.close()
    assert time.monotonic() - since < 10 and not background.process.is_alive()
    err = capfd.readouterr().err
    assert "has said nothing" in err and "was killed" in err


# ---- the beginning


def waiting():
    """A learner whose process lives and has published nothing."""
    background = silent_learner()
    background.networks = [torch.nn.Linear(2, 1)]
    background.weights = SharedWeights(background.networks, multiprocessing.get_context("fork"))
    background.version = 0
    background.process = SimpleNamespace(join=time.sleep, is_alive=lambda: True)
    return background


def test_the_arm_waits_for_weights_that_are_just_being_written():
    """The count is odd while the learner writes, for long where it gets no processor."""
    background = waiting()
    waited = []

    def join(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            background.weights.count.value += 1

    background.process.join = join
    background.weights.count.value += 1
    background.weights.vector.fill_(1.0)
    background.wait(SimpleNamespace(stop=False))
    assert len(waited) == 3 and background.version == 1
    assert (background.networks[0].weight == 1).all()


def test_waiting_for_a_learner_that_stands_still_ends_at_an_interrupt():
    background, interrupt = waiting(), SimpleNamespace(stop=False)
    threading.Timer(0.5, lambda: setattr(interrupt, "stop", True)).start()
    since = time.monotonic()
    background.wait(interrupt)
    assert time.monotonic() - since < 5


def test_a_learner_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(module, "START", 0.3)
    with pytest.raises(UserError, match="has not started within five minutes"):
        waiting().wait(SimpleNamespace(stop=False))


# ---- the end


def test_what_does_not_end_is_killed_and_told(start, monkeypatch, capfd):
    class Stuck(Quick):
        def update(self):
            time.sleep(1000)

    monkeypatch.setattr(module, "END", 0.3)
    background = start(Stuck)
    until(lambda: background.pull() == 1)
    background.close()
    assert not background.process.is_alive() and "was killed" in capfd.readouterr().err


@pytest.mark.parametrize("ask", [BackgroundLearner.report, BackgroundLearner.check])
def test_its_last_message_is_heard_after_its_end(ask, start, capfd):
    class Diverging(Quick):
        def update(self):
            raise ValueError("a non-finite Q")

    background = start(Diverging)
    background.process.join(60)
    with pytest.raises(UserError, match="the learner stopped: a non-finite Q"):
        ask(background)
    background.close()
    assert not capfd.readouterr().err  # once is enough


def test_why_it_could_not_save_at_the_end_is_told(start, capfd):
    class Spoilt(Quick):
        def save(self, path):
            raise UserError("the policy became non-finite")

    background = start(Spoilt)
    until(lambda: background.pull() >= 1)
    background.close()
    assert capfd.readouterr().err == "the learner stopped: the policy became non-finite\n"


def test_a_learner_that_cannot_begin_says_why(start):
    class Unwilling(Quick):
        def __init__(self, args, task):
            raise UserError("demos/episode_00000.hdf5 is damaged")

    background = start(Unwilling)
    background.process.join(60)
    with pytest.raises(UserError, match="the learner stopped: .*00000.hdf5 is damaged"):
        background.wait(SimpleNamespace(stop=False))


def test_a_learner_that_diverged_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    write_episode(tmp_path / "demos", 0)
    args = settings(tmp_path)
    path, said = tmp_path / "run/last.pt", []
    path.parent.mkdir()
    Learner(args, TASK).save(path)
    good = path.read_bytes()

    def diverge(learner):
        learner.agent.critic.out.bias.data.fill_(float("nan"))
        raise ValueError("the critic returned a non-finite Q")

    monkeypatch.setattr(Learner, "update", diverge)
    monkeypatch.setattr(Learner, "owed", lambda learner: 1)
    inbox = SimpleNamespace(get=lambda seconds: None)
    outbox = SimpleNamespace(
        publish=lambda vector, message: said.append(message),
        flush=lambda: None,
        send_last=said.append,
    )
    learn(args, TASK, inbox, outbox)
    assert (
        "a non-finite Q" in said[-1]["failed"] and "last.pt is the last good" in said[-1]["failed"]
    )
    assert path.read_bytes() == good
