"""POCO on an arm (paper Sec. V-A2 and V-D, Table III), and on the same arm without hardware: record, train, eval.

    python robot.py record --task insert-usb                       # 30 demonstrations on the simulated arm, 1 minute
    python robot.py train --task insert-usb --no-realtime          # stage I, warm-up, POCO; 15 minutes on two cores
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
import contextlib
import dataclasses
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from arms.episodes import Take, following, layout, length, merge, numbered, outcome, reach, refuse_loss
from arms.guard import NEAR, Guard
from arms.keypad import HELP, open_keypad
from arms.kinematics import Kinematics
from arms.learner import STATS, Background, Learner, trained
from arms.senses import JOINTS, PERIOD, Pace, Senses
from arms.settings import open_arm, open_eyes, parse, recall, remember, writing
from distributed.arm import Faraway
from logbook import Interrupt, Logbook, UserError, cli, curve, fitting

LATE = 1.0                                     # seconds after which what was made of a view is not executed
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)        # also counts while a laptop sleeps


class Arm(Protocol):
    """What a driver offers: the ten members of every LeRobot robot; lerobot itself is never imported.

    Action keys joint_1.pos .. joint_6.pos (rad) and gripper.pos (m). An observation has the same, `stamp`
    (time.monotonic() of the measurement; without one the reading counts as fresh, and an arm that froze is not noticed)
    and cameras as HWC uint8 arrays, each with NAME.stamp if it can. Optional: reset(seed) and success() of a simulated
    arm, object.* floats, rest (6,) joints, kinematics, disconnect(release). disconnect must not let the arm fall.
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


# ---- the loop --------------------------------------------------------------------------------------------------------

