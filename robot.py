"""POCO on an arm (paper Sec. V-B, Table III), and on the same arm without hardware: record, train, eval.

    python robot.py record --task insert-usb                       # 30 demonstrations on the simulated arm, 1 minute
    python robot.py train --task insert-usb --no-realtime          # stage I, warm-up, POCO; 20 minutes on two cores
    python robot.py eval --task insert-usb --no-realtime           # the delivered policy, alone
    python robot.py record --task pick-cube --robot piper --teleop arms.piper:PiperLeader --box-center 30 0 20
    python robot.py train --task pick-pen --backbone DIR --no-realtime        # a flow head on a vision-language model
    python robot.py train --resume runs/pick-cube-robot-s0         # after a kill at most the running episode is lost

`--robot package.module:Class` drives any LeRobot robot that speaks of joint_1.pos .. joint_6.pos (see Arm). Every
command passes the Guard; the learner has a process of its own, so that the 15 Hz loop never waits for it. Before the
first motion read arms/README.md: a hardware emergency stop is mandatory, position control has no compliance.
Writes runs/<task>-robot-s<seed>/: args.json, progress.csv, eval.csv, episodes/*.hdf5, last.pt, curve.png.
Not here: drivers and kinematics (arms/), keys (arms/keypad.py), files of episodes (arms/episodes.py), stages I and II
themselves (arms/learner.py), the head on a backbone (vla_head.py), compliance, force sensing, learnt rewards.
Shapes: A = 7 is shift xyz, turn xyz, gripper, each in [-1, 1]; H chunk, D observation. SI units inside, cm in Args.
"""
import collections
import contextlib
import dataclasses
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from arms.episodes import Take, layout, length, merge, numbered, outcome, reach, refuse_loss
from arms.keypad import HELP, open_keypad
from arms.kinematics import Kinematics, rotation_vector
from arms.learner import STATS, Background, Learner, trained
from arms.senses import JOINTS, PERIOD, Pace, Senses, rotation_matrix
from arms.settings import open_arm, open_eyes, parse
from distributed.arm import Faraway
from logbook import Interrupt, Logbook, UserError, cli, curve

OPEN = 0.07                                    # gripper opening in metres at action +1
SLACK = 1.02                                   # limits are this much wider than what a full action asks for


class Arm(Protocol):
    """What a driver offers: the ten members of every LeRobot robot; lerobot itself is never imported.

    Action keys joint_1.pos .. joint_6.pos (rad) and gripper.pos (m). An observation has the same, `stamp`
    (time.monotonic() of the measurement) and cameras as HWC uint8 arrays, each with NAME.stamp if it can. Optional:
    reset(seed) and success() of a simulated arm, object.* floats, rest (6,) joints, kinematics. disconnect must not
    let the arm fall.
    """

    observation_features: dict[str, Any]       # NAME: float, or (height, width, 3) of a camera
    action_features: dict[str, Any]
    is_connected: bool
    is_calibrated: bool
    def connect(self, calibrate: bool = True) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
    def get_observation(self) -> dict[str, Any]: ...
    def send_action(self, action: dict[str, float]) -> dict[str, float]: ...          # what was really sent
    def disconnect(self) -> None: ...


# ---- the guard -------------------------------------------------------------------------------------------------------

