"""An arm's learner on another machine: arms.learner.Background's calls, over Ray. The arm's computer is the driver.

    ray start --head --resources '{"learner": 1}'            # on the GPU machine, in a checkout
    ray start --address GPU:6379                             # on the arm's computer, whose keypad and bus stay its own
    python robot.py train --task insert-usb --learner GPU:6379

Files of episodes go there, weights come back, both by a thread of this process: control never waits for the network.
The learner keeps all that a restart needs under runs/ of the folder where its `ray start` ran: files, last.pt. If it
dies, that is told, the arm goes on with the weights it has, and a new learner continues from that checkpoint with the
episodes it missed. Here run_dir/last.pt is a copy of the newest one. cluster.py says what a token is for.
Not here: the learner itself (arms/learner.py), the control loop (robot.py).
"""
import collections
import contextlib
import dataclasses
import os
import sys
import threading
import time
import types
import uuid
from pathlib import Path

import numpy as np
import torch

from arms.episodes import digest, numbered
from arms.learner import Acting, Learner, networks, serve
from arms.pipe import unflatten
from logbook import Interrupt, UserError, load_checkpoint, replacing

from .cluster import TIMEOUT, connect, make_hub

PERIOD = 0.2                                   # seconds between exchanges
PATIENCE = 3                                   # failures in a row, with no new update between them, until the run ends


def read(path):
    return np.fromfile(path, np.uint8)


def write(path, data):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        data.tofile(file)


def set_aside(folder, episodes):
    """Rename the copies here of what the arm has deleted or recorded again, episodes = {name: digest} being all it has.

    What it has recorded again is then missing here and sent, and read as a new one.
    """
    for path in numbered(folder):
        if episodes.get(path.name) != digest(path):
            path.replace(path.with_suffix(".gone"))


# ---- there -----------------------------------------------------------------------------------------------------------

class Line:
    """What arms.learner.serve takes for its pipe, its shared vector and its version; here all three lead to the hub."""

    def __init__(self, ray, hub, folder):
        self.ray, self.hub, self.folder = ray, hub, folder
        self.value = self._call(hub.pull.remote(-1, 0))[0]           # it never falls, whoever learns
        self.vector, self.names, self.asked, self.stamp, self.checkpoint = None, collections.deque(), 0.0, None, None
        self.stats = {}

    def _call(self, reference):
        try:
            return self.ray.get(reference, timeout=TIMEOUT)
        except self.ray.exceptions.RayError as error:
            raise EOFError from error                                # serve() saves and ends

    def copy_(self, vector):
        self.vector = vector.numpy()

    def send(self, stats):
        """Weights, statistics, the episodes that are here, and the checkpoint if there is a newer one.

        The hub keeps the last note only, so it holds all that was ever said, last words above all.
        """
        self.stats |= stats
        last = self.folder / "last.pt"
        if last.exists() and last.stat().st_mtime_ns != self.stamp:
            self.stamp, self.checkpoint = last.stat().st_mtime_ns, [self.ray.put(read(last))]
        have = [(path.name, digest(path)) for path in numbered(self.folder / "episodes")]
        note = {"stats": self.stats, "have": have, "stamp": self.stamp, "checkpoint": self.checkpoint}
        weights = None if self.vector is None else [self.ray.put(self.vector)]
        self._call(self.hub.publish.remote(self.value, weights, [note]))

    def poll(self, seconds):
        if not self.names and time.monotonic() - self.asked > PERIOD:
            self.asked = time.monotonic()
            for name, data in self._call(self.hub.take.remote()):
                path = self.folder / "episodes" / name
                try:
                    if name:                                         # also over one that the arm has recorded again
                        write(path, data)
                except OSError as error:                             # serve() would take it for the end of the arm
                    raise UserError(f"cannot write {path} on its machine: {error.strerror}") from error
                self.names.append(os.fsencode(path) if name else b"")
        if not self.names:
            time.sleep(seconds)
        return bool(self.names)

    def recv_bytes(self):
        return self.names.popleft()


