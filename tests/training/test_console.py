"""logbook, what a loop needs around it: signals that save first, where the time goes, the progress line, means.

    python -m pytest tests/training/test_console.py
"""
import csv
import os
import signal
import sys
import threading
import time
from functools import partial

import pytest
import torch

from logbook import Clock, Interrupt, Logbook, Progress, Report


def test_sigterm_and_the_first_ctrl_c_set_stop_and_the_second_raises(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for first in (signal.SIGTERM, signal.SIGINT):
        with Interrupt() as interrupt:
            assert not interrupt.stop
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGTERM)      # a scheduler that insists does not cut the save short
            assert interrupt.stop
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err.count("saving") == 2


def test_interrupt_is_harmless_in_another_thread():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append(interrupt.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_forked_worker_ignores_ctrl_c_and_can_be_terminated():
    with Interrupt():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGINT)
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
        1 / 0
    assert clock.split() == {"critic": 3, "e-step": 10, "env": 100}
    with clock("env"):
        work(5)
    assert clock.split() == {"env": 5}
    assert clock.split() == {}


def test_the_benchmarks_clock_charges_a_gpus_work_to_the_phase_that_asked_for_it(monkeypatch):
    from benchmarks.speed import finish
    now, asked = [0.0], [0.0]                        # a GPU that works while somebody waits for it
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (now.append(now.pop() + asked.pop()), asked.append(0.0)))
    for clock, charged in (Clock(partial(finish, torch.device("cuda"))), {"critic": 3.0, "e-step": 4.0}), (Clock(), {}):
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
    assert out.splitlines() == ["poco 100/250: 2 env steps/s, 4.0 updates/s, 1m15s left",
                                "poco 200/250: success 45 %, 2 env steps/s, 4.0 updates/s, 0m25s left",
                                "poco 250/250: success 45 %, 2 env steps/s, 4.0 updates/s, 0m00s left",
                                "done"]


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
    book = Logbook.create(tmp_path / "run", {}, ["success", "updates", "env_steps_per_s", "updates_per_s", "loss", "q",
                                                 "time/env", "time/critic"])
    clock = Clock()
    monkeypatch.setattr(clock, "split", lambda: {"env": 2.0})
    report = Report(book, clock, ("env", "critic"))
    for loss in (1.0, 3.0):
        report.add({"loss": torch.tensor(loss)})
    report.add({"loss": torch.tensor(5.0), "q": torch.tensor(-1.0)})                # q begins after the warm-up
    report.write(10, success=0.5)
    report.add({"loss": torch.tensor(7.0)})
    resumed = Report(book, clock, ("env", "critic"))
    resumed.load_state_dict(report.state_dict())
    resumed.add({"loss": torch.tensor(9.0)})
    resumed.write(16, success=None)
    with open(book.folder / "progress.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"step": "10", "success": "0.5", "updates": "3", "env_steps_per_s": "5.0", "updates_per_s": "1.5",
                     "loss": "3.0", "q": "-1.0", "time/env": "2.0", "time/critic": "0.0"}
    assert second == {"step": "16", "success": "", "updates": "5", "env_steps_per_s": "1.5", "updates_per_s": "0.5",
                      "loss": "8.0", "q": "", "time/env": "4.0", "time/critic": "0.0"}
    assert resumed.time_split() == "stage II took 8 s: env 8 s, critic 0 s"
