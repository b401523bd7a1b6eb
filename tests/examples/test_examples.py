"""The examples run as their readers would run them.

python -m pytest tests/examples
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import demos
from examples.diffusion import DiffusionPolicy, main
from logbook import load_checkpoint
from poco import e_step, m_step_loss

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_algorithm_1_runs_from_the_copied_files_alone(tmp_path):
    """minimal.py and four files in an empty folder: POCO ends well above cloning."""
    for name in ("poco", "flow_policy", "chunk_critic", "replay"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copy(ROOT / "examples/minimal.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "minimal.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cloned, poco = (int(share) for share in re.findall(r"(\d+)%", done.stdout))
    assert 10 < cloned < 45 and poco > cloned + 15


@settings(max_examples=20)
@given(st.integers(0, 2**31 - 1), st.booleans())
def test_diffusion_losses_and_samples_are_those_of_a_loop(seed, masked):
    """One loss per chunk, over real steps; samples in [-1, 1], one per given noise."""
    torch.manual_seed(seed)
    policy = DiffusionPolicy(3, 2, 4, hidden=8, layers=2, flow_steps=3)
    context = torch.randn(5, 3)
    actions, noise = torch.rand(2, 5, 6, 4, 2)
    t = torch.rand(5, 6)
    valid = (torch.arange(4) < torch.randint(1, 5, (5, 1))).float() if masked else None
    losses = policy.cfm_loss(context, actions, valid, noise, t)
    assert losses.shape == (5, 6)
    share = torch.cos(0.49 * torch.pi * t).square()
    for b in range(5):
        for n in range(6):
            x = share[b, n].sqrt() * actions[b, n] + (1 - share[b, n]).sqrt() * noise[b, n]
            found = policy.velocity(context[b : b + 1], x[None, None], t[b : b + 1, n : n + 1])
            error = (found[0, 0] - noise[b, n]).square().mean(-1)
            mask = torch.ones(4) if valid is None else valid[b]
            assert torch.isclose(losses[b, n], (error * mask).sum() / mask.sum(), atol=1e-5)
    chunks = policy.sample(context, 6, noise)
    assert chunks.shape == (5, 6, 4, 2) and chunks.abs().max() <= 1
    assert torch.equal(chunks, policy.sample(context, 6, noise))


def test_poco_improves_the_diffusion_policy_on_a_bandit():
    """Two habits, one rewarded: one E-step and M-step move the policy to the rewarded one."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = DiffusionPolicy(1, 1, 1, hidden=64, layers=2, flow_steps=10)
    context = torch.zeros(128, 1)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)

    def habits():
        sign = torch.randint(2, (128, 1, 1)) * 2.0 - 1
        return 0.5 * sign + 0.05 * torch.randn(128, 1, 1)

    def train(policy, optimizer, steps, candidates=None, weights=None, guidance=0.0):
        for _ in range(steps):
            loss, _ = m_step_loss(
                policy, context, habits(), None, candidates, weights, guidance, clip=10.0
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(policy, optimizer, 400)
    before = policy.sample(context, 8).mean()
    candidates, weights, _ = e_step(policy, lambda _, a: a[:, :, 0, 0], context, 16, 0.2)
    better = copy.deepcopy(policy)
    train(better, torch.optim.Adam(better.parameters(), 1e-3), 200, candidates, weights, 20.0)
    after = better.sample(context, 8).mean()
    assert abs(before) < 0.15 and after > 0.3


@pytest.mark.sim
def test_the_diffusion_policy_goes_through_both_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = demos.collect("lift", 2, 3, tmp_path / "lift.hdf5", progress=False)
    flags = """
        --preset cpu --hidden 32 --layers 2 --batch-size 16 --flow-steps 2 --episode-limit 25
        --workers 1 --device cpu --precision float32 --threads 1 --eval-episodes 1
        --demo-episodes 2 --pretrain-steps 4 --warmup-steps 8 --online-steps 12
        --final-episodes 1 --num-candidates 4
    """
    main([*flags.split(), "--data", str(data)])
    state = load_checkpoint("runs/lift-diffusion-s0")
    assert state["kind"] == "DiffusionPolicy" and state["world"]["steps"] == 12
    assert Path("runs/lift-diffusion-bc-s0/last.pt").exists()
