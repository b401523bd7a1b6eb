"""An arm's learner on another machine, over Ray. The arm's computer is the driver.

    ray start --head --resources '{"learner": 1}'     # on the GPU machine, in a checkout
    ray start --address GPU:6379                      # on the arm's computer
    python robot.py train --task insert-usb --learner GPU:6379
    from distributed.arm import RemoteLearner         # in place of arms.background's

Files of episodes go there and weights come back, both by a thread here: control never waits for the
network. The learner keeps what a restart needs, files and last.pt, in runs/ of the folder where its
`ray start` ran. If it dies, the operator is told and the arm goes on with the weights it has. A new
learner continues from that checkpoint with the episodes it missed. run_dir/last.pt here is a copy
of the newest one. cluster.py says what a token is for.
Not here: the other side (arm_learner.py), the control loop (arms/rig.py).
"""

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arms.background import SILENT
from arms.episodes import Layout, digest
from arms.learner import make_policy, recordings
from arms.pipe import unflatten
from logbook import Clock, Interrupt, UserError
from train_offline import Acting
from train_online import POCO

from .arm_learner import PERIOD, LearnerActor, digests, read, write
from .cluster import TIMEOUT, connect, make_hub

PATIENCE = 3  # failures in a row, without a new update in between, until the run ends