class Guard:
    """Turns policy actions into joint targets that keep every limit; scales and counts, never raises once started.

    A target is inside the joint ranges, its tool inside `box` (2, 3) metres and within `cone` radians of `axis` (3,);
    from one target to the next no joint, no shift and no turn exceeds its limit. If IK or rounding would break one, the
    step is shortened until none is; a step of zero always is allowed, because the last target was. The target also
    stays on a leash: where the measured tool lags further behind, as in contact, it walks back to it.
    """

    def __init__(self, kinematics, box, axis, *, cone, max_step, max_turn, max_joint_speed, leash):
        self.kinematics, self.box, self.axis = kinematics, np.asarray(box, float), np.asarray(axis, float)
        self.cone, self.max_step, self.max_turn, self.leash = cone, max_step, max_turn, leash
        self.max_joint_step, self.low, self.high = max_joint_speed * PERIOD, *np.asarray(kinematics.limits).T
        self.max_grip_step = OPEN / 4                                      # closes in a quarter of a second
        self.counts, self.joints, self.gripper = collections.Counter(), None, 0.0

    def start(self, joints, gripper):
        """The first target is the measured pose: joints (6,), gripper. UserError if that is outside the limits."""
        target = np.clip(joints, self.low, self.high)
        if not _finite(joints, 6) or not np.isfinite(gripper) or np.abs(target - joints).max() > 0.05:
            raise UserError(f"the arm reports joints {np.round(joints, 3)}, outside its own ranges: check its zero")
        if wrong := self.outside(target):
            place, box = self.kinematics.fk(target)[0] * 100, self.box * 100
            raise UserError(f"the arm starts outside its limits ({wrong}): tool at {np.round(place, 1)} cm, box "
                            f"{np.round(box[0], 1)} to {np.round(box[1], 1)} cm. Move it inside by hand, or --recover")
        self.joints, self.gripper = target, float(np.clip(gripper, 0, OPEN))

    def outside(self, joints):
        """Name of the limit of place that these joints (6,) break, or None."""
        place, turn = self.kinematics.fk(joints)
        if (joints < self.low).any() or (joints > self.high).any():
            return "joint range"
        if (place < self.box[0] - 1e-9).any() or (place > self.box[1] + 1e-9).any():
            return "box"
        return "cone" if self._tilt(turn) > self.cone + 1e-9 else None

    def step(self, action, measured=None):
        """action (7,), measured joints (6,) or None when they are stale -> target joints (6,), gripper opening."""
        if not _finite(action, 7):
            return self.hold("nonfinite")
        if not _finite(measured, 6):
            return self.hold("stale")
        action = np.clip(np.asarray(action, float), -1e6, 1e6)
        base, turned = self.kinematics.fk(self.joints)
        shift = self._cap(action[:3], 1.0, "step") * self.max_step / SLACK
        turn = self._cap(action[3:6], 1.0, "step") * self.max_turn / SLACK
        place = self._clip(base + shift, self.box[0] + 1e-3, self.box[1] - 1e-3, "box")
        there = self.kinematics.fk(measured)[0]
        place = there + self._cap(place - there, self.leash, "leash")
        place = base + self._cap(place - base, self.max_step / SLACK, "leash")
        turn = self._into_cone(rotation_matrix(turn) @ turned)
        aim, *_ = self.kinematics.ik(place, turn, self.joints)
        aim = self._clip(aim, self.low, self.high, "joint range")
        change = aim - self.joints
        fastest = np.abs(change).max() / self.max_joint_step
        if fastest > 1:
            self.counts["joint speed"] += 1
            change = change / fastest
        target = self._furthest(change, base, turned)
        opening = (np.clip(action[6], -1, 1) + 1) / 2 * OPEN
        return target, self._grip(opening)

    def slide(self, goal, gripper, measured, speed=0.25):
        """One slow step straight to joints `goal` (6,), to rest or into the box too -> joints, gripper, arrived."""
        goal = np.clip(goal, self.low, self.high)
        if not _finite(goal, 6) or not _finite(measured, 6):
            return *self.hold("stale"), False
        if np.abs(self.joints - measured).max() > 0.2:               # wait where the measured arm does not follow
            return *self.hold("leash"), False
        limit = speed * self.max_joint_step
        target = self.joints + np.clip(goal - self.joints, -limit, limit)
        return np.clip(target, self.low, self.high), self._grip(gripper), bool(np.allclose(target, goal, atol=1e-6))

    def hold(self, why):
        """The last target again, counted."""
        self.counts[why] += 1
        return self.joints.copy(), self.gripper

    def sent(self, joints, gripper):
        """What the driver really sent becomes the last target. Returns it in action units (7,): the replay's action."""
        (place, turned), (new_place, new_turned) = self.kinematics.fk(self.joints), self.kinematics.fk(joints)
        shift = (new_place - place) * SLACK / self.max_step
        turn = rotation_vector(new_turned @ turned.T) * SLACK / self.max_turn
        self.joints, self.gripper = np.array(joints, float), float(gripper)
        return np.clip([*shift, *turn, 2 * gripper / OPEN - 1], -1, 1).astype(np.float32)

    def towards(self, joints, gripper):
        """The action (7,) that leads to a tele-operator's joints (6,) and opening; far away: longer than a step."""
        (place, turned), (goal, goal_turned) = self.kinematics.fk(self.joints), self.kinematics.fk(joints)
        turn = rotation_vector(goal_turned @ turned.T)
        shift = (goal - place) * SLACK / self.max_step
        return np.array([*shift, *turn * SLACK / self.max_turn, 2 * gripper / OPEN - 1])

    def _furthest(self, change, base, turned):
        for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.05):
            target = np.clip(self.joints + share * change, self.low, self.high)
            place, turn = self.kinematics.fk(target)
            angle = np.linalg.norm(rotation_vector(turn @ turned.T))
            if np.linalg.norm(place - base) <= self.max_step and angle <= self.max_turn and not self.outside(target):
                return target
            self.counts["shortened"] += 1
        return self.joints.copy()

    def _grip(self, opening):
        if not np.isfinite(opening):
            return self.gripper
        return float(np.clip(self.gripper + np.clip(opening - self.gripper, -self.max_grip_step, self.max_grip_step),
                             0, OPEN))

    def _cap(self, vector, most, name):
        length = np.linalg.norm(vector)
        if length > most * (1 + 1e-6):
            self.counts[name] += 1
        return vector * (most / length) if length > most else vector

    def _clip(self, value, low, high, name):
        inside = np.clip(value, low, high)
        if np.abs(inside - value).max() > 1e-6:
            self.counts[name] += 1
        return inside

    def _tilt(self, turned):
        return float(np.arctan2(np.linalg.norm(np.cross(self.axis, turned[:, 2])), self.axis @ turned[:, 2]))

    def _into_cone(self, turned):
        excess = self._tilt(turned) - (self.cone - 5e-3)
        if excess <= 0:
            return turned
        self.counts["cone"] += 1
        back = np.cross(turned[:, 2], self.axis)
        return rotation_matrix(back / max(np.linalg.norm(back), 1e-9) * excess) @ turned


