"""What a loop needs around it: signals that save first, phases, progress, output that may die.

python -m pytest tests/training/test_console.py      # 15 s
"""

import csv
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from logbooks import ROOT

from logbook import Clock, Interrupt, Logbook, Progress, Report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def hangup():
    """Let SIGHUP arrive, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_sets_stop_and_the_second_ctrl_c_raises(capfd, hangup):
    before = [signal.getsignal(number) for number in SIGNALS]
    for first in SIGNALS:
        with Interrupt() as interrupt:
            assert not interrupt.stop
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGTERM)  # who insists does not cut the save short
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.stop
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert [signal.getsignal(number) for number in SIGNALS] == before
    assert capfd.readouterr().err.count("saving") == 3


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not interrupt.stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupt_is_harmless_in_another_thread():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append(interrupt.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_forked_worker_leaves_signals_to_its_parent_and_can_be_terminated():
    with Interrupt():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(child, number)
            time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_clock_counts_every_second_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()

    def work(seconds):
        now[0] += seconds

    with clock("critic"):
        work(1)
        with clock("e-step"):
            work(10)
        work(2)
    work(1000)
    with pytest.raises(ZeroDivisionError), clock("env"):
        work(100)
        raise ZeroDivisionError
    assert clock.split() == {"critic": 3, "e-step": 10, "env": 100}
    with clock("env"):
        work(5)
    assert clock.split() == {"env": 5}
    assert clock.split() == {}


def test_the_benchmarks_clock_charges_a_gpus_work_to_the_phase_that_asked_for_it(monkeypatch):
    from benchmarks.speed import finish

    now, asked = [0.0], [0.0]  # a GPU that works while somebody waits for it
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda: (now.append(now.pop() + asked.pop()), asked.append(0.0))
    )
    for clock, charged in (
        (Clock(partial(finish, torch.device("cuda"))), {"critic": 3.0, "e-step": 4.0}),
        (Clock(), {}),
    ):
        for phase, seconds in charged.items() or (("critic", 3.0), ("e-step", 4.0)):
            with clock(phase):
                asked[0] += seconds
        assert {name: value for name, value in clock.split().items() if value} == charged


def test_progress_without_a_terminal_is_one_plain_line_per_interval(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("poco", total=250, every=100) as progress:
        for step in range(1, 251):
            now[0] += 0.5
            progress.update(step, updates=2 * step, success=None if step < 150 else 0.45)
        progress.write("done")
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out
    assert out.splitlines() == [
        "poco 100/250: 2 env steps/s, 4.0 updates/s, 1m15s left",
        "poco 200/250: success 45 %, 2 env steps/s, 4.0 updates/s, 0m25s left",
        "poco 250/250: success 45 %, 2 env steps/s, 4.0 updates/s, 0m00s left",
        "done",
    ]


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("warm-up", total=100, every=10) as progress:
        now[0] = 2.0
        progress.stage = "poco"
        progress.update(50, updates=100, success=0.45)
    out, err = capsys.readouterr()
    assert out == "" and "50/100" in err and "poco" in err
    assert "success 45 %, 25 env steps/s, 50.0 updates/s" in err


def test_a_report_writes_means_rates_and_times_of_its_interval_alone(tmp_path, monkeypatch):
    book = Logbook.create(
        tmp_path / "run",
        {},
        [
            "success",
            "updates",
            "env_steps_per_s",
            "updates_per_s",
            "loss",
            "q",
            "time/env",
            "time/critic",
        ],
    )
    clock = Clock()
    monkeypatch.setattr(clock, "split", lambda: {"env": 2.0})
    report = Report(book, clock, ("env", "critic"))
    for loss in (1.0, 3.0):
        report.add({"loss": torch.tensor(loss)})
    report.add({"loss": torch.tensor(5.0), "q": torch.tensor(-1.0)})  # q begins after the warm-up
    report.write(10, success=0.5)
    report.add({"loss": torch.tensor(7.0)})
    resumed = Report(book, clock, ("env", "critic"))
    resumed.load_state_dict(report.state_dict())
    resumed.add({"loss": torch.tensor(9.0)})
    resumed.write(16, success=None)
    with open(book.folder / "progress.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "step": "10",
        "success": "0.5",
        "updates": "3",
        "env_steps_per_s": "5.0",
        "updates_per_s": "1.5",
        "loss": "3.0",
        "q": "-1.0",
        "time/env": "2.0",
        "time/critic": "0.0",
    }
    assert second == {
        "step": "16",
        "success": "",
        "updates": "5",
        "env_steps_per_s": "1.5",
        "updates_per_s": "0.5",
        "loss": "8.0",
        "q": "",
        "time/env": "4.0",
        "time/critic": "0.0",
    }
    assert resumed.time_split() == "stage II took 8 s: env 8 s, critic 0 s"


# output that may die

RUN = """
import sys, subprocess, time
from logbook import Interrupt, Logbook, Progress, UserError, cli