class Rig:
    """The arm between power-on and rest, as a context: episodes run inside, and every way out is hold, rest, release.

    One lock for the driver; a watchdog sends the last target again when the loop has been silent for three periods.
    auto: the simulated arm labels its episodes by success(), nobody is asked. ending: "quit" or "stop" once the person
    wants the session to end, stopped: without going to rest.
    """

    def __init__(self, args, robot, senses, keypad, teleop, interrupt, auto):
        self.args, self.robot, self.senses, self.keypad, self.teleop = args, robot, senses, keypad, teleop
        self.interrupt, self.auto, self.pace, self.lock = interrupt, auto, senses.pace, threading.Lock()
        self.guard = self.rest = None
        self.fed, self.trips, self.armed, self.stopped, self.done = 0.0, 0, False, False, False
        self.told, self.failed, self.silent, self.looked, self.ending = False, False, 0, 0.0, None
        self.lost, self.strayed = False, None

    def __enter__(self):
        try:
            self.robot.connect()
            if hasattr(self.robot, "reset"):
                self.robot.reset(self.args.seed)
            self.pace.start()
            self._prepare(self._fresh())
        except BaseException as error:
            with contextlib.suppress(Exception):                         # it may never have been connected
                self.robot.disconnect()
            if isinstance(error, OSError | RuntimeError):
                raise UserError(f"the arm does not connect: {error}") from error
            raise
        if self.args.realtime:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind, error, _):
        self.armed = False
        release = {}
        try:
            self._send(*self.guard.hold("exit"))
            if error is not None and not isinstance(error, UserError):
                warn(f"{kind.__name__}: the arm holds, then goes to rest")
            if self.stopped or not self.move(self.rest, timeout=20, leaving=True):
                warn("the arm did not go to rest: it holds where it is")
            elif self.args.release:
                release = {"release": True}
        finally:
            self.done = True
            self.robot.disconnect(**release)

    def _prepare(self, view):
        args, home, kinematics = self.args, self._known_home(view), self.senses.kinematics
        place, turned = kinematics.fk(view.joints if home is None else home)
        size = np.array(args.box_size) / 100
        center = np.array(args.box_center) / 100 if args.box_center else place - [0, 0, size[2] / 2 - 0.02]
        box = np.array([center - size / 2, center + size / 2])
        if args.box_from_demos:
            box = reach([args.data] if Path(args.data).is_file() else numbered(args.data)) + [[-0.02], [0.02]]
        self.guard = Guard(kinematics, box, turned[:, 2], cone=np.radians(args.cone),
                           max_step=args.max_step / 100, max_turn=np.radians(args.max_turn),
                           max_joint_speed=np.radians(args.max_joint_speed), leash=args.leash / 100)
        low, high, tool = np.round(100 * np.array([*box, kinematics.fk(view.joints)[0]]), 1)
        print(f"box {low} to {high} cm, tool at {tool} cm, at most {args.max_step} cm and {args.max_turn} degrees per "
              f"period{'' if home is None else ', episodes start where those of earlier sessions did'}")
        if home is not None and (wrong := self.guard.outside(home)):
            raise UserError(f"the start of earlier sessions, --home {' '.join(f'{one:.1f}' for one in args.home)}, is "
                            f"outside the limits ({wrong}): name the box it belongs to, or another --home")
        self.rest = np.asarray(getattr(self.robot, "rest", view.joints), float)
        self._enter_box(view, home)
        self.home = self.guard.joints.copy() if home is None else home
        if not hasattr(self.robot, "reset"):                # later sessions begin at the rest pose, which tells nothing
            args.box_center = args.box_center or tuple(map(float, 100 * center))
            args.home = tuple(map(float, np.degrees(self.home)))

    def _known_home(self, view):
        """Joints (6,) where episodes start, as args or an earlier session say; None: where the arm is now."""
        args = self.args
        if hasattr(self.robot, "reset"):
            return None
        recall(args)
        if args.home is not None:
            return np.clip(np.radians(args.home), *np.asarray(self.senses.kinematics.limits).T)
        resting = hasattr(self.robot, "rest") and np.abs(view.joints - np.asarray(self.robot.rest)).max() < 0.1
        if resting and (args.recover or not (args.box_center or args.box_from_demos)):
            raise UserError("the arm is at its rest pose, and no earlier session with this --data says where it works "
                            "and which way its tool points there: move it by hand to where it works, or give "
                            "--box-center X Y Z in cm and --home, six joints in degrees")
        return None

    def _enter_box(self, view, home):
        """The guard's first target: where the arm is or, with --recover, home or the middle of the box."""
        try:
            self.guard.start(view.joints, view.gripper)
        except UserError:
            self.guard.joints, self.guard.gripper = np.clip(view.joints, self.guard.low, self.guard.high), view.gripper
            if not self.args.recover or np.abs(self.guard.joints - view.joints).max() > NEAR:  # a wrong zero lies
                raise                                                                          # about where the tool is
            goal, missing, where = home, 0.0, "start"
            if home is None:
                middle, turned = self.guard.box.mean(0), self.senses.kinematics.fk(view.joints)[1]
                (goal, missing, _), where = self.senses.kinematics.ik(middle, turned, view.joints), "middle of the box"
            if missing > 0.01 or not self.move(goal, timeout=60):
                why = "cannot" if missing > 0.01 else "did not"
                raise UserError(f"the arm {why} reach the {where}: move it there by hand") from None
            self.guard.start((view := self._fresh()).joints, view.gripper)

    def get_observation(self):
        """The driver's, which need not bear a command of the watchdog meanwhile."""
        with self.lock:
            return self.robot.get_observation()

    def _look(self, pictures=True):
        """A View or None. The first after a hole (lost views or commands, LATE) tells the guard where the arm is."""
        before, self.looked = self.looked, time.clock_gettime(CLOCK)
        hole = self.lost or (self.args.realtime and self.looked - before > LATE)
        view, self.strayed = self.senses.read(self, pictures), None
        if view is not None and hole and self.guard is not None:
            self.strayed = self.guard.rejoin(view.joints)
        self.lost = view is None
        return view

    def move(self, goal, timeout, leaving=False):
        """
        Slowly and straight to these joints; False if it did not arrive in so many seconds or was told to stop. Quitting
        ends it, too, unless this is the way out.
        """
        self.pace.start()
        for _ in range(int(timeout / PERIOD)):
            view = self._look(pictures=False)
            joints, gripper, arrived = self.guard.slide(goal, self.guard.gripper, None if view is None else view.joints)
            self._send(joints, gripper)
            self.silent = 0 if view and not self.failed else self.silent + 1
            event = self.keypad.poll()
            self._heed("quit" if self.interrupt.stop and event != "stop" else event)
            self.stopped = self.stopped or self.keypad.gone
            if arrived or self.stopped or (self.ending and not leaving) or self.silent > 1 / PERIOD:
                return arrived
            self.pace.wait()
        return False

    def episode(self, act, seed):
        """Play one episode with act(obs) -> chunk, or by tele-operation where act is None. Returns its Take.

        Its outcome is success, fail, timeout, discard, quit or stop. UserError if the arm or the keypad is lost.
        """
        view = self._begin(seed)
        self._complain(view)
        take, self.armed = Take(view.vector), self.args.realtime
        self.queue, self.human, self.since, self.silent = [], act is None, 15 * (act is None), 0
        while take.outcome is None:
            event = self.ending or ("quit" if self.interrupt.stop else self.keypad.poll())
            if event == "pause":
                self.human, self.queue, self.since = not self.human, [], 0   # what is left of a chunk is out of date
            elif event is not None:
                take.outcome = event
                break
            requested, applied = self._command(act, view)
            before = self.looked
            self.pace.wait()
            view = self._look()
            if self.args.realtime and (away := self.looked - before) > LATE and applied is not None:
                self.guard.counts["late"] += 1            # a stopped process, a laptop that slept: all has changed
                applied, self.failed, self.senses.fault = None, True, f"this program stood still for {away:.1f} s"
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
        if view is None or (self.teleop if self.human else act) is None:     # nobody leads: a pause
            self._send(*self.guard.hold("stale" if view is None else "paused"))
            return None, None
        if self.human:
            requested = self._teleop()
        else:
            self.queue = self.queue or list(act(view.vector))
            requested = self.queue.pop(0)
        if self.args.realtime and (age := time.clock_gettime(CLOCK) - self.looked) > LATE:           # all has changed
            self._send(*self.guard.hold("late"))
            who = "operator's arm" if self.human else "policy"
            self.senses.fault, self.failed, self.lost = f"the {who} took {age:.1f} s", True, True
            return None, None
        return requested, self._send(*self.guard.step(requested, view.joints))

    def _begin(self, seed):
        if hasattr(self.robot, "reset"):
            self.robot.reset(seed)
        else:
            self.move(self.home, timeout=20)
            self.keypad.forget()                                             # only what is pressed from here on agrees
            print("place the object, then press space")
            while not (self.ending or self.keypad.gone):
                if (event := "quit" if self.interrupt.stop else self.keypad.wait(0.5)) == "pause":
                    break
                self._heed(event)                                            # ends the episode before its first command
        self.pace.start()
        view = self._fresh()
        self.guard.start(view.joints, view.gripper)
        return view

    def _heed(self, event):
        if event in ("quit", "stop"):
            self.ending, self.stopped = event, self.stopped or event == "stop"

    def _fresh(self):
        while (view := self._look()) is None:
            self._complain(view)
            self.pace.wait()
        return view

    def _teleop(self):
        """The operator's action; within the first second after a take-over the arm slides towards the operator."""
        try:
            goal = self.teleop.get_action()
            action = self.guard.towards([goal[name] for name in JOINTS], goal["gripper.pos"])
        except Exception as error:                                        # a driver's errors are of any kind
            raise UserError("the operator's arm is lost, the running episode dropped: "
                            f"{type(error).__name__}: {error}") from error
        self.since += 1
        action[:6] *= min(1.0, self.since * PERIOD / max(np.abs(action[:6]).max(), 1e-9))
        return action

    def _send(self, joints, gripper):
        if self.failed and self.lost:       # where the arm is was not seen since: the target may be far from there
            return None
        action = dict(zip(JOINTS, map(float, joints))) | {"gripper.pos": float(gripper)}
        with self.lock:
            self.fed = time.monotonic()
            try:
                sent, self.failed = self.robot.send_action(action) or action, False
                return self.guard.sent([sent.get(name, action[name]) for name in JOINTS],
                                       sent.get("gripper.pos", gripper))       # a useless answer: nobody knows what ran
            except Exception as error:
                self.senses.fault, self.failed, self.lost = f"a command did not reach the arm ({error})", True, True
                return None

    def _complain(self, view):
        """Say once what is wrong; give up after five seconds. A lost keypad and a carried-off arm end the session."""
        lost = view is None or self.failed
        if lost and not self.told:
            warn(f"HOLDING: {self.senses.fault}")
        self.told, self.silent = lost, self.silent + 1 if lost else 0
        if self.silent > 5 / PERIOD:
            raise UserError(f"{self.senses.fault}, for five seconds: check power and cables, then --resume")
        if self.strayed:
            self.stopped = True
            raise UserError(f"the arm was moved outside its limits ({self.strayed}) while nothing was heard of it or "
                            "it did not obey: it holds where it is, the running episode is dropped; move it inside "
                            "by hand, then --resume")
        if self.keypad.gone:
            self.stopped = True
            raise UserError("the keypad is gone (terminal closed or device unplugged): the arm holds where it is, the "
                            "running episode is dropped; --resume goes on")

    def _label(self, take):
        """Ask once for the label of an episode that ran out of time."""
        if take.outcome == "timeout" and not self.auto:
            self.keypad.forget()
            print("time is up, no label: s success, f fail, d discard? (10 s; otherwise no success)")
            take.outcome = {None: "timeout", "pause": "timeout"}.get(event := self.keypad.wait(10), event)
        self._heed(take.outcome)

    def status(self):
        """For the progress line: periods, watchdog and what the guard had to change so far."""
        parts = [f"{name.replace('_', ' ')} {value:.0f}" for name, value in self.pace.report().items()]
        parts += [f"watchdog {self.trips}"] * (self.trips > 0)
        changed = ", ".join(f"{name} {count}" for name, count in sorted(self.guard.counts.items()))
        return ", ".join([*parts, f"guard: {changed or 'nothing'}"])

    def _watch(self):
        while not self.done:
            time.sleep(PERIOD)
            silent, unknown = time.monotonic() - self.fed > 3 * PERIOD, self.failed and self.lost         # as in _send
            if self.armed and silent and not unknown and self.lock.acquire(timeout=PERIOD):
                try:
                    self.trips += 1
                    action = dict(zip(JOINTS, self.guard.joints)) | {"gripper.pos": self.guard.gripper}
                    with contextlib.suppress(Exception):                    # the loop will meet the same error and tell
                        self.robot.send_action(action)
                finally:
                    self.lock.release()


