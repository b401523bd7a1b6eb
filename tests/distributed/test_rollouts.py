"""Rollout workers: order, pace and versions of what arrives; deaths, standstill and resume.

    python -m pytest tests/distributed/test_rollouts.py

What does not hang on processes is tested with threads, on an environment that costs nothing.
Not here: the training script with workers (test_distributed.py), Ray (test_distributed_ray.py).
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from counter import HORIZON, LIMIT, Actor, Large, Suicide, Unwilling
from crews import (
    check_lead,
    check_order,
    check_sequence,
    planned,
    rollouts,
    seeds,
    taken,
    watched,
    workers,
)

from distributed import rollouts as module
from distributed.rollouts import Watch
from logbook import UserError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def one():
    """Makes Rollouts that are closed at the end, and interrupted should they wait for ever."""
    made, timers = [], []

    def make(*args, **kwargs):
        runner = rollouts(*args, **kwargs)
        made.append(runner)
        timers.append(threading.Timer(120.0, lambda: setattr(runner.interrupt, "stop", True)))
        timers[-1].start()
        return runner

    yield make
    for runner, timer in zip(made, timers):
        timer.cancel()
        runner.close()


# ---- what arrives


@pytest.mark.parametrize("count", [1, 3])
def test_steps_come_in_order_as_whole_episodes_of_different_seeds(count, one):
    moves = taken(one(count, threads=True), 150)
    check_order(moves)
    check_sequence(moves, count)
    assert len({seed for plan in planned(3, 50) for seed in plan}) == 150


def test_every_chunk_is_drawn_with_the_newest_weights_and_versions_never_fall(one):
    """An action's weights are as old as the lead and one publication at most."""
    moves, versions = watched(one(threads=True), 150)
    acted = [move.action[0] for move in moves]
    oldest = LIMIT + 3 * HORIZON
    assert all(i - oldest <= weight <= i for i, weight in enumerate(acted)) and acted[-1] > 100
    assert versions == sorted(versions) and acted == sorted(acted) and len(set(versions)) > 10


@pytest.mark.parametrize("count", [1, 3])
def test_workers_are_ahead_of_a_slow_learner_by_a_bounded_number_of_steps(count, one):
    runner = one(count, wait=0.0, threads=True)
    moves = taken(runner, 10 * LIMIT)
    check_lead(runner)
    moves += taken(runner, 10 * LIMIT)  # and they go on
    check_lead(runner)
    check_sequence(moves, count)


def test_a_seed_fixes_the_episodes_of_every_worker(one):
    runs = [seeds(taken(one(seed=seed, threads=True), 60)) for seed in (3, 3, 4)]
    first, again, other = runs
    assert first == again and not set(first) & set(other)


@pytest.mark.parametrize("count", [1, 3])
def test_a_resumed_run_takes_what_was_left_and_replays_unfinished_episodes(count, one, tmp_path):
    """Steps join exactly, and a slot's episodes are those of the uninterrupted run."""
    runner = one(threads=True)
    moves = taken(runner, 33)
    while not runner.row or len(runner.waiting) < 2:  # inside an episode, another waits
        moves += taken(runner, 1)
        time.sleep(0.05)
        runner._receive(0)
    save_checkpoint(tmp_path / "last.pt", {"runner": runner.state_dict()})
    resumed = one(count, threads=True)
    resumed.load_state_dict(load_checkpoint(tmp_path / "last.pt")["runner"])
    for _ in range(6):
        check_lead(resumed, 0.1)
        moves += taken(resumed, 10)
    check_order(moves)
    check_sequence(moves, count)


# ---- workers that are lost


def test_a_killed_process_is_replaced_and_costs_its_unfinished_episode_only(one, capfd):
    runner = one(2, wait=0.005)
    moves, versions, more = [], [], []
    while runner.received[0] < 60:  # its successor has to know of them
        part = watched(runner, 10)
        moves, versions = moves + part[0], versions + part[1]
    os.kill(killed := workers(runner)[0], signal.SIGKILL)
    while workers(runner)[0] == killed or workers(runner)[0] not in {move.obs[2] for move in more}:
        more += taken(runner, 10)  # until its successor plays
    check_order(moves + more)
    check_lead(runner, 1.0)
    assert "worker 0 died" in capfd.readouterr().err
    assert os.getpid() not in {move.obs[2] for move in moves}
    for pid in {move.obs[2] for move in moves}:
        own = [version for move, version in zip(moves, versions) if move.obs[2] == pid]
        assert own == sorted(own) and own[-1] > own[0]
    assert moves[-1].action[0] > 0
    check_sequence(moves + more, 2)  # every one once, that one too


def test_a_worker_that_cannot_live_ends_the_run_in_one_line(one, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1)
    with pytest.raises(UserError, match="lost 2 times in a row; the last one died"):
        one(kind=Suicide).step()
    with pytest.raises(UserError, match="worker 0 failed: ValueError: the action is not finite"):
        one(actor=Actor(float("nan"))).step()