def _finite(values, size):
    try:
        values = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        return False
    return values.shape == (size,) and bool(np.isfinite(values).all())


# ---- the loop --------------------------------------------------------------------------------------------------------

class Rig:
    """The arm between power-on and rest, as a context: episodes run inside, and every way out is hold, rest, release.

    One lock for the driver; a watchdog sends the last target again when the loop has been silent for three periods.
    auto: the simulated arm labels its episodes by success(), nobody is asked.
    """

    def __init__(self, args, robot, senses, keypad, teleop, interrupt, auto):
        self.args, self.robot, self.senses, self.keypad, self.teleop = args, robot, senses, keypad, teleop
        self.interrupt, self.auto, self.pace, self.lock = interrupt, auto, senses.pace, threading.Lock()
        self.guard = self.rest = None
        self.fed, self.trips, self.armed, self.stopped, self.done = 0.0, 0, False, False, False
        self.told, self.unsent, self.silent = False, False, 0

    def __enter__(self):
        try:
            self.robot.connect()
            if hasattr(self.robot, "reset"):
                self.robot.reset(self.args.seed)
            self.pace.start()
            self._prepare(self._fresh())
        except BaseException as error:
            self.robot.disconnect()
            if isinstance(error, OSError | RuntimeError):
                raise UserError(f"the arm does not connect: {error}") from error
            raise
        if self.args.realtime:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind, error, _):
        self.armed = False
        if error is not None and not isinstance(error, UserError):
            print(f"{kind.__name__}: the arm holds, then goes to rest", file=sys.stderr)
        release = {}
        try:
            self._send(*self.guard.hold("exit"))
            if self.stopped or not self.move(self.rest, timeout=20):
                print("the arm did not go to rest: it holds where it is", file=sys.stderr)
            elif self.args.release:
                release = {"release": True}
        finally:
            self.done = True
            self.robot.disconnect(**release)

    def _prepare(self, view):
        args, (place, turned) = self.args, self.senses.kinematics.fk(view.joints)
        size = np.array(args.box_size) / 100
        center = np.array(args.box_center) / 100 if args.box_center else place - [0, 0, size[2] / 2 - 0.02]
        box = np.array([center - size / 2, center + size / 2])
        if args.box_from_demos:
            box = reach(numbered(args.data)) + [[-0.02], [0.02]]
        self.guard = Guard(self.senses.kinematics, box, turned[:, 2], cone=np.radians(args.cone),
                           max_step=args.max_step / 100, max_turn=np.radians(args.max_turn),
                           max_joint_speed=np.radians(args.max_joint_speed), leash=args.leash / 100)
        low, high = np.round(box * 100, 1)
        print(f"box {low} to {high} cm, tool at {np.round(place * 100, 1)} cm, at most {args.max_step} cm and "
              f"{args.max_turn} degrees per period")
        self.rest = np.asarray(getattr(self.robot, "rest", view.joints), float)
        try:
            self.guard.start(view.joints, view.gripper)
        except UserError:
            self.guard.joints, self.guard.gripper = np.clip(view.joints, self.guard.low, self.guard.high), view.gripper
            if not args.recover or np.abs(self.guard.joints - view.joints).max() > 0.05:     # a wrong zero lies about
                raise                                                                         # where the tool is
            goal = self.senses.kinematics.ik(box.mean(0), turned, view.joints)[0]
            if not self.move(goal, timeout=60):
                raise UserError("the arm did not reach the middle of the box: move it there by hand") from None
            self.guard.start((view := self._fresh()).joints, view.gripper)
        self.home = self.guard.joints.copy()

    def move(self, goal, timeout):
        """Slowly and straight to these joints; False if it did not arrive in so many seconds or was told to stop."""
        self.pace.start()
        for _ in range(int(timeout / PERIOD)):
            view = self.senses.read(self.robot, look=False)
            joints, gripper, arrived = self.guard.slide(goal, self.guard.gripper, None if view is None else view.joints)
            self._send(joints, gripper)
            self.silent = 0 if view and not self.unsent else self.silent + 1
            self.stopped = self.stopped or self.keypad.poll() == "stop"
            if arrived or self.stopped or self.silent > 1 / PERIOD:
                return arrived
            self.pace.wait()
        return False

    def episode(self, act, seed):
        """Play one episode with act(obs) -> chunk, or by tele-operation where act is None. Returns its Take.

        Its outcome is success, fail, timeout, discard, quit or stop. UserError if the arm or the keypad is lost.
        """
        view = self._begin(seed)
        take, self.armed = Take(view.vector), self.args.realtime
        self.queue, self.human, self.since, self.silent = [], act is None, 15 * (act is None), 0
        while take.outcome is None:
            event = "quit" if self.interrupt.stop else self.keypad.poll()
            if event == "pause":
                self.human, self.queue, self.since = not self.human, [], 0   # what is left of a chunk is out of date
            elif event is not None:
                take.outcome = event
                break
            requested, applied = self._command(act, view)
            self.pace.wait()
            view = self.senses.read(self.robot)
            self._complain(view)
            if applied is None or view is None:
                self.queue = []
                take.drop(None if view is None else view.vector)
            else:
                take.add(applied, requested, view.vector, self.human)
            if self.auto and self.robot.success():
                take.outcome = "success"
            elif take.steps >= self.args.episode_limit:
                take.outcome = "timeout"
        self.armed = False
        self._label(take)
        return take

    def _command(self, act, view):
        """One command from the newest view: (what was asked for, what really ran), or Nones where it had to hold."""
        if view is None or (self.human and self.teleop is None):
            self._send(*self.guard.hold("stale" if view is None else "paused"))
            return None, None
        if self.human:
            requested = self._teleop()
        else:
            self.queue = self.queue or list(act(view.vector))
            requested = self.queue.pop(0)
        return requested, self._send(*self.guard.step(requested, view.joints))

    def _begin(self, seed):
        if hasattr(self.robot, "reset"):
            self.robot.reset(seed)
        else:
            self.move(self.home, timeout=20)
            print("place the object, then press space")
            while not (self.keypad.gone or self.interrupt.stop) and (event := self.keypad.wait(0.5)) != "pause":
                if event in ("quit", "stop"):
                    self.keypad.events.insert(0, event)                      # ends the episode before its first command
                    break
        self.pace.start()
        view = self._fresh()
        self.guard.start(view.joints, view.gripper)
        return view

    def _fresh(self):
        while (view := self.senses.read(self.robot)) is None:
            self._complain(view)
            self.pace.wait()
        return view

    def _teleop(self):
        """The operator's action; within the first second after a take-over the arm slides towards the operator."""
        try:
            goal = self.teleop.get_action()
        except (OSError, RuntimeError) as error:
            raise UserError(f"the operator's arm is lost, the running episode dropped: {error}") from error
        action = self.guard.towards([goal[name] for name in JOINTS], goal["gripper.pos"])
        self.since += 1
        action[:6] *= min(1.0, self.since * PERIOD / max(np.abs(action[:6]).max(), 1e-9))
        return action

    def _send(self, joints, gripper):
        action = dict(zip(JOINTS, map(float, joints))) | {"gripper.pos": float(gripper)}
        with self.lock:
            self.fed = time.monotonic()
            try:
                sent, self.unsent = self.robot.send_action(action) or action, False
            except (OSError, RuntimeError) as error:
                self.senses.fault, self.unsent = f"a command did not reach the arm ({error})", True
                return None
        return self.guard.sent([sent.get(name, action[name]) for name in JOINTS], sent.get("gripper.pos", gripper))

    def _complain(self, view):
        """Say once what is wrong; give up after five seconds. A lost keypad ends the session."""
        lost = view is None or self.unsent
        if lost and not self.told:
            print(f"HOLDING: {self.senses.fault}", file=sys.stderr)
        self.told, self.silent = lost, self.silent + 1 if lost else 0
        if self.silent > 5 / PERIOD:
            raise UserError(f"{self.senses.fault}, for five seconds: check power and cables, then --resume")
        if self.keypad.gone:
            self.stopped = True
            raise UserError("the keypad is gone (terminal closed or device unplugged): the arm holds where it is, the "
                            "running episode is dropped; --resume goes on")

    def _label(self, take):
        """Ask once for the label of an episode that ran out of time."""
        if take.outcome == "timeout" and not self.auto:
            print("time is up, no label: s success, f fail, d discard? (10 s; otherwise no success)")
            take.outcome = {None: "timeout", "pause": "timeout"}.get(event := self.keypad.wait(10), event)
        self.stopped = self.stopped or take.outcome == "stop"

    def status(self):
        """For the progress line: periods, watchdog and what the guard had to change so far."""
        parts = [f"{name.replace('_', ' ')} {value:.0f}" for name, value in self.pace.report().items()]
        parts += [f"watchdog {self.trips}"] * (self.trips > 0)
        changed = ", ".join(f"{name} {count}" for name, count in sorted(self.guard.counts.items()))
        return ", ".join([*parts, f"guard: {changed or 'nothing'}"])

    def _watch(self):
        while not self.done:
            time.sleep(PERIOD)
            if self.armed and time.monotonic() - self.fed > 3 * PERIOD and self.lock.acquire(timeout=PERIOD):
                try:
                    self.trips += 1
                    action = dict(zip(JOINTS, self.guard.joints)) | {"gripper.pos": self.guard.gripper}
                    with contextlib.suppress(OSError, RuntimeError):        # the loop will meet the same error and tell
                        self.robot.send_action(action)
                finally:
                    self.lock.release()


