"""The arm between power-on and rest: the 15 Hz loop, its watchdog, hand-overs, and every way out.

    from arms.rig import session
    with session(args) as rig:                  # args: settings.Args; nothing has power yet
        with rig:                               # connects; on leaving: hold, go to rest, release
            episode = rig.episode(act, seed)    # act(obs (D,)) -> chunk (H, A); None: a person

What is known of the arm is one of five states (Link), and every command and view moves it:

    SOUND -- no view ------> UNSEEN -- view -> SOUND           the last target is repeated meanwhile
    any   -- command lost -> BLIND -- view -> SEEN_AGAIN       nothing is sent until the arm is seen
    SEEN_AGAIN -- command arrives -> SOUND
    UNSEEN, BLIND -- view outside the limits -> STRAYED        it stays there, the session ends

One period takes 67 ms, of which the loop itself uses 1 to 2.
Not here: limits (guard.py), the place (workspace.py), what to do with episodes (robot.py).
"""

from __future__ import annotations

import contextlib
import enum
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from arms.driver import Driver
from arms.episodes import Episode
from arms.guard import NEAR, Guard
from arms.keypad import HELP, open_keypad
from arms.senses import PERIOD, Pace, Senses, View
from arms.settings import open_driver, open_eyes
from arms.workspace import find_workspace, keep_place
from logbook import Interrupt, UserError

LATE = 1.0  # seconds after which what was made of a view is not executed
PATIENCE = 5.0  # seconds without arm until the session ends
# counts also while a laptop sleeps
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Link(enum.Enum):
    """What is known of the arm; see the table at the top."""

    SOUND = "the last command arrived, and the arm was seen after it"
    UNSEEN = "the last command arrived, and the arm was not seen after it"
    BLIND = "a command was lost, and the arm was not seen after it"
    SEEN_AGAIN = "a command was lost, and the arm was seen after it"
    STRAYED = "the arm was seen again, outside its limits"


LOST_SIGHT = {
    Link.SOUND: Link.UNSEEN,
    Link.UNSEEN: Link.UNSEEN,
    Link.BLIND: Link.BLIND,
    Link.SEEN_AGAIN: Link.BLIND,
    Link.STRAYED: Link.BLIND,
}
SEEN = {
    Link.SOUND: Link.SOUND,
    Link.UNSEEN: Link.SOUND,
    Link.BLIND: Link.SEEN_AGAIN,
    Link.SEEN_AGAIN: Link.SEEN_AGAIN,
    Link.STRAYED: Link.SEEN_AGAIN,
}
ARRIVED = {
    Link.SOUND: Link.SOUND,
    Link.UNSEEN: Link.UNSEEN,
    Link.SEEN_AGAIN: Link.SOUND,
    Link.STRAYED: Link.SOUND,
}