def main():
    book = Logbook.create(sys.argv[1], {}, ["success"])
    with Interrupt() as interrupt, Progress("poco", total=100, every=1) as bar:
        for step in range(1, 101):
            book.log(step, success=0.5)
            bar.update(step, updates=step)
            print("to the other stream", file=sys.stderr, flush=True)
            time.sleep(0.001)
        bar.write("umlaut \\u00e4, half a pair \\ud800")
        subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
        assert not interrupt.stop
    book.save("last.pt", {"step": step})
    if len(sys.argv) > 2:
        raise UserError("what the user did")

cli(main)
"""


NOHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


def start(folder, *more, prefix=(), **streams):
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", RUN, str(folder), *more], cwd=ROOT, **streams
    )


def wait_for_a_row(folder):
    path = folder / "progress.csv"
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(folder):
    rows = (folder / "progress.csv").read_bytes().count(b"\n")
    return (folder / "last.pt").exists() and rows == 101


def test_a_run_whose_reader_has_gone_goes_on_and_saves(tmp_path):
    """`python train_online.py | head -1`: EPIPE, on both streams."""
    run = start(tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    run.stderr.close()
    assert run.wait(60) == 0 and finished(tmp_path / "run")


def test_a_run_whose_terminal_has_gone_goes_on_and_saves(tmp_path):
    """A closed ssh session under nohup: EIO, on a terminal that shows a bar."""
    ours, theirs = pty.openpty()
    ignore = (sys.executable, "-c", NOHUP)
    run = start(tmp_path / "run", prefix=ignore, stdout=theirs, stderr=theirs)
    os.close(theirs)
    wait_for_a_row(tmp_path / "run")
    os.close(ours)
    assert run.wait(60) == 0 and finished(tmp_path / "run")


def test_a_full_disk_under_the_log_or_no_output_at_all_is_no_reason_to_stop(tmp_path):
    with open("/dev/full", "wb") as full:
        log_full = start(tmp_path / "a", stdout=full, stderr=full)
    closed = ("sh", "-c", '"$0" "$@" >&- 2>&-')
    no_output = start(tmp_path / "b", prefix=closed)
    assert log_full.wait(60) == 0 and no_output.wait(60) == 0
    assert finished(tmp_path / "a") and finished(tmp_path / "b")


def test_a_mistake_of_the_user_keeps_its_exit_code_without_a_reader(tmp_path):
    run = start(tmp_path / "run", "wrong", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    run.stderr.close()
    assert run.wait(60) == 2 and finished(tmp_path / "run")


def test_a_run_with_a_reader_prints_all_of_it(tmp_path):
    run = start(tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = run.communicate(timeout=60)
    lines = out.decode().splitlines()
    assert run.returncode == 0 and len(lines) == 102
    assert lines[-2:] == ["umlaut \u00e4, half a pair \\ud800", "a child"]
    assert err.decode() == "to the other stream\n" * 100


@pytest.mark.parametrize(
    "change",
    [
        {"sums": {7: (0.5, 1)}},
        {"sums": {"lost": (0.5, 1)}},
        {"sums": {"loss": ("a", 1)}},
        {"sums": {"loss": (0.5, -1)}},
        {"updates": True},
        {"updates": -1},
        {"best": float("nan")},
        {"seconds": {"env": float("inf")}},
        {"seconds": {}},
        {"row_step": 1.5},
    ],
)
def test_a_report_refuses_a_state_it_cannot_have_written(tmp_path, change):
    book = Logbook.create(tmp_path / "run", {}, ["loss", "time/env"])
    report = Report(book, Clock(), ("env",))
    state = report.state_dict()
    report.load_state_dict(state)
    with pytest.raises((KeyError, ValueError)):
        report.load_state_dict(state | change)