# ---- record, train, eval ---------------------------------------------------------------------------------------------

COLUMNS = ("success", "reward", "length", "dropped", "interventions", "guarded", "period_p50", "period_p99",
           "period_max", "overruns", "version", "updates", "warmup", *STATS)


@contextlib.contextmanager
def session(args):
    """The arm, its keypad and its operator, as a Rig that is not entered yet."""
    robot, teleop = open_arm(args)
    senses = Senses(robot, getattr(robot, "kinematics", None) or Kinematics(), Pace(args.realtime), args.observe,
                    lambda cameras: open_eyes(args, cameras))
    auto = hasattr(robot, "success") and args.keypad in ("auto", "none")
    with Interrupt() as interrupt, open_keypad("none" if auto else args.keypad.replace("auto", "terminal")) as keypad:
        print("labels come from the simulation" if auto else HELP)
        yield Rig(args, robot, senses, keypad, teleop, interrupt, auto)


def record(args):
    """Tele-operate until the folder holds args.episodes successes; failures are not kept. Returns the merged file."""
    folder = Path(args.data)
    with session(args) as rig:
        task = layout(args.task, rig.senses.sizes)
        with rig:
            number = tried = len(numbered(folder))
            while number < args.episodes:
                take = rig.episode(None, args.seed_of(tried))
                tried += 1
                if take.outcome in ("quit", "stop"):
                    break
                if take.outcome == "success":
                    take.save(folder / f"episode_{number:05d}.hdf5", task, True, args.seed_of(tried - 1))
                    number += 1
                print(f"{take.outcome} after {take.steps} steps: {number} of {args.episodes} recorded, {tried} tried, "
                      f"{rig.status()}")
    if files := numbered(folder):
        print(f"{merge(files, folder.with_suffix('.hdf5'))}; next: python robot.py train --task {args.task}")


