"""An arm's learner in its own process: nobody listens for a while, it does not end, its last words.

    python -m pytest tests/test_learner.py

Not here: what it learns and how its death is told (test_robot_runs.py, test_robot_care.py).
"""
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arms import learner as module
from arms.learner import STATS, Background
from logbook import UserError

OWED = 20_000


class Quick:
    """A learner whose updates cost nothing."""

    absorbed = updates = 0

    def __init__(self, args, task):
        self.actor, self.critic = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def load_state_dict(self, state, folder):
        pass

    def owed(self):
        return OWED - self.updates

    def update(self):
        self.updates += 1

    def report(self):
        return dict.fromkeys(STATS, 0.0) | {"updates": self.updates}

    def save(self, path):
        path.write_text(str(self.updates))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts such a learner in a forked process, so that it is the one given here."""
    made, context = [], multiprocessing.get_context("fork")

    def begin(learner=Quick):
        for name, value in (("Learner", learner), ("load_checkpoint", lambda path: {}),
                            ("networks", lambda args, task: (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))),
                            ("multiprocessing", SimpleNamespace(get_context=lambda name: context)),
                            ("dataclasses", SimpleNamespace(asdict=vars))):
            monkeypatch.setattr(module, name, value)
        args = SimpleNamespace(run_dir=str(tmp_path), threads=1, save_every=OWED)
        made.append(Background(args, None))
        return made[-1]
    yield begin
    for one in made:
        one.process.kill()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_it_learns_on_while_nobody_listens_and_ends_at_once(start, tmp_path):
    """A thousand messages are more than a pipe holds; the last one comes through as soon as there is room."""
    background = start()
    until(lambda: background.version.value > OWED // 20)
    until(lambda: background.report().get("updates") == OWED, 10)
    background = start()
    until(lambda: background.version.value > OWED // 20)
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
        time.sleep(0.5)                                                            # too many would come soon, too
        until(lambda: background.report().get("updates", 0) >= updates, 10)
        background.check()
        assert background.report()["updates"] == updates


def test_what_does_not_end_is_killed_and_told(start, monkeypatch, capfd):
    class Stuck(Quick):
        def update(self):
            time.sleep(1000)
    monkeypatch.setattr(module, "LAST", 0.3, raising=False)
    background = start(Stuck)
    until(lambda: background.version.value == 1)
    background.close()
    assert not background.process.is_alive() and "was killed" in capfd.readouterr().err


@pytest.mark.parametrize("ask", [Background.report, Background.check])
def test_its_last_words_are_heard_after_its_end(ask, start, capfd):
    class Diverging(Quick):
        def update(self):
            raise ValueError("a non-finite Q")
    background = start(Diverging)
    background.process.join(60)
    with pytest.raises(UserError, match="the learner stopped: a non-finite Q"):
        ask(background)
    background.close()
    assert not capfd.readouterr().err                                              # once is enough


def test_why_it_could_not_save_at_the_end_is_told(start, capfd):
    class Spoilt(Quick):
        def save(self, path):
            raise UserError("the policy became non-finite")
    background = start(Spoilt)
    until(lambda: background.version.value >= 1)
    background.close()
    assert capfd.readouterr().err == "the learner stopped: the policy became non-finite\n"