class RemoteLearner:
    """A learner on another node of the cluster, with the calls of Learner and BackgroundLearner."""

    absorbed = 0  # robot.py announces every episode, and the learner takes those it has not got

    def __init__(self, args: Any, task: Layout):
        self.demonstrations = recordings(args)
        self.args = args
        self.task = task
        self.folder = Path(args.run_dir)
        self.agent = POCO(args, make_policy(args, task), Clock())  # acts, does not learn
        self.networks = [self.agent.actor, self.agent.critic]
        self.ray = connect(args.learner)
        self.options = learner_options(self.ray, args.learner)
        self.hub = make_hub(self.ray, 1)
        self.prepare()

    def prepare(self) -> None:
        """Set what the exchange with the hub begins with."""
        self.future: Any = None  # of the actor's call
        self.paths: list[Path] = []  # announced episodes
        self.sent: set[tuple[str, str | None]] = set()  # (name, digest), to this learner
        self.newest: tuple[int, np.ndarray | None] = (0, None)  # version, weights
        self.version = 0  # of the weights that act
        self.stats: dict[str, Any] = {}
        self.count = 0  # of the learner's last note
        self.stamp: int | None = None  # of the copied checkpoint
        self.furthest = 0  # most updates of any learner so far
        self.failures = 0
        self.error = ""
        self.has_begun = False
        self.is_lost = False
        self.closing = False
        self.unanswered: float | None = None  # since when the learner owes an answer
        self.warned_of_silence = False

    # ---- what robot.py calls

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Leave a resumed run's checkpoint to the learner, which has its own."""

    def pretrain(self, save: Callable) -> bool:
        """Start the learner, wait for its first weights: stage I is there. False if interrupted."""
        name = self.folder / "learner"  # so that no other run's state is continued there
        if not (self.args.resume and name.exists()):
            name.write_text(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
        files = {path.name: read(path) for path in self.demonstrations}
        self.job = (self.args, self.task, files, name.read_text())
        self.start()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        where = f"runs/{self.job[-1]}"
        print(f"the learner works at {self.args.learner}, in {where}: stage I first", flush=True)
        patience = time.monotonic() + TIMEOUT
        with Interrupt() as interrupt:
            while self.newest[0] == 0 and not interrupt.stop:
                self.check()
                time.sleep(PERIOD)
                if not self.has_begun and time.monotonic() > patience:
                    patience = float("inf")
                    print(
                        "the learner has not begun within a minute: is another run's learner on "
                        "that machine? This one waits for its end, or for Ctrl-C",
                        file=sys.stderr,
                        flush=True,
                    )
        return self.newest[0] > 0

    def wait(self, interrupt: Interrupt) -> None:
        """Take the first weights, which `pretrain` has waited for."""
        self.pull()

    def absorb(self, path: Path) -> None:
        """Announce an episode; once is enough, the exchange sees when its file changes."""
        if path not in self.paths:
            self.paths.append(path)

    def pull(self) -> int:
        """Take newer weights if they have arrived. Returns their version."""
        version, vector = self.newest
        if version != self.version:
            unflatten(torch.from_numpy(vector), self.networks)
            self.version = version
        return version

    def acting(self) -> Acting:
        return self.agent.acting(self.args.act)

    def report(self) -> dict[str, float]:
        """Return what the learner said last."""
        since = self.unanswered
        if since is not None and time.monotonic() - since > SILENT and not self.warned_of_silence:
            self.warned_of_silence = True
            print(
                f"the learner has said nothing for {SILENT:.0f} s: the arm goes on with weights "
                f"{self.version}",
                file=sys.stderr,
            )
        return {
            name: value for name, value in self.stats.items() if name not in ("behind", "failed")
        }

    def check(self) -> None:
        """Raise UserError if the learner cannot go on."""
        if "failed" in self.stats:
            raise UserError(f"the learner stopped: {self.stats['failed']}")
        if self.failures >= PATIENCE:
            raise UserError(
                f"the learner fails again and again ({self.error}); every finished episode is on "
                f"disk: python robot.py train --resume {self.args.run_dir}"
            )

    def close(self) -> None:
        """Let it save and end, and fetch what it saved; at most a minute for each of these."""
        said_why = "failed" in self.stats
        self.closing = True
        self.thread.join(TIMEOUT)
        try:
            self._exchange()  # episodes that are still to be sent
            self.ray.get(self.hub.push.remote("", None), timeout=TIMEOUT)
            self.ray.get(self.future, timeout=TIMEOUT)
            self._exchange()
        except (self.ray.exceptions.RayError, OSError) as error:
            self._tell_loss(error)
        if "failed" in self.stats and not said_why:  # it could not save
            print(f"the learner stopped: {self.stats['failed']}", file=sys.stderr)
        self.ray.kill(self.hub)

    # ---- the thread

    def start(self) -> None:
        """Start a learner; Ray waits for a machine that can be one."""
        actor = self.ray.remote(LearnerActor).options(**self.options).remote()
        self.actor = actor  # kept: what it has put ends with it
        episodes = dict(digests(self.folder / "episodes"))
        self.future = actor.learn.remote(self.hub, *self.job, episodes)
        self.sent = set()

    def _follow(self) -> None:
        while not self.closing:
            try:
                if self.ray.wait([self.future], timeout=0)[0]:
                    self._restart()
                self._exchange()
            except Exception as error:  # of any kind: this thread must not end silently
                self._tell_loss(error)
            time.sleep(PERIOD)

    def _restart(self) -> None:
        """Take what the learner left that has ended, then start another."""
        with contextlib.suppress(self.ray.exceptions.RayError):  # what went with it
            self._exchange()
        if "failed" in self.stats:  # another one would fail, too: see check()
            return
        try:
            self.ray.get(self.future, timeout=TIMEOUT)
            self._count_failure(EOFError("it ended although nobody had told it to"))
        except self.ray.exceptions.RayTaskError as error:
            self._count_failure(error.cause)
        except self.ray.exceptions.RayError as error:
            self._tell_loss(error)
        self.start()

    def _count_failure(self, error: BaseException) -> None:
        """Count the learner's own mistakes: another one may make the same."""
        self.failures += 1
        self.error = str(error)
        self._tell_loss(error)

    def _tell_loss(self, error: BaseException) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        print(
            f"the learner is lost or unreachable ({type(error).__name__}): the arm goes on with "
            f"weights {self.newest[0]}, the learner from its own checkpoint when it is back",
            file=sys.stderr,
            flush=True,
        )

    def _exchange(self) -> None:
        """Take what the hub has, then send what the learner lacks."""
        call = self.hub.pull.remote(self.newest[0], 0)
        version, weights, note = self.ray.get(call, timeout=TIMEOUT)
        if note:  # first: what it said counts even where its weights are lost with it
            self._heed(note)
        if weights:
            self.newest = (version, np.array(self.ray.get(weights[0], timeout=TIMEOUT)))
            if self.is_lost:
                self.is_lost = False
                print("the learner answers again", file=sys.stderr, flush=True)
        if not note:  # it has not said anything yet
            return
        if note["checkpoint"] and note["stamp"] != self.stamp:
            data = self.ray.get(note["checkpoint"][0], timeout=TIMEOUT)
            write(self.folder / "last.pt", np.array(data))
            self.stamp = note["stamp"]
        self._send_missing(set(note["have"]))

    def _heed(self, note: dict[str, Any]) -> None:
        self.has_begun = True
        self.stats = self.stats | note["stats"]
        updates = note["stats"].get("updates", 0)
        if updates > self.furthest:  # not one that was only done again
            self.furthest = updates
            self.failures = 0
        if note["count"] != self.count:
            self.count = note["count"]
            self.unanswered = None

    def _send_missing(self, there: set[tuple[str, str | None]]) -> None:
        for path in list(self.paths):
            item = (path.name, digest(path))
            if item in there or item in self.sent or item[1] is None:  # None: deleted since
                continue
            self.ray.get(self.hub.push.remote(path.name, read(path)), timeout=TIMEOUT)
            self.sent.add(item)
            if self.unanswered is None:
                self.unanswered = time.monotonic()


def learner_options(ray: Any, address: str) -> dict[str, Any]:
    """Return what Ray needs to place the learner. UserError if no machine offers to learn."""
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"] and "learner" in resources:
            gpus = min(1, resources.get("GPU", 0))
            return {"num_cpus": 1, "num_gpus": gpus, "resources": {"learner": 1}}
    raise UserError(
        f"no machine of {address} is a learner's: start Ray there with "
        "ray start --head --resources '{\"learner\": 1}'"
    )
