"""Rollout workers and an arm's learner on a Ray cluster of several nodes on this machine; a node and a learner killed.

    python -m pytest tests/test_distributed_ray.py      # skipped without Ray: pip install ray==2.60.0

The cluster asks for a token, as any that is not on one machine has to.
Not here: what needs no Ray (test_distributed.py).
"""
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import robot
from arms.episodes import numbered
from counter import HORIZON, LIMIT, Actor, Counter
from distributed import Rollouts, arm
from logbook import UserError, load_checkpoint
from test_distributed import check_lead, check_order, seeds, watched

ROOT = Path(__file__).parent.parent
TOY = ("--preset cpu --task insert-usb --hidden 32 --layers 2 --flow-steps 2 --batch-size 16 --num-candidates 4 "
       "--pretrain-steps 20 --warmup-updates 25 --save-every 20 --device cpu --no-realtime").split()
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "RAY_USAGE_STATS_ENABLED": "0",
               "RAY_worker_niceness": "0",
               "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def nodes():
    """A cluster whose head has one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)                                              # before Ray is imported and reads it
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray==2.60.0")
        from ray.cluster_utils import Cluster
        made = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20})
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


def test_workers_on_two_nodes_one_of_which_dies_and_comes_back(nodes, capfd):
    other = nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    runner = Rollouts(Actor(), {"wait": 0.01, "episode_limit": LIMIT}, 2, 0, 1_000_000, HORIZON, nodes.address, Counter)
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
        moves.append(runner.step())                                                # the other one goes on
    assert "a new one plays episode" in err
    nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    until(3)
    check_order(moves)
    check_lead(runner)
    assert len(set(seeds(moves))) == len(seeds(moves)) and moves[-1].obs.flags.writeable
    assert moves[0].action[0] == 0 and moves[-1].action[0] == 1                    # the learner's weights got there
    runner.close()


def pupils():
    """Processes in which a learner works."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * path.read_bytes().startswith(b"ray::Pupil")
        except OSError:
            pass
    return found


class Mortal(arm.Faraway):
    """Its learner is killed after the second episode's updates have begun; the fourth waits for the next one."""

    killed = None

    def absorb(self, path):
        super().absorb(path)
        if path.stem.endswith("1"):
            self._until(lambda: self.report().get("updates", 0) >= 20)
            for pid in pupils():
                os.kill(pid, signal.SIGKILL)
            self._until(lambda: self.silent)                                       # now its last words are in, too
            Mortal.killed = self.newest[0], self.report()["updates"]
        if path.stem.endswith("3"):
            self._until(lambda: self.newest[0] > Mortal.killed[0] and self.report()["updates"] > Mortal.killed[1])

    def _until(self, condition):
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end:
            self.check()
            time.sleep(0.05)
        assert condition()


def test_an_arms_learner_on_another_node_dies_and_continues_from_its_own_checkpoint(
        nodes, learners, tmp_path, monkeypatch, capfd):
    """Every episode gets there, versions never fall, the arm's folder has the newest checkpoint, --resume works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robot, "Faraway", Mortal)
    robot.main(["record", *TOY, "--episodes", "2", "--data", "demos"])
    command = ["train", *TOY, "--data", "demos", "--episode-limit", "15", "--run-dir", "run"]
    robot.main([*command, "--episodes", "5", "--learner", nodes.address])
    err = capfd.readouterr().err
    assert "the arm goes on with weights" in err and "answers again" in err and "Traceback" not in err
    rows = (tmp_path / "run/progress.csv").read_text().splitlines()
    at = rows[0].split(",").index("version")
    versions = [int(row.split(",")[at]) for row in rows[1:]]
    assert versions == sorted(versions) and versions[-1] > Mortal.killed[0]
    state, (folder,) = load_checkpoint("run/last.pt"), (learners / "runs").iterdir()
    assert state["updates"] > Mortal.killed[1] >= 20
    assert [p.name for p in numbered(folder / "episodes")] == [p.name for p in numbered("run/episodes")]
    for path in numbered("run/episodes"):
        np.testing.assert_array_equal(arm.read(path), arm.read(folder / "episodes" / path.name))
    monkeypatch.setattr(robot, "Faraway", arm.Faraway)
    robot.main(["train", "--resume", "run", "--episodes", "6"])
    again = load_checkpoint("run/last.pt")
    assert again["absorbed"] >= state["absorbed"] and again["updates"] >= state["updates"]
    assert len(list((learners / "runs").iterdir())) == 1
    robot.main(["eval", "--run-dir", "run", "--episodes", "1"])


def test_a_cluster_without_a_learners_machine_is_refused(nodes, tmp_path, monkeypatch):
    import ray
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1}}])
    (tmp_path / "demos.hdf5").touch()
    args = robot.parse(["train", *TOY, "--data", str(tmp_path / "demos.hdf5"), "--learner", nodes.address], "")
    with pytest.raises(UserError, match="ray start --head --resources"):
        arm.Faraway(args, type("Task", (), {"obs_dim": 4, "action_dim": 7}))
