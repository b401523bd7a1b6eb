"""A Learner in a second process, so that the 15 Hz loop of an arm never waits for an update.

    from arms.background import BackgroundLearner
    learner = BackgroundLearner(args, task)       # goes on from run_dir/last.pt
    learner.wait(interrupt)                       # for the first weights
    learner.absorb(path)                          # announces an episode; returns at once
    version = learner.pull()                      # takes newer weights, if there are any
    chunk = learner.acting()(obs[None], rng)      # obs (D,) -> (H, A)
    learner.close()                               # saves

An episode reaches the process as the path of its file; weights come back as one shared vector.
Starting takes a few seconds.
Not here: what is learnt (learner.py), a learner on another machine (distributed/arm.py).

Shapes: D observation, H chunk, A action.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from logbook import Clock, Interrupt, UserError, load_checkpoint
from train_offline import Acting
from train_online import POCO

from .episodes import Layout, digest, numbered
from .learner import Learner, make_policy
from .pipe import Inbox, Outbox, SharedWeights, flat, unflatten

PUBLISH_EVERY = 20  # updates between two sets of weights
STARVED = 1000  # updates that the learner is behind when the operator is told
SILENT = 120.0  # seconds without an answer after which the operator is told
START = 300.0  # seconds that the process may take to start
END = 10.0  # seconds that it may take to save and end


class BackgroundLearner:
    """A Learner in a process of lower priority. No call but `wait` and `close` waits for it."""

    def __init__(self, args: Any, task: Layout):
        self.args = args
        self.agent = POCO(args, make_policy(args, task), Clock())  # acts, does not learn
        self.networks = [self.agent.actor, self.agent.critic]
        self.version = 0
        self.stats: dict[str, float] = {}
        self.unanswered: float | None = None  # since when the learner owes an answer
        self.warned: set[str] = set()
        context = multiprocessing.get_context("spawn")
        self.weights = SharedWeights(self.networks, context)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=learn_beside,
            name="learner",
            daemon=True,
            args=(args, task, theirs, self.weights),
        )
        self.process.start()
        theirs.close()

    def wait(self, interrupt: Interrupt) -> None:
        """Wait for the first weights, or for Ctrl-C. UserError if the process dies first."""
        end = time.monotonic() + START
        while self.pull() == 0 and not interrupt.stop:
            self.process.join(0.05)
            self.check()
            if time.monotonic() > end:
                raise UserError(
                    "the learner has not started within five minutes: is the machine overloaded?"
                )

    def absorb(self, path: Path) -> None:
        """Tell the learner of one more episode on disk."""
        if self.unanswered is None:
            self.unanswered = time.monotonic()
        try:
            self.connection.send_bytes(os.fsencode(path))
        except OSError:
            self._refuse_death()

    def pull(self) -> int:
        """Take newer weights, if there are any that can be read now. Returns their version."""
        self.version, vector = self.weights.pull(self.version)
        if vector is not None:
            unflatten(vector, self.networks)
        return self.version

    def acting(self) -> Acting:
        return self.agent.acting(self.args.act)

    def report(self) -> dict[str, float]:
        """Return what the learner said last. UserError if that was why it stopped."""
        try:
            self._listen()
        except (EOFError, OSError):
            self._refuse_death()
        behind = self.stats.pop("behind", 0)
        if behind > STARVED:
            self._warn(
                "starved",
                f"the learner is {behind} updates behind the steps, so the policy improves late: "
                "pause (space), end other programs, or lower --updates-per-step",
            )
        if self.unanswered is not None and time.monotonic() - self.unanswered > SILENT:
            self._warn(
                "silent",
                f"the learner has said nothing for {SILENT:.0f} s: the arm goes on with weights "
                f"{self.version}. Was its process {self.process.pid} stopped?",
            )
        return self.stats

    def check(self) -> None:
        """Raise UserError if the learner's process has ended."""
        if not self.process.is_alive():
            self._refuse_death()

    def close(self) -> None:
        """Let the learner save and end; kill it after END seconds: last.pt stays whole."""
        said_why = "failed" in self.stats
        with contextlib.suppress(OSError):
            self.connection.send_bytes(b"")
        self.process.join(END)
        if self.process.is_alive():
            self.process.kill()  # it ignores SIGTERM
            self.process.join()
            print(
                f"the learner did not end within {END:.0f} s and was killed: what it has learnt "
                "since it last saved is lost, no episode is",
                file=sys.stderr,
            )
        if said_why:  # then the run ends because of it
            return
        try:
            self._listen()  # why it could not save, for example
        except UserError as error:
            print(error, file=sys.stderr)
        except (EOFError, OSError):
            pass

    def _listen(self) -> None:
        """Read all messages; EOFError or OSError where the pipe ends."""
        try:
            while self.connection.poll():
                self.stats |= self.connection.recv()
                self.unanswered = None
        finally:  # also where the pipe ends after the last message
            if "failed" in self.stats:
                raise UserError(f"the learner stopped: {self.stats['failed']}") from None

    def _refuse_death(self) -> None:
        self.process.join(5)
        with contextlib.suppress(EOFError, OSError):
            self._listen()  # its last message, if there was one
        raise UserError(
            f"the learner process has died (exit code {self.process.exitcode}); every finished "
            f"episode is on disk: python robot.py train --resume {self.args.run_dir}"
        )

    def _warn(self, about: str, text: str) -> None:
        """Tell the operator once."""
        if about not in self.warned:
            self.warned.add(about)
            print(text, file=sys.stderr)


