"""Every test of a baseline knows the toy task and begins with the same random numbers."""

import dataclasses

import pytest
import torch
from toys import ACTION, OBS, TOY

import demos
import envs
import train_offline


@pytest.fixture(autouse=True)
def toy_task(monkeypatch):
    toy = dataclasses.replace(envs.TASKS["lift"], obs_dim=OBS, action_dim=ACTION)
    monkeypatch.setitem(envs.TASKS, "toy", toy)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory):
    return demos.collect(
        "lift", 2, 3, tmp_path_factory.mktemp("demos") / "lift.hdf5", progress=False
    )


@pytest.fixture(scope="session")
def checkpoint(demo_file, tmp_path_factory):
    """A finished stage I of 10 steps."""
    folder, flags = tmp_path_factory.mktemp("bc") / "run", TOY[: TOY.index("--warmup-steps")]
    train_offline.main(
        [*flags, "--data", str(demo_file), "--pretrain-steps", "10", "--run-dir", str(folder)]
    )
    return folder / "last.pt"
