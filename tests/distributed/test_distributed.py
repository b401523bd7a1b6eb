"""Rollout workers: order, pace and versions of what arrives, deaths and resume, between processes and on Ray.

    python -m pytest tests/test_distributed.py

What does not hang on processes is tested with threads, on an environment that costs nothing (counter.py).
Not here: an arm's learner on another machine (test_distributed_arm.py).
"""
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import demos
import distributed
import train_online
from baselines import dppo, dsrl, ogpo, reinflow
from counter import HORIZON, LIMIT, Actor, Counter, Suicide
from distributed import Rollouts, cluster, flat, play
from logbook import UserError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent

class Threads:
    """Workers as threads of this process: the quickest pull and push there are."""

    def __init__(self, count, vector):
        self.taken, self.queue, self.version, self.stopped = [0] * count, queue.Queue(), 0, False
        self.publish(vector)

    def start(self, slot, job):
        def pull(known):
            if self.stopped:
                raise EOFError
            version, weights = self.newest
            return version, None if version == known else weights, self.taken[slot]

        def run():
            with contextlib.suppress(EOFError):
                play(pull, lambda item: self.queue.put((slot, item)), **job)
        threading.Thread(target=run, daemon=True).start()

    def publish(self, vector):
        self.version += 1
        self.newest = self.version, vector.numpy().copy()

    def take(self, seconds):
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self.queue.get(timeout=seconds or 1e-3))
            while True:
                found.append(self.queue.get_nowait())
        return found

    def close(self):
        self.stopped = True


def rollouts(count=1, wait=0.001, seed=0, address=None, actor=None, threads=False, make=Counter):
    runner = Rollouts(actor or Actor(), {"wait": wait, "episode_limit": LIMIT}, count, seed, 1_000_000, HORIZON,
                      address, make)
    if threads:
        runner.crew.close()
        runner.crew = Threads(count, flat(runner.parts))
    return runner


def taken(runner, steps, actor=None):
    """So many steps; `actor` learns meanwhile: its weight is the number of steps taken."""
    moves = []
    for i in range(steps):
        moves.append(runner.step())
        if actor is not None:
            actor.weight.data.fill_(i + 1.0)
    return moves


def episodes(moves):
    """The steps in lists, one for each episode; the last may be unfinished."""
    parts = [[]]
    for move in moves:
        parts[-1].append(move)
        if move.terminated or move.truncated:
            parts.append([])
    return [part for part in parts if part]


def check_order(moves):
    for part in episodes(moves):
        assert len({move.obs[0] for move in part}) == 1                            # one seed
        assert [int(move.obs[1]) for move in part] == list(range(len(part)))
        for a, b in zip(part, part[1:]):
            np.testing.assert_array_equal(a.next_obs, b.obs)
    for part in episodes(moves)[:-1]:
        assert len(part) == 5 + int(part[0].obs[0]) % 8 and part[-1].success == part[-1].terminated


@pytest.fixture
def one():
    """Makes Rollouts that are closed at the end."""
    made = []

    def make(*args, **kwargs):
        made.append(rollouts(*args, **kwargs))
        return made[-1]
    yield make
    for runner in made:
        runner.close()


def seeds(moves):
    return [part[0].obs[0] for part in episodes(moves)]


def planned(count, number, seed=0):
    """Seeds of the first episodes of these slots: (count, number)."""
    return [[int(np.random.default_rng([seed, 2, slot, n]).integers(1_000_000)) for n in range(number)]
            for slot in range(count)]


def check_sequence(moves, count):
    """Every slot's episodes came in the order of their numbers, from 0, none twice."""
    for plan in planned(count, len(moves)):
        came = [seed for seed in seeds(moves) if seed in plan]
        assert came == plan[:len(came)]


def workers(runner):
    return [process.pid for process, _ in runner.crew.workers]


def watched(runner, steps, wait=0.002):
    """Steps taken by a learner whose weight is the number of steps it has taken, and their weights' versions."""
    moves, versions = [], []
    for i in range(steps):
        episode, row = runner.waiting[0] if runner.waiting else None, runner.row
        moves.append(runner.step())
        episode = episode or (runner.waiting[0] if runner.row else None)
        versions.append(episode["version"][row] if episode else versions[-1])
        runner.acting.weight.data.fill_(i + 1.0)
        time.sleep(wait)
    return moves, versions


