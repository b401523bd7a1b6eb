"""The keypad on a pseudo-terminal, and the deadlines of the control loop.

python -m pytest tests/robot/test_keypad.py
"""

import contextlib
import errno
import os
import pty
import sys
import time
from types import SimpleNamespace

import pytest

from arms import senses
from arms.keypad import TerminalPad, events, open_keypad
from arms.senses import PERIOD, Pace
from logbook import UserError

# ---- the keypad


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    yield ours, theirs
    for descriptor in (ours, theirs):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_every_key_of_a_terminal_is_latched_and_the_terminal_restored(terminal):
    import termios

    ours, theirs = terminal
    mode = termios.tcgetattr(theirs)
    with TerminalPad(theirs) as keypad:
        assert keypad.poll() is None
        os.write(ours, b"s0d q\x1b[Az")  # an arrow key and z are nobody's
        time.sleep(0.05)
        assert [keypad.poll() for _ in range(6)] == [
            "success",
            "fail",
            "discard",
            "pause",
            "quit",
            None,
        ]
        assert termios.tcgetattr(theirs)[3] != mode[3]
    assert termios.tcgetattr(theirs)[3] == mode[3]


def test_a_stop_overtakes_what_was_pressed_before_and_a_question_forgets_it(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        os.write(ours, b" " * 30 + b"x")
        time.sleep(0.05)
        assert [keypad.poll(), keypad.poll()] == ["stop", None]
        os.write(ours, b"  sq")
        time.sleep(0.05)
        keypad.forget()
        assert [keypad.poll(), keypad.poll()] == ["quit", None]
        os.write(ours, b" ")
        assert keypad.wait(5) == "pause"


def test_a_terminal_that_disappears_is_noticed(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        os.close(ours)
        assert keypad.poll() is None and keypad.gone


def test_waiting_for_a_key_ends_with_the_key_or_the_time(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        since = time.monotonic()
        assert keypad.wait(0.2) is None and 0.2 <= time.monotonic() - since < 1
        os.write(ours, b"1")
        assert keypad.wait(5) == "success"


def test_escape_alone_stops_and_capitals_count():
    assert (
        events(b"\x1b") == ["stop"]
        and events(b"S\x1bOPF") == ["success", "fail"]
        and events(b"\xff\x1b[15~1") == ["success"]
    )


def test_a_function_key_that_comes_in_two_parts_is_no_label_and_swallows_no_stop(terminal):
    ours, theirs = terminal
    with TerminalPad(theirs) as keypad:
        found = []
        for part in (b"\x1b[", b"15", b"~f"):  # F5, then f
            os.write(ours, part)
            time.sleep(0.02)
            found += [keypad.poll(), keypad.poll()]
        assert found == [None] * 4 + ["fail", None]
        os.write(ours, b"\x1b[")
        time.sleep(0.02)
        assert keypad.poll() is None
        time.sleep(0.35)  # nothing more of it comes: then x is an x
        os.write(ours, b"x")
        time.sleep(0.02)
        assert keypad.poll() == "stop"


def test_a_keypad_that_somebody_else_holds_is_an_error_in_one_line(terminal, monkeypatch):
    class Held:
        def __init__(self, path):
            self.path, self.fd = path, terminal[1]

        def grab(self):
            raise OSError(errno.EBUSY, "Device or resource busy")

        def close(self):
            self.fd = None

    evdev = SimpleNamespace(InputDevice=Held, ecodes=SimpleNamespace(KEY={}))
    monkeypatch.setitem(sys.modules, "evdev", evdev)
    keypad = open_keypad("/dev/input/by-id/pedal")
    with (
        pytest.raises(UserError, match="pedal for this program alone .Device or resource busy"),
        keypad,
    ):
        pass
    assert keypad.device.fd is None


def test_a_keypad_that_is_not_there_is_an_error_in_one_line(tmp_path):
    reader, writer = os.pipe()
    with pytest.raises(UserError, match="terminal"), TerminalPad(reader):
        pass
    with pytest.raises(UserError, match="evdev|cannot open"):
        open_keypad(str(tmp_path / "none"))


# ---- deadlines


def test_deadlines_are_absolute_and_missed_ones_are_counted_not_caught_up(monkeypatch):
    clock, pace, waits = [100.0], Pace(realtime=True), []

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(senses, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    pace.start()
    for count in range(12):
        sleep(
            {4: 0.15, 8: 0.06}.get(count, 0.01)
        )  # one that missed its deadline, one that nearly did
        command = clock[0]
        pace.wait()
        waits.append(clock[0] - command)
    assert clock[0] - 100 == pytest.approx(12 * PERIOD + 0.15)  # nothing else adds up
    assert waits[4] == pytest.approx(PERIOD) and waits[8] == pytest.approx(
        PERIOD / 4
    )  # whole after a late command
    report = pace.report()
    assert report["overruns"] == 1 and report["period_max"] == pytest.approx(1000 * (0.15 + PERIOD))
    assert report["period_p50"] == pytest.approx(1000 * PERIOD)