def warn(text):
    """To a terminal that may be gone: the arm matters more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)


# ---- record, train, eval ---------------------------------------------------------------------------------------------

COLUMNS = ("success", "reward", "length", "dropped", "interventions", "guarded", "period_p50", "period_p99",
           "period_max", "overruns", "version", "updates", "warmup", *STATS)


@contextlib.contextmanager
def awake():
    """
    A closed terminal is a lost keypad, on which the arm holds, and no reason to die with the arm in motion. Nor may
    Ctrl-Z or Ctrl-\\ leave it under power with nobody watching: a shell also changes the terminal, and keys die.
    """
    numbers = (signal.SIGHUP, signal.SIGTSTP, signal.SIGQUIT) * (threading.current_thread() is threading.main_thread())
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def session(args):
    """The arm, its keypad and its operator, as a Rig that is not entered yet."""
    robot, teleop = open_arm(args)
    senses = Senses(robot, getattr(robot, "kinematics", None) or Kinematics(), Pace(args.realtime), args.observe,
                    lambda cameras: open_eyes(args, cameras))
    auto = hasattr(robot, "success") and args.keypad in ("auto", "none")
    if args.keypad == "none" and not (auto and hasattr(robot, "reset")):
        raise UserError("--keypad none is for a simulated arm: somebody has to place the object and to stop this one")
    pad = "none" if auto else "terminal" if args.keypad == "auto" else args.keypad
    with awake(), Interrupt() as interrupt, open_keypad(pad) as keypad:
        print("labels come from the simulation" if auto else HELP)
        try:
            yield Rig(args, robot, senses, keypad, teleop, interrupt, auto)
        finally:
            with contextlib.suppress(Exception):                             # the arm itself has been let go by now
                getattr(teleop, "disconnect", lambda: None)()


def save(take, path, task, seed):
    """Take -> its file; False, and said, where it has no step to keep."""
    with writing(path):
        kept = take.save(path, task, take.outcome == "success", seed)
    if not kept:
        print("no step was played, so nothing is kept")
    return kept


def record(args):
    """Tele-operate until the folder holds args.episodes successes; failures are not kept. Returns the merged file."""
    folder = Path(args.data)
    with session(args) as rig:
        task = layout(args.task, rig.senses.sizes)
        with rig:
            remember(args)
            number, (tried, _) = len(numbered(folder)), following(folder)
            while number < args.episodes:
                take = rig.episode(None, args.seed_of(tried))
                tried += 1
                if take.outcome in ("quit", "stop"):
                    break
                if take.outcome == "success" and save(take, following(folder)[1], task, args.seed_of(tried - 1)):
                    number += 1
                print(f"{take.outcome} after {take.steps} steps: {number} of {args.episodes} recorded, {tried} tried, "
                      f"{rig.status()}")
    if files := numbered(folder):
        with writing(whole := folder.with_suffix(".hdf5")):
            merge(files, whole)
        print(f"{whole}; next: python robot.py train --task {args.task}")


def train(args):
    """Stage I, then episodes and learning, until args.episodes are on disk."""
    folder = Path(args.run_dir)
    with session(args) as rig:
        task = layout(args.task, rig.senses.sizes)
        learner = (Faraway if args.learner else Learner)(args, task)         # refuses missing demonstrations first
        if args.resume:
            book = Logbook.resume(folder, COLUMNS, task=args.task, method="robot")
            with fitting(folder):
                learner.load_state_dict(book.load("last.pt"), folder / "episodes")
            book.amend(dataclasses.asdict(args))
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
        except ValueError as error:                          # a non-finite Q
            raise UserError(f"stopped: {error}. {book.last_good()}") from error
        finally:
            learner.close()
            book.close()
    print(f"{curve(folder)}; next: python robot.py eval --run-dir {folder} --task {args.task}")


def play(args, rig, task, learner, book, steps, recent):
    """The interaction half of Algorithm 1: every episode is on disk and announced before the next one begins."""
    learner.wait()
    if rig.interrupt.stop:                                   # the arm has no power yet, and gets none
        return
    with rig:
        remember(args)
        book.amend(dataclasses.asdict(args))
        while len(recent) < args.episodes:
            (number, path), version = following(Path(args.run_dir) / "episodes"), learner.pull()
            rng, acting = np.random.default_rng([args.seed, 1, number]), learner.acting()
            take = rig.episode(lambda obs: acting(obs, rng), args.seed_of(number))
            if take.outcome in ("quit", "stop"):
                break
            if take.outcome == "discard" or not save(take, path, task, args.seed_of(number)):
                continue
            recent.append(float(take.outcome == "success"))
            learner.absorb(path)
            learner.check()
            steps, last = steps + take.steps, recent[-20:]
            report = learner.report()
            book.log(steps, success=np.mean(last), reward=recent[-1], length=take.steps, dropped=take.dropped,
                     interventions=take.interventions, guarded=rig.guard.counts.total(), version=version,
                     **rig.pace.report(), **report)
            print(f"episode {len(recent)}/{args.episodes} {take.outcome}, {take.steps} steps: success "
                  f"{np.mean(last):.0%} of the last {len(last)}, {report.get('updates', 0)} updates, {rig.status()}")


def evaluate(args):
    """The policy of args.run_dir over args.episodes, in the same loop; success printed, rows in eval.csv."""
    folder, rows = Path(args.run_dir), []
    with session(args) as rig:
        acting, updates, steps = trained(args, layout(args.task, rig.senses.sizes))
        print(f"policy {acting.fingerprint()} after {updates} updates, acting from the {args.act}")
        with contextlib.nullcontext() if rig.interrupt.stop else rig:        # who stops it now wants no motion
            while len(rows) < args.episodes and not rig.interrupt.stop:
                seed, rng = args.seed_of(len(rows)), np.random.default_rng([args.seed, 2, len(rows)])
                take = rig.episode(lambda obs: acting(obs, rng), seed)
                if take.outcome in ("quit", "stop"):
                    break
                if take.outcome != "discard":
                    won = take.outcome == "success"
                    rows.append({"seed": seed, "success": won, "length": take.steps, "return": float(won)})
                print(f"{len(rows)}/{args.episodes} {take.outcome}, {take.steps} steps, {rig.status()}")
    if rows:
        Logbook(folder, {}, COLUMNS).evaluation(steps, args.act, rows)
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
