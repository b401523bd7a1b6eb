"""Labels and commands from the person at the arm, each key press kept until it is asked for.

    from arms.keypad import ScriptedPad, TerminalPad, open_keypad
    with open_keypad("terminal") as keypad:
        event = keypad.poll()               # "success", "fail", ... or None; never waits
        keypad.gone                         # True once the terminal or the device has disappeared

Keys: s or 1 success, f or 0 fail, d discard, space take over or pause, q quit, x or ESC stop.
A terminal works over SSH and tmux but must have the focus; an evdev device (a USB keypad or a pedal, the user in group
`input`, `pip install evdev`) works without. Standard library otherwise.
Not here: what the events do to the arm (robot.py).
"""
import os
import re
import select
import sys
import time

from logbook import UserError

KEYS = {"s": "success", "1": "success", "f": "fail", "0": "fail", "d": "discard", " ": "pause", "q": "quit",
        "x": "stop", "\x1b": "stop"}
CODES = {"KEY_S": "s", "KEY_1": "1", "KEY_KP1": "1", "KEY_F": "f", "KEY_0": "0", "KEY_KP0": "0", "KEY_D": "d",
         "KEY_SPACE": " ", "KEY_KPENTER": " ", "KEY_Q": "q", "KEY_X": "x", "KEY_ESC": "\x1b"}
HELP = "keys: s success, f fail, d discard, space take over / pause, q quit, x or ESC stop and hold"


class ScriptedPad:
    """For tests and simulations: one entry per poll, an event or None; silent after the last."""

    def __init__(self, events=()):
        self.events, self.gone = list(events), False

    def poll(self):
        """The next event, or None."""
        return self.events.pop(0) if self.events else None

    def forget(self):
        """Before a question: only what is pressed from now on answers it. A script has no old keys."""

    def wait(self, seconds):
        """The next event within so many seconds, or None."""
        end = time.monotonic() + seconds
        while (event := self.poll()) is None and not self.gone and time.monotonic() < end and self._more(end):
            pass
        return event

    def _more(self, end):
        return bool(self.events)                      # a script has no more to say later

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class TerminalPad(ScriptedPad):
    """Key presses of a terminal in cbreak mode, which __exit__ restores. Ctrl-C stays a signal."""

    def __init__(self, descriptor=None):
        super().__init__()
        self.descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._begun, self._until = b"", 0.0           # of a function key, and how long the rest may take

    def __enter__(self):
        import termios
        import tty
        if not os.isatty(self.descriptor):
            raise UserError("the keypad needs a terminal and standard input is none: start robot.py in one, name a "
                            "device with --keypad /dev/input/by-id/..., or use --keypad none on the simulated arm")
        self._saved = termios.tcgetattr(self.descriptor)
        tty.setcbreak(self.descriptor)
        return self

    def __exit__(self, *_):
        import termios
        try:
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, self._saved)
        except (termios.error, OSError):
            pass                                      # the terminal is gone, and its mode with it

    def poll(self):
        """The oldest event not yet asked for, or None; a stop overtakes all that was pressed before it."""
        if not self.gone:
            self._read()
        if "stop" in self.events:
            self.events = ["stop"]
        return super().poll()

    def forget(self):
        if not self.gone:
            self._read()
        self.events = [event for event in self.events if event in ("quit", "stop")]

    def _read(self):
        try:
            while select.select([self.descriptor], [], [], 0)[0]:
                data = os.read(self.descriptor, 1024)
                if not data:
                    raise OSError("end of file")
                data = data if time.monotonic() > self._until else self._begun + data
                self._begun = re.search(rb"(\x1b[\[O][0-9;]*)?\Z", data)[0]
                self._until = time.monotonic() + 0.3
                self.events += events(data[:len(data) - len(self._begun)])
        except OSError:                               # also EIO: the other end of the pseudo-terminal was closed
            self.gone = True

    def _more(self, end):
        select.select([self.descriptor], [], [], max(0.0, min(0.05, end - time.monotonic())))
        return True


class EvdevPad(TerminalPad):
    """A keypad or pedal of its own, for this program alone; key presses only, never repeats."""

    def __init__(self, path):
        try:
            import evdev
        except ImportError as error:
            raise UserError("--keypad DEVICE needs evdev: pip install evdev") from error
        try:
            self.device = evdev.InputDevice(path)
        except OSError as error:
            raise UserError(f"cannot open the keypad {path} ({error.strerror}): is it plugged in, and are you in the "
                            "group input?") from error
        super().__init__(self.device.fd)
        self._names = evdev.ecodes.KEY

    def __enter__(self):
        try:
            self.device.grab()
        except OSError as error:
            self.device.close()
            raise UserError(f"cannot have the keypad {self.device.path} for this program alone ({error.strerror}): "
                            "another one holds it") from error
        return self

    def __exit__(self, *_):
        self.device.close()

    def _read(self):
        try:
            while select.select([self.descriptor], [], [], 0)[0]:
                for event in self.device.read():
                    names = self._names.get(event.code, ())
                    names = (names,) if isinstance(names, str) else names
                    if event.type == 1 and event.value == 1:            # EV_KEY, pressed
                        self.events += [KEYS[CODES[name]] for name in names if name in CODES][:1]
        except OSError:                               # unplugged
            self.gone = True


def events(data):
    """Bytes of a terminal -> events. An arrow or function key (ESC [ or ESC O ...) is none; a lone ESC is stop."""
    text, found, i = data.decode("ascii", "replace"), [], 0
    while i < len(text):
        if text[i] == "\x1b" and text[i + 1:i + 2] in ("[", "O"):
            i += 2
            while i < len(text) and not text[i].isalpha() and text[i] != "~":
                i += 1
        elif text[i].lower() in KEYS:
            found.append(KEYS[text[i].lower()])
        i += 1
    return found


def open_keypad(name):
    """"terminal", "none" or the path of an input device -> a keypad, to be used in a with statement."""
    if name == "none":
        return ScriptedPad()
    return TerminalPad() if name == "terminal" else EvdevPad(name)