def learn_beside(args: Any, task: Layout, connection: Any, weights: SharedWeights) -> None:
    """Run the second process: of low priority, deaf to the signals that are the arm's to obey."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    learn(args, task, Inbox(connection), Outbox(connection, weights))


def learn(args: Any, task: Layout, inbox: Any, outbox: Any) -> None:
    """Go on from run_dir/last.pt until the inbox ends; save then, and now and again before.

    inbox, outbox: see pipe.py; distributed/arm.py has others with the same members.
    """
    torch.set_num_threads(args.threads)
    path = Path(args.run_dir) / "last.pt"
    folder = Path(args.run_dir) / "episodes"
    try:
        learner = Learner(args, task)
        learner.load_state_dict(load_checkpoint(path), folder)
        for late in numbered(folder)[learner.absorbed :]:
            learner.add(late)
        with contextlib.suppress(EOFError, OSError):  # the end, or the arm's process is gone
            follow(learner, folder, path, inbox, outbox)
        learner.save(path)
        return
    except UserError as error:  # diverged, as `save` noticed and says
        reason = str(error)
    except ValueError as error:  # or as the E-step did
        reason = f"{error}. {path} is the last good checkpoint"
    with contextlib.suppress(EOFError, OSError):
        outbox.send_last({"failed": reason})


def follow(learner: Learner, folder: Path, path: Path, inbox: Any, outbox: Any) -> None:
    """Add episodes as they are announced and learn while updates are owed. Ends by EOFError."""
    known = {str(name): digest(name) for name in numbered(folder)[: learner.absorbed]}
    publish(learner, outbox)
    while True:
        due = learner.owed() > 0
        outbox.flush()
        episode = inbox.get(0 if due else 0.2)
        if episode is not None:
            found = digest(episode)
            # An episode may have been deleted since, or announced twice, or recorded again.
            if found is not None and found != known.get(str(episode)):
                learner.add(episode)
                known[str(episode)] = found
            outbox.send({"behind": learner.owed()})
        if due:
            learner.update()
            if learner.updates % PUBLISH_EVERY == 0 or learner.owed() == 0:
                publish(learner, outbox)
            if learner.updates % learner.args.save_every == 0:
                learner.save(path)


def publish(learner: Learner, outbox: Any) -> None:
    """Publish what acts, with the statistics so far."""
    vector = flat([learner.agent.actor, learner.agent.critic])
    outbox.publish(vector, learner.report() | {"behind": learner.owed()})
