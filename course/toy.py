"""The toy of the course: six habits in a plane, a value, and a flow policy that learns them.

    import toy                          # in a script of course/: also finds poco.py
    policy = toy.clone()                # behaviour cloning on FlowPolicy, 3 s of CPU
    better = toy.m_step(policy, candidates, weights, guidance=50)

One state. The demonstrator has six habits around a circle and draws an action near one of them. The
value grows to the right and upwards. `true_value` punishes what nobody demonstrated: it is what a
critic that extrapolates does not know. Needs torch, matplotlib and the method files.
Not here: the course itself (the numbered scripts), the exercises (exercises.py).

Shapes: B batch, N candidates; an action is a chunk of one step, (B, N, 1, 2).
"""

import copy
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from flow_policy import FlowPolicy  # noqa: E402
from poco import m_step_loss  # noqa: E402

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # no window: the scripts also run on a machine without a display
from matplotlib import pyplot as plt  # noqa: E402

torch.set_num_threads(1)  # the networks are tiny: a second thread only costs time
FIGURES = ROOT / "runs" / "course"
ETA = 0.5  # the temperature of the toy
WIDTH = 0.1  # the demonstrator's standard deviation around a habit
REACH = 0.35  # an action this close to a habit counts as demonstrated: 3.5 widths
STATES = 128  # copies of the one state, each with its own candidates
NOTHING = torch.zeros(1, 1)  # the observation: there is nothing to see
_angle = torch.arange(6) * math.pi / 3
HABITS = 0.65 * torch.stack([_angle.cos(), _angle.sin()], -1)  # (6, 2)

# One set of colours for all figures; they stay apart for colour-blind students.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
GREY = "0.6"


# ---- the problem ---------------------------------------------------------------------------------


def value(actions: Tensor) -> Tensor:
    """Return the critic's value Q = 2x + y of actions (..., 2) -> (...)."""
    return 2 * actions[..., 0] + actions[..., 1]


def distance_to_habit(actions: Tensor) -> Tensor:
    """Return the distance to the nearest habit: actions (..., 2) -> (...)."""
    return (actions.unsqueeze(-2) - HABITS).norm(dim=-1).amin(-1)


def on_habit(actions: Tensor) -> Tensor:
    """Say which actions (..., 2) lie near a demonstrated one."""
    return distance_to_habit(actions) < REACH


def true_value(actions: Tensor) -> Tensor:
    """Return what really happens: the critic's value on a habit, -2 everywhere else."""
    return torch.where(on_habit(actions), value(actions), -2.0)


def demonstrations(n: int, habits: Tensor = HABITS, width: float = WIDTH) -> Tensor:
    """Draw n demonstrated chunks, (n, 1, 2)."""
    habit = habits[torch.randint(len(habits), (n,))]
    return (habit + width * torch.randn(n, 2)).unsqueeze(1)


def grid(points: int = 201) -> Tensor:
    """Return the actions of a square grid over [-1, 1]^2, (points^2, 2)."""
    side = torch.linspace(-1, 1, points, dtype=torch.float64)
    return torch.cartesian_prod(side, side)


def demonstrator(actions: Tensor) -> Tensor:
    """Return the demonstrator's probabilities on a grid of actions (G, 2) -> (G,)."""
    square = (actions.unsqueeze(1) - HABITS).square().sum(-1)
    density = torch.exp(-square / (2 * WIDTH**2)).sum(-1)
    return density / density.sum()


# ---- the policy ----------------------------------------------------------------------------------


def new_policy(action_dim: int = 2) -> FlowPolicy:
    """Build the toy's policy: the same class as on the robot, only smaller."""
    return FlowPolicy(1, action_dim, horizon=1, hidden=64, layers=4, flow_steps=20)


