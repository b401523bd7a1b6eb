"""Rollout workers and an arm's learner on a Ray cluster of several nodes on this machine.

    python -m pytest tests/distributed/test_distributed_ray.py   # skipped without ray==2.60.0

Nodes, workers and a learner are killed or stopped. The cluster asks for a token, as any that is not
on one machine has to.
Not here: what needs no Ray (test_rollouts.py, test_distributed_arm.py).
"""

import contextlib
import functools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from counter import HORIZON, LIMIT, Actor, Counter
from crews import check_lead, check_order, check_sequence, seeds, taken, watched

import robot
from arms.episodes import layout, numbered
from arms.settings import parse_args
from distributed import Rollouts, arm, arm_learner
from distributed import rollouts as rollouts_module
from logbook import UserError, load_checkpoint

ROOT = Path(__file__).parent.parent.parent
TOY = [
    "--preset",
    "cpu",
    "--task",
    "insert-usb",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--flow-steps",
    "2",
    "--batch-size",
    "16",
    "--num-candidates",
    "4",
    "--pretrain-steps",
    "20",
    "--warmup-steps",
    "25",
    "--save-every",
    "20",
    "--device",
    "cpu",
    "--no-realtime",
]
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "f" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent))),
}
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def nodes():
    """A cluster whose head has one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)  # before Ray is imported and reads it
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray==2.60.0")
        from ray.cluster_utils import Cluster

        made = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "object_store_memory": 100 << 20,
            },
        )
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def learners(nodes, tmp_path_factory):
    """The folder in which the node that offers to learn was started."""
    here, there = os.getcwd(), tmp_path_factory.mktemp("gpu")
    os.chdir(there)
    nodes.add_node(num_cpus=1, resources={"learner": 1}, object_store_memory=100 << 20)
    os.chdir(here)
    return there


def start_rollouts(nodes, count):
    return Rollouts(
        Actor(),
        functools.partial(Counter, 0.01),
        episode_limit=LIMIT,
        count=count,
        seed=0,
        seed_bound=1_000_000,
        horizon=HORIZON,
        interrupt=SimpleNamespace(stop=False),
        address=nodes.address,
    )


def test_a_worker_that_stands_still_is_replaced(nodes, monkeypatch, capfd):
    """A stopped process keeps its call and its CPU; Ray must give both to another."""
    monkeypatch.setattr(rollouts_module, "STANDSTILL", 3.0)
    runner = start_rollouts(nodes, 1)
    moves = taken(runner, 40)
    stopped = int(moves[-1].obs[2])
    os.kill(stopped, signal.SIGSTOP)
    end = time.monotonic() + 120
    while moves[-1].obs[2] == stopped and time.monotonic() < end:
        moves += taken(runner, 1)
    assert moves[-1].obs[2] != stopped
    check_order(moves)
    check_sequence(moves, 1)
    assert "worker 0 has stood still for 3 s; a new one plays" in capfd.readouterr().err
    runner.close()


def test_workers_on_two_nodes_one_of_which_dies_and_comes_back(nodes, capfd):
    other = nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    runner = start_rollouts(nodes, 2)
    moves = []

    def until(count):
        """Steps until so many workers have been seen, and 20 more."""
        extra = 20
        while extra := extra - (len({move.obs[2] for move in moves}) >= count):
            moves.extend(watched(runner, 1, 0.01)[0])

    until(2)
    nodes.remove_node(other, allow_graceful=False)
    end = time.monotonic() + 60
    while "died" not in (err := capfd.readouterr().err) and time.monotonic() < end:
        moves.append(runner.step())  # the other one goes on
    assert "a new one plays episode" in err
    nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    until(3)
    check_order(moves)
    check_lead(runner)
    assert len(set(seeds(moves))) == len(seeds(moves)) and moves[-1].obs.flags.writeable
    assert moves[0].action[0] == 0 and moves[-1].action[0] == 1  # the learner's weights got there
    runner.close()


def learning():
    """Processes in which a learner works."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::LearnerActor"):
                found.append(int(path.parent.name))
    return found


class Mortal(arm.RemoteLearner):
    """Its learner is killed during the second episode's updates; the fourth waits for the next."""

    killed = None

    def absorb(self, path):
        super().absorb(path)
        if path.stem.endswith("1"):
            self._until(lambda: self.report().get("updates", 0) >= 20)
            for pid in learning():
                os.kill(pid, signal.SIGKILL)
            self._until(lambda: self.is_lost)  # now its last message is in, too
            Mortal.killed = self.newest[0], self.report()["updates"]
        if path.stem.endswith("3"):
            self._until(
                lambda: (
                    self.newest[0] > Mortal.killed[0]
                    and self.report()["updates"] > Mortal.killed[1]
                )
            )

    def _until(self, condition):
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end:
            self.check()
            time.sleep(0.05)
        assert condition()


def test_an_arms_learner_on_another_node_dies_and_continues_from_its_own_checkpoint(
    nodes, learners, tmp_path, monkeypatch, capfd
):
    """Every episode gets there, versions never fall, the newest checkpoint comes; --resume."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arm, "RemoteLearner", Mortal)
    robot.main(["record", *TOY, "--episodes", "2", "--data", "demos"])
    command = ["train", *TOY, "--data", "demos", "--episode-limit", "15", "--run-dir", "run"]
    robot.main([*command, "--episodes", "5", "--learner", nodes.address])
    err = capfd.readouterr().err
    assert "the arm goes on with weights" in err and "answers again" in err
    assert "Traceback" not in err
    rows = (tmp_path / "run/progress.csv").read_text().splitlines()
    at = rows[0].split(",").index("version")
    versions = [int(row.split(",")[at]) for row in rows[1:]]
    assert versions == sorted(versions) and versions[-1] > Mortal.killed[0]
    state = load_checkpoint("run/last.pt")
    (folder,) = (learners / "runs").iterdir()
    assert state["updates"] > Mortal.killed[1] >= 20
    assert [p.name for p in numbered(folder / "episodes")] == [
        p.name for p in numbered("run/episodes")
    ]
    for path in numbered("run/episodes"):
        copy = folder / "episodes" / path.name
        np.testing.assert_array_equal(arm_learner.read(path), arm_learner.read(copy))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    robot.main(["train", "--resume", "run", "--episodes", "6"])
    again = load_checkpoint("run/last.pt")
    assert again["absorbed"] >= state["absorbed"] and again["updates"] >= state["updates"]
    assert len(list((learners / "runs").iterdir())) == 1
    robot.main(["eval", "--run-dir", "run", "--episodes", "1"])


def test_a_cluster_without_a_learners_machine_is_refused(nodes, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1}}])
    (tmp_path / "demos.hdf5").touch()
    flags = ["--data", str(tmp_path / "demos.hdf5"), "--learner", nodes.address]
    args = parse_args(["train", *TOY, *flags])
    with pytest.raises(UserError, match="ray start --head --resources"):
        arm.RemoteLearner(args, layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9}))
