"""Planted bugs: find them by their statistics, as you would have to in a training run.

    python -m course bug 3              # healthy and sick side by side, 2 to 9 seconds of CPU
    python -m course bug 3 --tell       # afterwards: what was changed, and a test that notices

A bug copies one method file, changes one place in the copy, and runs the toy with both. Where the
method file no longer holds the text to be changed, `plant` raises: the table below is then out of
date.
"""

import functools
import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import toy
from .toy import ROOT

STEPS, DISCOUNT = 50, 0.99  # the chain of unit 3


@dataclass(frozen=True)
class Bug:
    """One wrong line. `symptoms` maps a statistic to (healthy, sick, tolerance)."""

    name: str
    file: str
    old: str
    new: str
    run: Callable  # module -> statistics
    symptoms: dict
    killer: str  # a test of tests/method that notices
    lesson: str


def plant(bug: Bug | None, file: str):
    """Load a copy of a method file, with the bug in it. Raises ValueError on an outdated table."""
    text = (ROOT / file).read_text()
    if bug is not None:
        if text.count(bug.old) != 1:
            raise ValueError(
                f"{file} should hold this once, please update course/bugs.py: {bug.old}"
            )
        text = text.replace(bug.old, bug.new)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"copy_of_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


# ---- the experiments -----------------------------------------------------------------------------


def _critic(scale: float = 1.0):
    return lambda context, candidates: scale * toy.value(candidates[:, :, 0])


@functools.cache
def _cloned():
    torch.manual_seed(0)
    prior = toy.clone()
    return prior, toy.NOTHING.expand(toy.STATES, 1)


def estep(poco) -> dict:
    """Weigh candidates by a copy of poco.py, then distil them."""
    prior, context = _cloned()
    torch.manual_seed(1)
    candidates, weights, stats = poco.e_step(prior, _critic(), context, 64, toy.ETA)
    _, _, faint = poco.e_step(prior, _critic(0.01), context, 64, toy.ETA)
    policy = toy.m_step(prior, candidates, weights, guidance=50)
    actions = toy.actions_of(policy)
    return {
        "ess": stats["ess"],
        "kl": stats["kl"],
        "smallest row sum of the weights": weights.sum(-1).min(),
        "largest row sum of the weights": weights.sum(-1).max(),
        "kl with all Q divided by 100": faint["kl"],
        "E[Q] before": toy.value(toy.actions_of(prior)).mean(),
        "E[Q] after one iteration": toy.value(actions).mean(),
        "share near a demonstration": toy.on_habit(actions).float().mean(),
    }


def _mstep(poco, clip: float) -> dict:
    from poco import e_step

    prior, context = _cloned()
    torch.manual_seed(1)
    candidates, weights, stats = e_step(prior, _critic(), context, 64, toy.ETA)
    policy = toy.m_step(prior, candidates, weights, 50, clip, surrogate=poco.m_step_loss)
    chunk = toy.demonstrations(toy.STATES)
    with torch.no_grad():
        _, m = poco.m_step_loss(policy, context, chunk, None, candidates, weights, 50, clip)
    return {
        "zeta, the clip": clip,
        "ess": stats["ess"],
        "kl": stats["kl"],
        "bc": m["bc"],
        "surrogate": m["surrogate"],
        "clip_frac": m["clip_frac"],
        "alive_mass": m["alive_mass"],
        "E[Q] after one iteration": toy.value(toy.actions_of(policy)).mean(),
    }


def mstep(poco) -> dict:
    """Distil candidates by a copy of poco.py, without a clip."""
    return _mstep(poco, math.inf)


def clipped_mstep(poco) -> dict:
    """Distil candidates by a copy of poco.py, with a clip of 0.1."""
    return _mstep(poco, 0.1)


def cloning(flow_policy) -> dict:
    """Clone the demonstrator with a copy of flow_policy.py."""
    torch.manual_seed(0)
    policy = flow_policy.FlowPolicy(1, 2, horizon=1, hidden=64, layers=4, flow_steps=20)
    toy.clone(policy=policy)
    with torch.no_grad():
        bc = policy.cfm_loss(toy.NOTHING, toy.demonstrations(50_000).unsqueeze(0)).mean()
    actions = toy.actions_of(policy)
    return {
        "bc at the end": bc,
        "share near a demonstration": toy.on_habit(actions).float().mean(),
        "mean distance to the nearest habit": toy.distance_to_habit(actions).mean(),
        "E[Q]": toy.value(actions).mean(),
    }


def chain(replay) -> dict:
    """Sweep the values of unit 3's chain with a copy of replay.py, chunks of 5, 200 sweeps."""
    from chunk_critic import td_target

    steps = np.arange(STEPS)
    last = (steps == STEPS - 1).astype(float)
    buffer = replay.ChunkReplay(STEPS, 1, 1, 5, DISCOUNT)
    buffer.extend(
        {
            "obs": steps[:, None],
            "action": np.ones((STEPS, 1)),
            "reward": last,
            "next_obs": ((steps + 1) % STEPS)[:, None],  # after the end comes the next start
            "terminated": last,
            "truncated": np.zeros(STEPS),
        }
    )
    batch = buffer.chunks(torch.arange(STEPS))
    values = torch.zeros(STEPS)
    history = []
    for _ in range(200):
        values = td_target(batch.returns, batch.bootstrap, values[batch.next_obs[:, 0].long()])
        history.append(values)
    return {
        "best return that is possible": 1.0,
        "V(start) after 10 sweeps": history[9][0],
        "V(start) after 200 sweeps": values[0],
        "largest V after 200 sweeps": values.max(),
        "critic error after 200 sweeps": (history[-1] - history[-2]).abs().max(),
    }