def check_lead(runner, pause=0.5):
    """A learner that stops: the workers do too, soon."""
    time.sleep(pause)
    for _ in range(20):
        runner._receive(0)
    ahead = [0] * len(runner.received)
    for episode in runner.waiting:
        ahead[episode["slot"]] += len(episode["reward"])
    if runner.waiting:
        ahead[runner.waiting[0]["slot"]] -= runner.row
    assert max(ahead) <= LIMIT + 2 * HORIZON and sum(ahead) > 0


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
    assert all(i - LIMIT - 3 * HORIZON <= weight <= i for i, weight in enumerate(acted)) and acted[-1] > 100
    assert versions == sorted(versions) and acted == sorted(acted) and len(set(versions)) > 10


@pytest.mark.parametrize("count", [1, 3])
def test_workers_are_ahead_of_a_slow_learner_by_a_bounded_number_of_steps(count, one):
    runner = one(count, wait=0.0, threads=True)
    moves = taken(runner, 10 * LIMIT)
    check_lead(runner)
    moves += taken(runner, 10 * LIMIT)                                            # and they go on
    check_lead(runner)
    check_sequence(moves, count)


def test_a_seed_fixes_the_episodes_of_every_worker(one):
    first, again, other = (seeds(taken(one(seed=seed, threads=True), 60)) for seed in (3, 3, 4))
    assert first == again and not set(first) & set(other)


@pytest.mark.parametrize("count", [1, 3])
def test_a_resumed_run_takes_what_was_left_and_plays_unfinished_episodes_from_their_start(count, one, tmp_path):
    """Steps join exactly; a slot's episodes are those of the uninterrupted run: none is lost, none comes twice."""
    runner = one(threads=True)
    moves = taken(runner, 33)
    while not runner.row or len(runner.waiting) < 2:                              # inside an episode, another waits
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


def test_a_killed_process_is_told_and_replaced_and_costs_its_unfinished_episode_only(one, capfd):
    runner = one(2, wait=0.005)
    moves, versions, more = [], [], []
    while runner.received[0] < 60:                                                # its successor has to know of them
        part = watched(runner, 10)
        moves, versions = moves + part[0], versions + part[1]
    os.kill(killed := workers(runner)[0], signal.SIGKILL)
    while workers(runner)[0] == killed or workers(runner)[0] not in {move.obs[2] for move in more}:
        more += taken(runner, 10)                                                 # until its successor plays
    check_order(moves + more)
    check_lead(runner, 1.0)
    assert "worker 0 died" in capfd.readouterr().err and os.getpid() not in {move.obs[2] for move in moves}
    for pid in {move.obs[2] for move in moves}:
        own = [version for move, version in zip(moves, versions) if move.obs[2] == pid]
        assert own == sorted(own) and own[-1] > own[0]
    assert moves[-1].action[0] > 0
    check_sequence(moves + more, 2)                                               # every one once, that one too


def test_a_worker_that_cannot_live_ends_the_run_in_one_line(one, monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 1)
    with pytest.raises(UserError, match="died 2 times in a row"):
        one(make=Suicide).step()
    with pytest.raises(UserError, match="worker 0 failed: ValueError: the action is not finite"):
        one(actor=Actor(float("nan"))).step()