def train(args):
    """Stage I, then episodes and learning, until args.episodes are on disk."""
    folder = Path(args.run_dir)
    with session(args) as rig:
        task = layout(args.task, rig.senses.sizes)
        learner = (Faraway if args.learner else Learner)(args, task)         # refuses missing demonstrations first
        if args.resume:
            book = Logbook.resume(folder, COLUMNS, task=args.task, method="robot")
            learner.load_state_dict(book.load("last.pt"), folder / "episodes")
        else:
            refuse_loss(folder, args.robot)
            book = Logbook.create(folder, dataclasses.asdict(args) | {"method": "robot"}, COLUMNS, args.overwrite)
            for path in numbered(folder / "episodes"):
                path.unlink()
        if not learner.pretrain(lambda one: one.save(folder / "last.pt")):
            return
        files = numbered(folder / "episodes")
        recent, steps = [float(outcome(path) == "success") for path in files], sum(length(path) for path in files)
        book.rewind(steps)
        if args.realtime and not args.learner:
            learner = Background(args, task)
        else:
            for path in files[learner.absorbed:]:
                learner.absorb(path)
        try:
            play(args, rig, task, learner, book, steps, recent)
        finally:
            learner.close()
            book.close()
    print(f"{curve(folder)}; next: python robot.py eval --run-dir {folder} --task {args.task}")