class Connection:
    """The driver behind one lock, what is known of the arm, and the watchdog.

    The watchdog sends the last target again when the loop has been silent for three periods. It
    does so only while `watched` is set and never while the arm's place is unknown. guard: set
    once the workspace is known.
    """

    def __init__(self, driver: Driver, senses: Senses):
        self.driver = driver
        self.senses = senses
        self.guard: Guard | None = None
        self.link = Link.SOUND
        self.strayed = ""  # the limit that is broken where the arm was seen again
        self.looked = 0.0  # when, by CLOCK
        self.sent_at = 0.0  # when, by time.monotonic()
        self.watched = False
        self.trips = 0  # of the watchdog
        self._lock = threading.Lock()
        self._done = False

    # ---- views

    def look(self, pictures: bool = True) -> View | None:
        """Return a fresh view, or None; `fault` then says why.

        The first view after a hole (lost views or commands, a program that stood still) tells the
        guard where the arm is.
        """
        before = self.looked
        self.looked = clock()
        paused = self.senses.pace.realtime and self.looked - before > LATE
        hole = paused or self.link in (Link.UNSEEN, Link.BLIND)
        view = self.senses.read(self, pictures)
        if view is None:
            self.link = LOST_SIGHT[self.link]
            return None
        self.link = SEEN[self.link]
        if hole and self.guard is not None:
            broken = self.guard.rejoin(view.joints)
            if broken:
                self.link = Link.STRAYED
                self.strayed = broken
        return view

    def get_observation(self) -> dict:
        """Read the driver; the lock keeps the watchdog from sending meanwhile."""
        with self._lock:
            return self.driver.get_observation()

    @property
    def fault(self) -> str:
        """What was last wrong, in words."""
        return self.senses.fault

    # ---- commands

    def send(self, joints, gripper: float) -> np.ndarray | None:
        """Send a target; return the action (7,) that ran, or None where it did not arrive.

        Nothing is sent while the link is BLIND: the target may be far from the arm.
        """
        if self.link is Link.BLIND:
            return None
        try:
            applied = self._exchange(joints, gripper)
        except Exception as error:  # a driver's errors are of any kind
            self.lose_command(f"a command did not reach the arm ({error})")
            return None
        self.link = ARRIVED[self.link]
        return applied

    def _exchange(self, joints, gripper: float) -> np.ndarray:
        """Send, and let the guard judge and keep the driver's answer."""
        with self._lock:
            self.sent_at = time.monotonic()
            sent_joints, sent_gripper = self.driver.send(joints, gripper)
            return self.guard.sent(sent_joints, sent_gripper)

    def lose_command(self, why: str) -> None:
        """Note that nobody knows what the arm does now."""
        self.senses.fault = why
        self.link = Link.BLIND

    def mistrust(self, why: str) -> None:
        """Note that what the arm was last told may not have run as it was meant."""
        self.senses.fault = why
        if self.link is Link.SOUND:
            self.link = Link.SEEN_AGAIN
        elif self.link is Link.UNSEEN:
            self.link = Link.BLIND

    @property
    def lost_command(self) -> bool:
        return self.link in (Link.BLIND, Link.SEEN_AGAIN)

    # ---- the watchdog

    def start_watchdog(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self, release: bool) -> None:
        """End the watchdog and let the arm go."""
        self._done = True
        self.driver.disconnect(release)

    def _watch(self) -> None:
        while not self._done:
            time.sleep(PERIOD)
            silent = time.monotonic() - self.sent_at > 3 * PERIOD
            wanted = self.watched and silent and self.link is not Link.BLIND
            if wanted and self._lock.acquire(timeout=PERIOD):
                try:
                    self._repeat()
                finally:
                    self._lock.release()

    def _repeat(self) -> None:
        self.trips += 1
        with contextlib.suppress(Exception):  # the loop will meet the same error and tell
            self.driver.send(self.guard.joints, self.guard.gripper)


@dataclass
class Lead:
    """Who leads an episode, and what is left of the policy's chunk."""

    human: bool
    chunk: list = field(default_factory=list)
    periods: int = 0  # since the person took over

    def hand_over(self) -> None:
        """Change who leads; what is left of a chunk is out of date."""
        self.human = not self.human
        self.chunk = []
        self.periods = 0


@dataclass
class Watch:
    """What the loop knows of the session."""

    ending: str | None = None  # "quit": go to rest; "stop": stay where it is
    silent: int = 0  # periods in a row without the arm
    announced: bool = False  # the operator knows that the arm holds

    def heed(self, event: str | None) -> None:
        """Take notice of a key that ends the session; a stop outranks a quit."""
        if event == "stop" or (event == "quit" and self.ending is None):
            self.ending = event