def train(policy: FlowPolicy, steps: int, rate: float, loss) -> None:
    """Minimise loss() over the policy; the rate falls to zero and so averages the noise away."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def clone(
    steps: int = 1500, habits: Tensor = HABITS, width: float = WIDTH, policy=None
) -> FlowPolicy:
    """Clone the demonstrator: minimise the flow-matching loss on fresh demonstrations."""
    policy = policy or new_policy()

    def loss():
        chunks = demonstrations(512, habits, width).unsqueeze(0)  # one state, 512 chunks
        return policy.cfm_loss(NOTHING, chunks).mean()

    train(policy, steps, 0.01, loss)
    return policy


def m_step(
    prior: FlowPolicy,
    candidates: Tensor,
    weights: Tensor,
    guidance: float,
    clip: float = math.inf,
    anchor=demonstrations,
    steps: int = 400,
    rows: int = 8,
    surrogate=m_step_loss,
) -> FlowPolicy:
    """Distil weighted candidates (STATES, N, 1, 2) into a copy of the prior: POCO's M-step.

    `anchor(n)` draws the replayed chunks of the cloning term. With a large guidance that term is
    negligible. A step takes `rows` states. `surrogate` is poco.m_step_loss, or a broken one where
    a bug is planted.
    """
    policy = copy.deepcopy(prior)
    context = NOTHING.expand(len(candidates), 1)

    def loss():
        at = torch.randint(len(candidates), (rows,))
        chunk = anchor(rows)
        return surrogate(
            policy, context[at], chunk, None, candidates[at], weights[at], guidance, clip
        )[0]

    train(policy, steps, 0.005, loss)
    return policy


def actions_of(policy: FlowPolicy, n: int = 20_000) -> Tensor:
    """Draw n actions of the policy, (n, 2)."""
    return policy.sample(NOTHING, n)[0, :, 0]


# ---- committed runs ------------------------------------------------------------------------------

RUNS = (
    *(f"lift/{name}-s{seed}" for name in ("poco", "poco-posterior") for seed in range(3)),
    *(f"{task}/poco-s{seed}" for task in ("can", "square") for seed in range(3)),
    "lift-paper/demos-20-s0",  # the paper's clip, 0.15
)


def run_folder(name: str) -> Path:
    """Return the folder of a committed run, for example lift/poco-s0."""
    folder = ROOT / "benchmarks" / "results" / name
    if not (folder / "progress.csv").exists():
        raise FileNotFoundError(f"there is no committed run {folder}")
    return folder


# ---- numbers and figures -------------------------------------------------------------------------

RESULTS: list[dict] = []


def expect(name: str, measured, expected: float, tolerance: float, sample: str = "exact") -> float:
    """Print a measured number beside the predicted one. `sample` says how it was measured."""
    measured = float(measured)
    right = abs(measured - expected) <= tolerance
    RESULTS.append(
        {
            "name": name,
            "measured": measured,
            "expected": expected,
            "tolerance": tolerance,
            "sample": sample,
            "right": right,
        }
    )
    verdict = "" if right else "   <-- not as predicted"
    print(
        f"{name:58s} {measured:9.4f}   expected {expected:g} +- {tolerance:g} ({sample}){verdict}"
    )
    return measured


def start(seed: int = 0) -> None:
    """Begin a script: the same random numbers every time, no results yet, large letters."""
    torch.manual_seed(seed)
    RESULTS.clear()
    plt.rcParams.update(
        {
            "font.size": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 13,
            "legend.frameon": False,
        }
    )


def finish(figure, name: str) -> Path:
    """Save the figure and the numbers of a script under runs/course/."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"{name}.png"
    figure.savefig(path, dpi=130)
    path.with_suffix(".json").write_text(json.dumps(RESULTS, indent=1))
    if IN_NOTEBOOK:
        plt.show()
    plt.close(figure)
    print(f"figure: {path}")
    return path


def draw_plane(axis, actions: Tensor | None = None, title: str = "") -> None:
    """Draw the action plane: lines of equal value, the six habits, and sampled actions."""
    side = torch.linspace(-1, 1, 50)
    levels = value(torch.stack(torch.meshgrid(side, side, indexing="xy"), -1))
    axis.contour(side, side, levels, 9, colors="0.85", linewidths=0.8, linestyles="solid", zorder=0)
    for habit in HABITS:
        axis.add_patch(plt.Circle(habit.tolist(), REACH, fill=False, color="0.7", lw=0.8, ls=":"))
    if actions is not None:
        dots = {"s": 4, "cmap": "plasma", "vmin": -1.8, "vmax": 2.4, "alpha": 0.6}
        axis.scatter(*actions.T, c=value(actions), linewidths=0, **dots)
    limits = (-1.05, 1.05)
    ticks = [-1, 0, 1]
    axis.set(aspect="equal", xlim=limits, ylim=limits, xticks=ticks, yticks=ticks)
    axis.set_title(title)
