"""Labels and commands from the person at the arm; each key press is kept until it is asked for.

    from arms.keypad import ScriptedPad, TerminalPad, open_keypad
    with open_keypad("terminal") as keypad:
        event = keypad.poll()               # "success", "fail", ... or None; never waits
        keypad.gone                         # True once the terminal or the device has disappeared

Keys: s or 1 success, f or 0 fail, d discard, space take over or pause, q quit, x or ESC stop. A
terminal works over SSH and tmux but must have the focus. An evdev device (a USB keypad or a
pedal, the user in group `input`, `pip install evdev`) works without focus.
Not here: what the events do to the arm (rig.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import time

from logbook import UserError

KEYS = {
    "s": "success",
    "1": "success",
    "f": "fail",
    "0": "fail",
    "d": "discard",
    " ": "pause",
    "q": "quit",
    "x": "stop",
    "\x1b": "stop",
}
CODES = {
    "KEY_S": "s",
    "KEY_1": "1",
    "KEY_KP1": "1",
    "KEY_F": "f",
    "KEY_0": "0",
    "KEY_KP0": "0",
    "KEY_D": "d",
    "KEY_SPACE": " ",
    "KEY_KPENTER": " ",
    "KEY_Q": "q",
    "KEY_X": "x",
    "KEY_ESC": "\x1b",
}
HELP = "keys: s success, f fail, d discard, space take over / pause, q quit, x or ESC stop and hold"


class ScriptedPad:
    """For tests and simulations: one entry per poll, an event or None; silent after the last."""

    def __init__(self, events=()):
        self.events = list(events)
        self.gone = False

    def poll(self) -> str | None:
        """Return the next event, or None."""
        return self.events.pop(0) if self.events else None

    def forget(self) -> None:
        """Forget old keys, so that only later ones answer a question; a script has none."""

    def wait(self, seconds: float) -> str | None:
        """Return the next event within so many seconds, or None."""
        end = time.monotonic() + seconds
        event = self.poll()
        while event is None and not self.gone and time.monotonic() < end:
            if not self._wait_for_more(end):
                break
            event = self.poll()
        return event

    def _wait_for_more(self, end: float) -> bool:
        """Wait a little for another event; False where none can come."""
        return bool(self.events)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class TerminalPad(ScriptedPad):
    """Key presses of a terminal in cbreak mode, which __exit__ restores. Ctrl-C stays a signal."""

    def __init__(self, descriptor: int | None = None):
        super().__init__()
        self.descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._begun = b""  # the bytes of a function key that have come so far
        self._until = 0.0  # and how long its rest may take

    def __enter__(self):
        import termios
        import tty

        if not os.isatty(self.descriptor):
            raise UserError(
                "the keypad needs a terminal and standard input is none: start robot.py in one, "
                "name a device with --keypad /dev/input/by-id/..., or use --keypad none on the "
                "simulated arm"
            )
        self._saved = termios.tcgetattr(self.descriptor)
        tty.setcbreak(self.descriptor)
        return self

    def __exit__(self, *_):
        import termios

        # where the terminal is gone, its mode has gone with it
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, self._saved)

    def poll(self) -> str | None:
        """Return the oldest event, or None; a stop overtakes all that was pressed before it."""
        if not self.gone:
            self._read()
        if "stop" in self.events:
            self.events = ["stop"]
        return super().poll()

    def forget(self) -> None:
        """Forget what was pressed so far, but for quit and stop."""
        if not self.gone:
            self._read()
        self.events = [event for event in self.events if event in ("quit", "stop")]

    def _read(self) -> None:
        try:
            while select.select([self.descriptor], [], [], 0)[0]:
                data = os.read(self.descriptor, 1024)
                if not data:
                    raise OSError("end of file")
                if time.monotonic() <= self._until:
                    data = self._begun + data
                self._begun = re.search(rb"(\x1b[\[O][0-9;]*)?\Z", data)[0]
                self._until = time.monotonic() + 0.3
                self.events += events(data[: len(data) - len(self._begun)])
        except OSError:  # also EIO: the other end of the pseudo-terminal was closed
            self.gone = True

    def _wait_for_more(self, end: float) -> bool:
        seconds = max(0.0, min(0.05, end - time.monotonic()))
        select.select([self.descriptor], [], [], seconds)
        return True


class EvdevPad(TerminalPad):
    """A keypad or pedal of its own, for this program alone; key presses only, never repeats."""

    def __init__(self, path: str):
        try:
            import evdev
        except ImportError as error:
            raise UserError("--keypad DEVICE needs evdev: pip install evdev") from error
        try:
            self.device = evdev.InputDevice(path)
        except OSError as error:
            raise UserError(
                f"cannot open the keypad {path} ({error.strerror}): is it plugged in, and are you "
                "in the group input?"
            ) from error
        super().__init__(self.device.fd)
        self._names = evdev.ecodes.KEY

    def __enter__(self):
        try:
            self.device.grab()
        except OSError as error:
            self.device.close()
            raise UserError(
                f"cannot have the keypad {self.device.path} for this program alone "
                f"({error.strerror}): another one holds it"
            ) from error
        return self

    def __exit__(self, *_):
        self.device.close()

    def _read(self) -> None:
        try:
            while select.select([self.descriptor], [], [], 0)[0]:
                for event in self.device.read():
                    if event.type == 1 and event.value == 1:  # EV_KEY, pressed
                        self._press(event.code)
        except OSError:  # unplugged
            self.gone = True

    def _press(self, code: int) -> None:
        """Keep the event of a key; a code may have several names."""
        names = self._names.get(code, ())
        if isinstance(names, str):
            names = (names,)
        for name in names:
            if name in CODES:
                self.events.append(KEYS[CODES[name]])
                return


def events(data: bytes) -> list[str]:
    """Turn bytes of a terminal into events.

    An arrow or function key (ESC [ or ESC O ...) is none; a lone ESC is stop.
    """
    text = data.decode("ascii", "replace")
    text = re.sub(r"\x1b[\[O][^A-Za-z~]*[A-Za-z~]?", "", text)
    return [KEYS[key] for key in text.lower() if key in KEYS]


def open_keypad(name: str) -> ScriptedPad:
    """Open "terminal", "none" or the path of an input device, to be used in a with statement."""
    if name == "none":
        return ScriptedPad()
    if name == "terminal":
        return TerminalPad()
    return EvdevPad(name)