class Rig:
    """The arm from connecting to rest, as a context in which episodes run.

    operator: who tele-operates, or None. judged: the robot itself says what succeeded, and nobody
    is asked for a label. Leaving by any way (also an exception, Ctrl-C, SIGTERM) is: hold, go
    slowly to rest, let go. After a stop, without a keypad or outside the limits, it is: hold,
    stay, let go.
    """

    def __init__(self, args, driver: Driver, senses: Senses, keypad, operator, interrupt, judged):
        self.args = args
        self.driver = driver
        self.senses = senses
        self.keypad = keypad
        self.operator = operator
        self.interrupt = interrupt
        self.judged = judged
        self.pace = senses.pace
        self.connection = Connection(driver, senses)
        self.watch = Watch()
        self.home = None  # joints (J,) where episodes start
        self.rest = None  # joints (J,) where the session ends

    @property
    def guard(self) -> Guard | None:
        return self.connection.guard

    # ---- in and out

    def __enter__(self):
        try:
            self.driver.connect()
            self.driver.reset(self.args.seed)
            self.pace.start()
            self._enter_workspace(self._fresh_view())
        except BaseException as error:
            with contextlib.suppress(Exception):  # it may never have been connected
                self.driver.disconnect()
            if isinstance(error, OSError | RuntimeError):
                raise UserError(f"the arm does not connect: {error}") from error
            raise
        if self.args.realtime:
            self.connection.start_watchdog()
        return self

    def __exit__(self, kind, error, _):
        self.connection.watched = False
        release = False
        try:
            self.connection.send(*self.guard.hold("exit"))
            if error is not None and not isinstance(error, UserError):
                warn(f"{kind.__name__}: the arm holds, then goes to rest")
            stays = self.watch.ending == "stop"
            if stays or not self.move(self.rest, timeout=20, leaving=True):
                warn("the arm did not go to rest: it holds where it is")
            else:
                release = self.args.release
        finally:
            self.connection.close(release)

    def _enter_workspace(self, view: View) -> None:
        """Find the box, begin inside it or, with --recover, go there first."""
        self.driver.refuse_implausible(view.joints, view.gripper)
        workspace = find_workspace(self.args, self.driver, view)
        self.connection.guard = workspace.guard
        self.rest = workspace.rest
        try:
            self.guard.start(view.joints, view.gripper)
        except UserError as outside:
            self._recover(view, workspace.home, outside)
        self.home = workspace.home
        if self.home is None:
            self.home = self.guard.joints.copy()
        if not self.driver.simulated:
            keep_place(self.args, self.guard, self.home)

    def _recover(self, view: View, home, outside: UserError) -> None:
        """Go slowly to the start or, where none is known, to the middle of the box.

        Raises `outside` without --recover, and for an arm whose joints are beyond their ranges: one
        with a wrong zero also lies about where its tool is.
        """
        guard = self.guard
        guard.joints = np.clip(view.joints, guard.low, guard.high)
        guard.gripper = view.gripper
        if not self.args.recover or np.abs(guard.joints - view.joints).max() > NEAR:
            raise outside
        where = "start"
        missing = 0.0
        goal = home
        if home is None:
            where = "middle of the box"
            turned = self.driver.kinematics.fk(view.joints)[1]
            goal, missing, _ = self.driver.kinematics.ik(guard.box.mean(0), turned, view.joints)
        if missing > 0.01:
            raise UserError(f"the arm cannot reach the {where}: move it there by hand") from None
        if not self.move(goal, timeout=60):
            raise UserError(f"the arm did not reach the {where}: move it there by hand") from None
        view = self._fresh_view()
        guard.start(view.joints, view.gripper)

    def move(self, goal, timeout: float, leaving: bool = False) -> bool:
        """Move slowly and straight to these joints (J,); return whether the arm got there.

        Ends after so many seconds, when told to stop, and on quit unless this is the way out.
        """
        self.pace.start()
        for _ in range(int(timeout / PERIOD)):
            view = self.connection.look(pictures=False)
            measured = None if view is None else view.joints
            joints, gripper, arrived = self.guard.slide(goal, self.guard.gripper, measured)
            self.connection.send(joints, gripper)
            self._count_silence(view)
            self.watch.heed(self._next_event())
            if self.keypad.gone:
                self.watch.heed("stop")
            if arrived or self._told_to_end(leaving) or self.watch.silent > 1 / PERIOD:
                return arrived
            self.pace.wait()
        return False

    def _told_to_end(self, leaving: bool) -> bool:
        if leaving:
            return self.watch.ending == "stop"
        return self.watch.ending is not None

    # ---- episodes

    def episode(self, act, seed: int) -> Episode:
        """Play one episode with act(obs (D,)) -> chunk (H, A), or by tele-operation with None.

        Its outcome is success, fail, timeout, discard, quit or stop. UserError if the arm or the
        keypad is lost.
        """
        view = self._begin(seed)
        self._refuse_to_go_on(view)
        episode = Episode(view.vector)
        lead = Lead(human=act is None)
        if lead.human:
            lead.periods = 15  # it led before: no hand-over
        self.watch.silent = 0
        self.connection.watched = self.args.realtime
        while episode.outcome is None:
            event = self.watch.ending or self._next_event()
            if event == "pause":
                lead.hand_over()
            elif event is not None:
                episode.outcome = event
                break
            view = self._period(episode, lead, act, view)
            if self.judged and self.driver.success():
                episode.outcome = "success"
            elif episode.steps >= self.args.episode_limit:
                episode.outcome = "timeout"
        self.connection.watched = False
        self._label(episode)
        return episode

    def _period(self, episode: Episode, lead: Lead, act, view: View | None) -> View | None:
        """Command, wait, look, and store the step unless a part of it was lost."""
        requested, applied = self._command(lead, act, view)
        before = self.connection.looked
        self.pace.wait()
        view = self.connection.look()
        away = self.connection.looked - before
        if self.args.realtime and away > LATE and applied is not None:
            # a stopped process, a laptop that slept: all has changed
            self.guard.counts["late"] += 1
            self.connection.mistrust(f"this program stood still for {away:.1f} s")
            applied = None
        self._refuse_to_go_on(view)
        if applied is None or view is None:
            lead.chunk = []
            episode.drop(None if view is None else view.vector)
        else:
            episode.add(applied, requested, view.vector, lead.human)
        return view

    def _command(self, lead: Lead, act, view: View | None):
        """Send one command made of the newest view.

        Returns what was asked for and what really ran, or None and None where the arm had to hold.
        """
        if view is None:
            self.connection.send(*self.guard.hold("stale"))
            return None, None
        if (self.operator if lead.human else act) is None:  # nobody leads: a pause
            self.connection.send(*self.guard.hold("paused"))
            return None, None
        requested = self._ask_operator(lead) if lead.human else self._ask_policy(lead, act, view)
        age = clock() - self.connection.looked
        if self.args.realtime and age > LATE:  # all has changed
            self.connection.send(*self.guard.hold("late"))
            who = "operator's arm" if lead.human else "policy"
            self.connection.lose_command(f"the {who} took {age:.1f} s")
            return None, None
        applied = self.connection.send(*self.guard.step(requested, view.joints))
        return requested, applied

    def _ask_policy(self, lead: Lead, act, view: View):
        """Return the next action of the chunk, asking for a new chunk where none is left."""
        if not lead.chunk:
            lead.chunk = list(act(view.vector))
        return lead.chunk.pop(0)

    def _ask_operator(self, lead: Lead):
        """Return the operator's action; in the first second the arm slides towards the operator."""
        try:
            action = self.operator.action(self.guard)
        except Exception as error:  # a driver's errors are of any kind
            raise UserError(
                "the operator's arm is lost, the running episode dropped: "
                f"{type(error).__name__}: {error}"
            ) from error
        lead.periods += 1
        share = lead.periods * PERIOD / max(np.abs(action[:6]).max(), 1e-9)
        action[:6] *= min(1.0, share)
        return action

    def _begin(self, seed: int) -> View:
        """Reset the simulation, or go to the start and wait for a person to place the object."""
        if self.driver.simulated:
            self.driver.reset(seed)
        else:
            self.move(self.home, timeout=20)
            self._wait_for_the_object()
        self.pace.start()
        view = self._fresh_view()
        self.guard.start(view.joints, view.gripper)
        return view

    def _wait_for_the_object(self) -> None:
        self.keypad.forget()  # only what is pressed from here on agrees
        print("place the object, then press space")
        while self.watch.ending is None and not self.keypad.gone:
            event = "quit" if self.interrupt.stop else self.keypad.wait(0.5)
            if event == "pause":
                return
            self.watch.heed(event)  # ends the episode before its first command

    def _fresh_view(self) -> View:
        """Look until the arm is seen. UserError after PATIENCE."""
        view = self.connection.look()
        while view is None:
            self._refuse_to_go_on(view)
            self.pace.wait()
            view = self.connection.look()
        return view

    def _next_event(self) -> str | None:
        """Return the next key; a signal counts as quit, and a stop key still outranks it."""
        if not self.interrupt.stop:
            return self.keypad.poll()
        return "stop" if self.keypad.poll() == "stop" else "quit"

    def _count_silence(self, view: View | None) -> None:
        if view is None or self.connection.lost_command:
            self.watch.silent += 1
        else:
            self.watch.silent = 0

    def _refuse_to_go_on(self, view: View | None) -> None:
        """Say once that the arm holds, and why; UserError where the session cannot go on.

        That is after PATIENCE without the arm, outside the limits, and without a keypad.
        """
        connection = self.connection
        lost = view is None or connection.lost_command
        if lost and not self.watch.announced:
            warn(f"HOLDING: {connection.fault}")
        self.watch.announced = lost
        self._count_silence(view)
        if self.watch.silent > PATIENCE / PERIOD:
            raise UserError(
                f"{connection.fault}, for five seconds: if the arm was fine before, check power "
                "and cables, then --resume"
            )
        if connection.link is Link.STRAYED:
            self.watch.heed("stop")
            raise UserError(
                f"the arm was moved outside its limits ({connection.strayed}) while nothing was "
                "heard of it or it did not obey: it holds where it is, the running episode is "
                "dropped; move it inside by hand, then --resume"
            )
        if self.keypad.gone:
            self.watch.heed("stop")
            raise UserError(
                "the keypad is gone (terminal closed or device unplugged): the arm holds where it "
                "is, the running episode is dropped; --resume goes on"
            )

    def _label(self, episode: Episode) -> None:
        """Ask once for the label of an episode that ran out of time."""
        if episode.outcome == "timeout" and not self.judged:
            self.keypad.forget()
            print("time is up, no label: s success, f fail, d discard? (10 s; otherwise none)")
            event = self.keypad.wait(10)
            if event not in (None, "pause"):
                episode.outcome = event
        self.watch.heed(episode.outcome)

    def status(self) -> str:
        """Describe periods, watchdog and what the guard has changed, for the progress line."""
        report = self.pace.report().items()
        parts = [f"{name.replace('_', ' ')} {value:.0f}" for name, value in report]
        if self.connection.trips:
            parts.append(f"watchdog {self.connection.trips}")
        counts = sorted(self.guard.counts.items())
        changed = ", ".join(f"{name} {count}" for name, count in counts)
        parts.append(f"guard: {changed or 'nothing'}")
        return ", ".join(parts)