def play(args, rig, task, learner, book, steps, recent):
    """The interaction half of Algorithm 1: every episode is on disk and announced before the next one begins."""
    learner.wait()
    with rig:
        while len(recent) < args.episodes:
            number, version = len(recent), learner.pull()
            rng, acting = np.random.default_rng([args.seed, 1, number]), learner.acting()
            take = rig.episode(lambda obs: acting(obs, rng), args.seed_of(number))
            if take.outcome in ("quit", "stop"):
                break
            path = Path(args.run_dir) / "episodes" / f"episode_{number:05d}.hdf5"
            won = take.outcome == "success"
            if take.outcome == "discard" or not take.save(path, task, won, args.seed_of(number)):
                continue
            recent.append(float(won))
            learner.absorb(path)
            learner.check()
            steps, last = steps + take.steps, recent[-20:]
            report = learner.report()
            book.log(steps, success=np.mean(last), reward=recent[-1], length=take.steps, dropped=take.dropped,
                     interventions=take.interventions, guarded=rig.guard.counts.total(), version=version,
                     **rig.pace.report(), **report)
            print(f"episode {number + 1}/{args.episodes} {take.outcome}, {take.steps} steps: success "
                  f"{np.mean(last):.0%} of the last {len(last)}, {report.get('updates', 0)} updates, {rig.status()}")


def evaluate(args):
    """The policy of args.run_dir over args.episodes, in the same loop; success printed, rows in eval.csv."""
    folder, rows = Path(args.run_dir), []
    with session(args) as rig:
        acting, updates = trained(args, layout(args.task, rig.senses.sizes))
        print(f"policy {acting.fingerprint()} after {updates} updates, acting from the {args.act}")
        with rig:
            while len(rows) < args.episodes:
                seed, rng = args.seed_of(len(rows)), np.random.default_rng([args.seed, 2, len(rows)])
                take = rig.episode(lambda obs: acting(obs, rng), seed)
                if take.outcome in ("quit", "stop"):
                    break
                if take.outcome != "discard":
                    won = take.outcome == "success"
                    rows.append({"seed": seed, "success": won, "length": take.steps, "return": float(won)})
                print(f"{len(rows)}/{args.episodes} {take.outcome}, {take.steps} steps, {rig.status()}")
    if rows:
        Logbook(folder, {}, COLUMNS).evaluation(updates, args.act, rows)
        print(f"success {sum(row['success'] for row in rows)} of {len(rows)}")
    return rows


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv, __doc__)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1 if args.realtime else args.threads)          # the loop must not fight the learner for cores
    print(f"{args.role} {args.task} on {args.robot}, preset {args.preset}, "
          f"{'15 Hz' if args.realtime else 'as fast as it goes'}")
    return {"record": record, "train": train, "eval": evaluate}[args.role](args)


if __name__ == "__main__":
    cli(main)