BUGS = (
    Bug(
        "eta inverted: the weights hold exp(Q * eta)",
        "poco.py",
        "w = torch.exp((q - q.amax(-1, keepdim=True)) / eta)",
        "w = torch.exp((q - q.amax(-1, keepdim=True)) * eta)",
        estep,
        {
            "ess": (0.32, 0.80, 0.03),
            "kl": (0.90, 0.13, 0.03),
            "E[Q] after one iteration": (1.20, 0.50, 0.06),
        },
        "test_gaussian_particles_find_the_gaussian_posterior",
        "ess and kl tell how hard the E-step pushes. Compare them with unit 4's formulas.",
    ),
    Bug(
        "normalised over states: the weights of a state do not sum to 1",
        "poco.py",
        "return w / w.sum(-1, keepdim=True)",
        "return w / w.sum(0, keepdim=True)",
        estep,
        {
            "ess": (0.33, 1.54, 0.05),
            "smallest row sum of the weights": (1.0, 0.18, 0.06),
            "largest row sum of the weights": (1.0, 0.87, 0.1),
            "E[Q] after one iteration": (1.20, 1.17, 0.06),
        },
        "test_e_step_weighs_the_policys_own_samples",
        "The curve looks fine. An ess above 1 is impossible: invariants find what curves hide.",
    ),
    Bug(
        "mean over candidates: the surrogate is N times too small",
        "poco.py",
        "return (w * losses.clamp(0, zeta)).sum(-1)",
        "return (w * losses.clamp(0, zeta)).mean(-1)",
        mstep,
        {
            "surrogate": (0.39, 0.008, 0.02),
            "ess": (0.32, 0.32, 0.03),
            "E[Q] after one iteration": (1.20, 0.50, 0.1),
        },
        "test_each_loss_is_clipped_before_it_is_weighed",
        "The E-step is fine, so its statistics are fine. Guidance has become guidance / N.",
    ),
    Bug(
        "clipped after weighing: zeta meets weight times loss",
        "poco.py",
        "return (w * losses.clamp(0, zeta)).sum(-1)",
        "return (w * losses).clamp(0, zeta).sum(-1)",
        clipped_mstep,
        {"surrogate": (0.076, 0.36, 0.02), "clip_frac": (0.84, 0.85, 0.03)},
        "test_above_the_clip_the_gradient_is_zero_and_below_it_is_the_weight",
        "A weighted mean of losses that are at most zeta cannot exceed zeta.",
    ),
    Bug(
        "noise and data swapped on the straight path",
        "flow_policy.py",
        "x = (1 - m) * noise + m * actions",
        "x = m * noise + (1 - m) * actions",
        cloning,
        {
            "bc at the end": (0.66, 0.67, 0.02),
            "share near a demonstration": (0.99, 0.80, 0.06),
        },
        "test_straight_paths_are_exact_for_any_number_of_steps",
        "The loss cannot see it: both paths are equally hard to learn. Only samples show it.",
    ),
    Bug(
        "bootstrap through a terminal: the next episode's value leaks into the last",
        "replay.py",
        ' * (1 - self.data["terminated"][last])',
        "",
        chain,
        {
            "V(start) after 200 sweeps": (0.611, 1.55, 0.01),
            "largest V after 200 sweeps": (1.0, 2.53, 0.01),
        },
        "test_a_timeout_keeps_the_future_and_a_terminal_does_not",
        "No value may exceed the best possible return.",
    ),
    Bug(
        "Q z-scored in every state",
        "poco.py",
        "    w = torch.exp((q - q.amax(-1, keepdim=True)) / eta)",
        "    q = (q - q.mean(-1, keepdim=True)) / q.std(-1, keepdim=True, correction=0)\n"
        "    w = torch.exp((q - q.amax(-1, keepdim=True)) / eta)",
        estep,
        {
            "ess": (0.32, 0.33, 0.04),
            "kl with all Q divided by 100": (0.0, 0.89, 0.06),
            "E[Q] after one iteration": (1.20, 1.20, 0.06),
        },
        "test_only_differences_of_q_over_eta_matter",
        "Invisible while the values happen to spread by 1. In a state where nothing matters, "
        "it makes a choice out of noise.",
    ),
)


def statistics(bug: Bug) -> tuple[dict[str, float], dict[str, float]]:
    """Run a bug's toy with the healthy file and with the sick one."""
    out = []
    for planted in (None, bug):
        stats = bug.run(plant(planted, bug.file))
        out.append({name: float(value) for name, value in stats.items()})
    return out[0], out[1]