class Pupil:
    """What Ray makes an actor of: stage I if it is still to do, then arms.learner.serve."""

    def learn(self, hub, settings, task, demos, run, episodes):
        import ray
        folder = Path("runs") / run
        set_aside(folder / "episodes", episodes)
        for name, data in demos.items():
            write(folder / "demos" / name, data)
        data = folder / "demos" if len(demos) > 1 else folder / "demos" / next(iter(demos))
        settings = settings | {"run_dir": str(folder), "data": str(data)}
        line, last = Line(ray, hub, folder), folder / "last.pt"
        line.send({})                                                # it has begun
        learner = Learner(types.SimpleNamespace(**settings), task)
        if last.exists():
            learner.load_state_dict(load_checkpoint(last), folder / "episodes")

        def save(one):
            one.save(last)
            line.send({})

        learner.pretrain(save)
        del learner                                                  # serve() makes its own from last.pt
        serve(settings, task, line, line, contextlib.nullcontext(), line)
        line.send({})


# ---- here ------------------------------------------------------------------------------------------------------------

class Faraway:
    """The calls of Learner and Background that robot.py makes, for a learner on another node of the cluster."""

    absorbed = furthest = 0                                          # furthest: most updates of any learner so far
    heard = False

    def __init__(self, args, task):
        self.demos = numbered(args.data) if Path(args.data).is_dir() else [Path(args.data)]
        if not self.demos or not self.demos[0].exists():
            raise UserError(f"no demonstrations in {args.data}: python robot.py record --task {args.task} makes them")
        self.args, self.task, self.policies, self.folder = args, task, networks(args, task), Path(args.run_dir)
        self.ray = connect(args.learner)
        offered = [node["Resources"] for node in self.ray.nodes() if node["Alive"] and "learner" in node["Resources"]]
        if not offered:
            raise UserError(f"no machine of {args.learner} is a learner's: start Ray there with "
                            "ray start --head --resources '{\"learner\": 1}'")
        self.options = {"num_cpus": 1, "num_gpus": min(1, offered[0].get("GPU", 0)), "resources": {"learner": 1}}
        self.hub, self.future, self.paths, self.sent = make_hub(self.ray, 1), None, [], set()
        self.newest, self.used, self.stats, self.stamp = (0, None), 0, {}, None
        self.failures, self.error, self.silent, self.closing = 0, None, False, False

    def load_state_dict(self, state, folder):
        """Of a resumed run: the learner has its own, and robot.py announces all episodes, of which it takes the new."""

    def pretrain(self, save):
        """Start the learner and wait for its first weights: stage I is over there. False if the user interrupted."""
        mark = self.folder / "learner"                               # so that no other run's state is continued there
        if not (self.args.resume and mark.exists()):
            mark.write_text(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
        self.job = (dataclasses.asdict(self.args), self.task, {path.name: read(path) for path in self.demos},
                    mark.read_text())
        self._start()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        print(f"the learner works at {self.args.learner}, in runs/{self.job[-1]}: stage I first", flush=True)
        since = time.monotonic()
        with Interrupt() as interrupt:
            while self.newest[0] == 0 and not interrupt.stop:
                self.check()
                time.sleep(PERIOD)
                if not self.heard and time.monotonic() - since > TIMEOUT:
                    since = float("inf")
                    print("the learner has not begun within a minute: is another run's learner on that machine? This "
                          "one waits for its end, or for Ctrl-C", file=sys.stderr, flush=True)
        return self.newest[0] > 0

    def wait(self):
        self.pull()

    def absorb(self, path):
        if path not in self.paths:                                   # once is enough: _exchange() sees that it changed
            self.paths.append(path)

    def pull(self):
        """Take newer weights if they have arrived. Returns their version."""
        version, vector = self.newest
        if version != self.used:
            unflatten(torch.from_numpy(vector), self.policies)
            self.used = version
        return version

    def acting(self):
        return Acting(self.args, *self.policies)

    def report(self):
        return {name: value for name, value in self.stats.items() if name not in ("behind", "failed")}

    def check(self):
        if "failed" in self.stats:
            raise UserError(f"the learner stopped: {self.stats['failed']}")
        if self.failures >= PATIENCE:
            raise UserError(f"the learner fails again and again ({self.error}); every finished episode is on disk: "
                            f"python robot.py train --resume {self.args.run_dir}")

    def close(self):
        """Let it save and end, and fetch what it saved; at most a minute for each of these."""
        self.closing, told = True, "failed" in self.stats
        self.thread.join(TIMEOUT)
        try:
            self._exchange()                                         # episodes that are still to be sent
            self.ray.get(self.hub.push.remote("", None), timeout=TIMEOUT)
            self.ray.get(self.future, timeout=TIMEOUT)
            self._exchange()
        except (self.ray.exceptions.RayError, OSError) as error:
            self._tell(error)
        if "failed" in self.stats and not told:                      # it could not save
            print(f"the learner stopped: {self.stats['failed']}", file=sys.stderr)
        self.ray.kill(self.hub)

    def _start(self):
        episodes = {path.name: digest(path) for path in numbered(self.folder / "episodes")}
        self.actor = self.ray.remote(Pupil).options(**self.options).remote()     # kept: what it has put ends with it
        self.future, self.sent = self.actor.learn.remote(self.hub, *self.job, episodes), set()

    def _follow(self):
        while not self.closing:
            try:
                if self.ray.wait([self.future], timeout=0)[0]:
                    self._lost()
                self._exchange()
            except Exception as error:                               # whatever it is: this thread must not end silently
                self._tell(error)
            time.sleep(PERIOD)

    def _lost(self):
        """The learner has ended: take what it left, then start another; Ray waits for a machine that can."""
        with contextlib.suppress(self.ray.exceptions.RayError):      # what went with it
            self._exchange()
        if "failed" in self.stats:                                   # it has said that another would, too: see check()
            return
        try:
            self.ray.get(self.future, timeout=TIMEOUT)
            self._count(EOFError("it ended although nobody had told it to"))
        except self.ray.exceptions.RayTaskError as error:
            self._count(error.cause)
        except self.ray.exceptions.RayError as error:
            self._tell(error)
        self._start()

    def _count(self, error):
        """Its own mistake: another one may make it again."""
        self.failures, self.error = self.failures + 1, str(error)
        self._tell(error)

    def _tell(self, error):
        if not self.silent:
            self.silent = True
            print(f"the learner is lost or unreachable ({type(error).__name__}): the arm goes on with weights "
                  f"{self.newest[0]}, the learner from its own checkpoint when it is back", file=sys.stderr, flush=True)

    def _exchange(self):
        """What the hub has for us, then what the learner lacks."""
        version, weights, note = self.ray.get(self.hub.pull.remote(self.newest[0], 0), timeout=TIMEOUT)
        if note:                                                     # first: what it said counts, also where its
            self.heard = True                                        # weights went with it
            if (updates := note["stats"].get("updates", 0)) > self.furthest:     # not one that was only done again
                self.furthest, self.failures = updates, 0
            self.stats |= note["stats"]
        if weights:
            self.newest = version, np.array(self.ray.get(weights[0], timeout=TIMEOUT))
            if self.silent:
                self.silent = False
                print("the learner answers again", file=sys.stderr, flush=True)
        if not note:                                                 # it has not said anything yet
            return
        if note["checkpoint"] and note["stamp"] != self.stamp:
            write(self.folder / "last.pt", np.array(self.ray.get(note["checkpoint"][0], timeout=TIMEOUT)))
            self.stamp = note["stamp"]
        there = self.sent | set(note["have"])
        for path in list(self.paths):
            if (item := (path.name, digest(path))) not in there and item[1] is not None:     # None: deleted since
                self.ray.get(self.hub.push.remote(path.name, read(path)), timeout=TIMEOUT)
                self.sent.add(item)