def clock() -> float:
    """Return seconds that go on while a laptop sleeps."""
    return time.clock_gettime(CLOCK)


def warn(text: str) -> None:
    """Print to a terminal that may be gone: the arm matters more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr)


@contextlib.contextmanager
def stay_awake():
    """Ignore what would end or suspend the program while the arm is under power.

    A closed terminal (SIGHUP) is a lost keypad, on which the arm holds: it must not kill the
    program mid-motion. Ctrl-Z and Ctrl-\\ would leave the arm under power with nobody watching,
    and a shell also changes the terminal's mode, so that keys die.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGTSTP, signal.SIGQUIT):
            before[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keypad_for(args, driver: Driver) -> str:
    """Return which keypad to open. UserError where a real arm would get none.

    Whatever judges success, somebody must be able to stop and to pause an arm that is no
    simulation.
    """
    name = args.keypad
    if name == "auto":
        return "none" if driver.simulated and driver.judges else "terminal"
    if name == "none" and not (driver.simulated and driver.judges):
        raise UserError(
            "--keypad none is for a simulated arm: somebody has to place the object and to stop "
            "this one"
        )
    return name


@contextlib.contextmanager
def session(args):
    """Open the arm, its keypad and its operator: a Rig that is not entered yet."""
    driver, operator = open_driver(args)
    senses = Senses(
        driver, Pace(args.realtime), args.observe, lambda cameras: open_eyes(args, cameras)
    )
    name = keypad_for(args, driver)
    # on a simulation a person who asked for a keypad gives the labels
    judged = driver.judges and (name == "none" or not driver.simulated)
    with stay_awake(), Interrupt() as interrupt, open_keypad(name) as keypad:
        if judged:
            print("labels come from the robot itself")
        if name != "none":
            print(HELP)
        try:
            yield Rig(args, driver, senses, keypad, operator, interrupt, judged)
        finally:
            if operator is not None:
                with contextlib.suppress(Exception):  # the arm itself has been let go by now
                    operator.close()