def alive(pid):
    try:
        return "Z" not in (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def gone(pids, seconds=20.0):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


DRIVER = """
import sys, time
sys.path[:0] = {path!r}
from test_distributed import rollouts, taken, workers
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
    (tmp_path / "driver.py").write_text(DRIVER.format(path=[str(ROOT), str(ROOT / "tests")]))
    with subprocess.Popen([sys.executable, tmp_path / "driver.py"], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        process.kill()
    assert gone(pids)


# ---- the training script ---------------------------------------------------------------------------------------------

TOY = ("--preset cpu --hidden 32 --layers 2 --batch-size 16 --flow-steps 2 --episode-limit 15 --workers 1 --device cpu "
       "--precision float32 --threads 1 --eval-episodes 1 --demo-episodes 2 --pretrain-steps 2 --num-candidates 4 "
       "--warmup-steps 8 --final-episodes 1 --eval-every 1000 --log-every 10 --save-every 10").split()


@pytest.mark.sim
def test_training_with_a_worker_updates_exactly_as_often_stops_cleanly_and_resumes(tmp_path):
    """Ctrl-C at the whole process group: exit code 0, nobody left, and the resumed run counts on."""
    data = demos.collect("lift", 2, 3, tmp_path / "lift.hdf5", progress=False)
    command = [*TOY, "--data", str(data), "--run-dir", str(tmp_path / "run"), "--setting", "online", "--rollouts", "1",
               "--act", "posterior", "--updates-per-step", "2", "--online-steps", "100000"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_online.py"), *command], text=True, cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not (tmp_path / "run/last.pt").exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in output and "Traceback" not in errors, errors
    with pytest.raises(ProcessLookupError):
        for _ in range(100):                                                       # whose last one may still be ending
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    step = load_checkpoint(tmp_path / "run/last.pt")["world"]["steps"]
    train_online.main(["--resume", str(tmp_path / "run"), "--online-steps", str(step + 23)])
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["world"]["steps"] == step + 23 and state["report"]["updates"] == 2 * (step + 23)
    ends = [state["world"]["replay"]["data"][name] for name in ("terminated", "truncated")]
    first = state["world"]["replay"]["demos"]
    assert state["world"]["episodes"] == int(torch.maximum(*ends)[first:].sum()) >= (step + 23) // 15
    with pytest.raises(UserError, match="--rollouts 0"):
        train_online.main(["--resume", str(tmp_path / "run"), "--rollouts", "0"])


@pytest.mark.parametrize("command, found", [
    (["--ray", "local"], "--rollouts N"), (["--rollouts", "-1"], "at least 0")])
def test_a_mistake_is_one_line(command, found):
    with pytest.raises(UserError, match=found):
        train_online.main([*TOY, "--task", "lift", *command])


@pytest.mark.parametrize("method, flags, found", [
    (dppo, [], "no --rollouts"), (reinflow, [], "no --rollouts"),
    (dsrl, ["--variant", "dsrl-sac"], "learns from the noise"), (dsrl, ["--setting", "online"], "it needs stage I"),
    (ogpo, ["--chi2", "1", "--heads", "1"], "--heads of at least 2")])
def test_methods_refuse_what_they_cannot_do_before_anything_runs(tmp_path, method, flags, found):
    with pytest.raises(UserError, match=found):
        method.main(["--preset", "cpu", *flags, "--rollouts", "1", "--run-dir", str(tmp_path / "run"),
                     "--data", str(tmp_path / "none.hdf5")])


# ---- Ray -------------------------------------------------------------------------------------------------------------

def test_without_ray_installed_it_is_one_line_and_nothing_else_misses_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray==2.60.0"):
        cluster.connect("127.0.0.1:1")
    code = "import sys, train_online, robot, distributed.cluster, distributed.arm; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("address", ["10.0.0.2:6379", "ray://gpu.lab:10001", "127.evil.com:6379", "auto"])
def test_another_machine_without_a_token_is_refused(address, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        cluster.connect(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")                                   # but which?
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN"):
        cluster.connect(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        cluster.connect(address)


def test_this_machine_is_told_from_others():
    here = ("127.0.0.1", "127.0.0.1:6379", "localhost", "localhost:6379", "ray://127.0.1.1:10001", "::1", "[::1]:6379")
    assert all(cluster.loopback(address) for address in here)
    assert not any(cluster.loopback(address) for address in ("", "10.0.0.2", "127.evil.com", "localhost.evil.com:1"))


def test_the_hub_hands_out_newer_weights_only_and_every_episode_once():
    hub = cluster.hub_class()(2)
    assert hub.pull(0, 1) == (0, None, 0)
    hub.publish(1, ["one"], [5, 6])
    hub.publish(1, None, [7, 8])                                                   # only the notes are new
    assert hub.pull(0, 1) == (1, ["one"], 8) and hub.pull(1, 0) == (1, None, 7)
    hub.push(0, "a")
    hub.push(1, "b")
    assert hub.take() == [(0, "a"), (1, "b")] and hub.take() == []