def test_a_worker_that_stands_still_is_replaced_and_costs_its_unfinished_episode_only(
    one, monkeypatch, capfd
):
    """A stopped process sends nothing and does not end: only its silence tells."""
    monkeypatch.setattr(module, "STANDSTILL", 1.0)
    runner = one(wait=0.005)
    moves = taken(runner, 40)
    os.kill(stopped := workers(runner)[0], signal.SIGSTOP)
    while workers(runner)[0] == stopped or workers(runner)[0] not in {
        move.obs[2] for move in moves
    }:
        moves += taken(runner, 5)
    check_order(moves)
    check_sequence(moves, 1)
    said = capfd.readouterr().err
    assert "worker 0 has stood still for 1 s; a new one plays episode" in said
    assert gone([stopped])


def test_a_worker_that_always_stands_still_ends_the_run_in_one_line(one, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1)
    runner = one(kind=Unwilling)
    runner.watch.start_limit = 3.0  # it never asks for weights
    with pytest.raises(UserError, match="lost 2 times in a row; the last one has stood still"):
        runner.step()


def stop_for_ten_seconds(pid):
    """Stop a process; it ends after ten seconds, so that a learner that waits fails in time."""
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(10.0, os.kill, (pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()


def test_waiting_for_a_worker_that_stands_still_ends_at_an_interrupt(one):
    runner = one()
    moves = taken(runner, 40)
    stop_for_ten_seconds(workers(runner)[0])
    while runner.waiting:
        moves.append(runner.step())
    threading.Timer(1.0, lambda: setattr(runner.interrupt, "stop", True)).start()
    since = time.monotonic()
    while moves[-1] is not None and time.monotonic() - since < 20:
        moves.append(runner.step())
    assert time.monotonic() - since < 5 and runner.steps == len(moves) - 1
    assert runner.state_dict()["waiting"] == []


def test_a_worker_that_is_stopped_inside_a_message_does_not_stop_the_learner(one):
    """An episode of 200 kB per step is more than a pipe holds."""
    runner = one(wait=0.0, kind=Large)
    assert runner.step() is not None
    stop_for_ten_seconds(workers(runner)[0])
    runner.interrupt.stop = True
    since = time.monotonic()
    while runner.step() is not None and time.monotonic() - since < 20:
        pass
    assert time.monotonic() - since < 5


def test_only_time_in_which_the_learner_was_awake_counts_as_silence(monkeypatch):
    """After a night of sleep, or an evaluation of minutes, everybody looks silent."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    watch = Watch(2, start_limit=300.0)
    assert watch.silent([1, 0]) == []
    now[0] = 10_000.0
    assert watch.silent([1, 0]) == []
    found = []
    for second in range(400):
        now[0] += 1
        found.append(watch.silent([1 + second // 50, 0]))
    assert found.index([1]) in (299, 300) and [0] not in found  # slot 0 speaks every 50 s
    watch.reset(1)
    assert watch.silent([9, 0]) == []
    quiet = []
    for _ in range(70):
        now[0] += 1
        quiet.append(watch.silent([9, 0]))
    assert [] in quiet[:59] and quiet[-1] == [0]


# ---- the end


def alive(pid):
    try:
        status = (Path("/proc") / str(pid) / "stat").read_text()
    except OSError:
        return False
    return "Z" not in status.rpartition(")")[2].split()[0]


def gone(pids, seconds=20.0):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


DRIVER = """
import sys, time
sys.path[:0] = {path!r}
from crews import rollouts, taken, workers
if __name__ == "__main__":
    runner = rollouts(2, wait=0.01)
    taken(runner, 30)
    print(*workers(runner), flush=True)
    time.sleep(60)
"""


def test_workers_end_with_their_learner_however_it_ends(one, tmp_path):
    runner = one(2)
    taken(runner, 5)
    runner.close()
    assert gone(workers(runner), 1.0)
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    (tmp_path / "driver.py").write_text(DRIVER.format(path=paths))
    with subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"], stdout=subprocess.PIPE, text=True
    ) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        process.kill()
    assert gone(pids)


def test_a_dead_writers_weights_are_not_read(one):
    """The count is odd while weights are written: whoever died there leaves the old ones valid."""
    runner = one()
    weights = runner.crew.weights
    version, vector = weights.pull(0)
    assert version == 1 and np.array_equal(vector, np.zeros(4, np.float32))
    weights.count.value += 1  # the writer has begun
    weights.vector.fill_(7.0)
    assert weights.pull(0) == (0, None) and weights.pull(1) == (1, None)
    weights.count.value += 1
    version, vector = weights.pull(1)
    assert version == 2 and np.array_equal(vector, np.full(4, 7.0, np.float32))
