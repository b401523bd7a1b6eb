"""What the oracle's rollouts say: ranking, ceiling, M-step and prior, by phase of the task.

    from benchmarks.oracle_report import draw, read_measured, table
    measured = read_measured([Path("runs/can-poco-s0")])
    print(table(measured))

Four questions, each at the states of a phase, for one chunk and then the bare policy:

    ranking   does the critic order the candidates as their true values do? Spearman's rho, the
              success lost by its favourite against the true best, and its errors beside the spread
    ceiling   success of the E-step with true values: the most that reweighting can give
    M-step    success of the critic's posterior less that of the policy: what is left to distil
    prior     states where no candidate ever succeeds: no weighting helps there

Rollouts are noisy, and the best of noisy values looks better than it is. So the half of the repeats
that chooses a candidate is never the half that judges it, and both halves do both in turn. Thus the
ceiling is that of R/2 rollouts, a lower bound. Half against half also shows what a perfect critic
could reach in ranking.
Not here: the rollouts (oracle.py).

Shapes: S states, N candidates, R repeats.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from benchmarks.scores import interval
from logbook import UserError
from logbook.figure import BLUE, GREEN, ORANGE, count_of, new_figure, save_figure

PHASES = ("start", "reach", "manipulate", "overtime")
COLUMNS = (
    "state",
    "seed",
    "step",
    "phase",
    "candidate",
    "q",
    "q_std",
    "weight",
    "successes",
    "returns",
)


class Measured(NamedTuple):
    """The states of one or several runs."""

    phase: np.ndarray  # (S,) names
    q: np.ndarray  # (S, N) of the critic
    weight: np.ndarray  # (S, N) of the critic's posterior
    success: np.ndarray  # (S, N, R) 0 or 1
    returns: np.ndarray  # (S, N, R) discounted
    temperature: float
    runs: int

    def of(self, phase: str) -> "Measured":
        """Return the states of one phase."""
        rows = self.phase == phase
        return self._replace(
            phase=self.phase[rows],
            q=self.q[rows],
            weight=self.weight[rows],
            success=self.success[rows],
            returns=self.returns[rows],
        )


def read_measured(folders: list[Path]) -> Measured:
    """Read the oracle.csv of runs of one task, made with the same settings."""
    parts = [read_run(folder) for folder in folders]
    first = parts[0]
    for folder, part in zip(folders, parts):
        if part.temperature != first.temperature or part.q.shape[1:] != first.q.shape[1:]:
            raise UserError(f"{folder} was measured with other settings than {folders[0]}")
        if part.returns.shape[1:] != first.returns.shape[1:]:
            raise UserError(f"{folder} was measured with other repeats than {folders[0]}")
    arrays = [np.concatenate(columns) for columns in zip(*(part[:5] for part in parts))]
    return Measured(*arrays, first.temperature, len(folders))


def read_run(folder: Path) -> Measured:
    with open(folder / "oracle.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    states: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        states.setdefault(row["state"], []).append(row)
    groups = list(states.values())

    def numbers(name: str) -> np.ndarray:
        cells = [[row[name].split() for row in group] for group in groups]
        return np.array(cells, dtype=np.float64)  # (S, N, ...)

    settings = json.loads((folder / "oracle.json").read_text())
    return Measured(
        np.array([group[0]["phase"] for group in groups]),
        numbers("q")[..., 0],
        numbers("weight")[..., 0],
        numbers("successes"),
        numbers("returns"),
        settings["temperature"],
        runs=1,
    )


# ---- one number per state ------------------------------------------------------------------------


def judged_apart(choose: Callable[[np.ndarray], np.ndarray], measured: Measured) -> np.ndarray:
    """Return the success (S,) of a choice made by true values.

    choose(values (S, N)) -> weights (S, N). One half of the repeats chooses, the other half judges,
    and the other way round.
    """
    judged = []
    for half in (0, 1):
        values = measured.returns[..., half::2].mean(-1)
        success = measured.success[..., 1 - half :: 2].mean(-1)
        judged.append((choose(values) * success).sum(1))
    return (judged[0] + judged[1]) / 2


def best(values: np.ndarray) -> np.ndarray:
    """Give all weight to the highest value; ties share it: (S, N) -> (S, N)."""
    ties = values == values.max(1, keepdims=True)
    return ties / ties.sum(1, keepdims=True)


def softmax(values: np.ndarray, temperature: float) -> np.ndarray:
    """Weigh candidates by exp(value / temperature), Eq. 17: (S, N) -> (S, N)."""
    weights = np.exp((values - values.max(1, keepdims=True)) / temperature)
    return weights / weights.sum(1, keepdims=True)


def ways_to_choose(measured: Measured) -> dict[str, np.ndarray]:
    """Return the success (S,) of each way to choose among the candidates."""
    success = measured.success.mean(-1)  # (S, N)
    eta = measured.temperature
    return {
        "policy": success.mean(1),
        "critic's posterior": (measured.weight * success).sum(1),
        "critic's best": (best(measured.q) * success).sum(1),
        "oracle's posterior": judged_apart(lambda values: softmax(values, eta), measured),
        "oracle's best": judged_apart(best, measured),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rho of each row with spread in both: (S, N), (S, N) -> at most (S,)."""
    rho = []
    for x, y in zip(a, b):
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            rho.append(spearmanr(x, y).statistic)
    return np.array(rho)


def outcomes(measured: Measured) -> dict[str, float]:
    """Return the share of states where none, some and all rollouts succeed."""
    share = measured.success.mean((1, 2))
    lost = float((share == 0).mean())
    sure = float((share == 1).mean())
    return {"lost": lost, "between": 1 - lost - sure, "sure": sure}


def errors(measured: Measured) -> dict[str, float]:
    """Compare the critic with true returns: bias, spread among a state's candidates, its error.

    The rollouts' own noise, known from the repeats, is taken off the true spread and the error.
    """
    value = measured.returns.mean(-1)  # (S, N)
    repeats = measured.returns.shape[-1]
    candidates = measured.q.shape[1]
    noise = measured.returns.var(-1, ddof=1).mean() / repeats * (candidates - 1) / candidates

    def within(x: np.ndarray) -> float:
        return float(np.square(x - x.mean(1, keepdims=True)).mean())

    return {
        "bias": float((measured.q - value).mean()),
        "true spread": max(within(value) - noise, 0.0) ** 0.5,
        "critic's spread": within(measured.q) ** 0.5,
        "error": max(within(measured.q - value) - noise, 0.0) ** 0.5,
    }


# ---- the report ----------------------------------------------------------------------------------


def report(measured: Measured) -> dict[str, Any]:
    """Return all numbers about these states."""
    halves = [measured.returns[..., half::2].mean(-1) for half in (0, 1)]
    ways = ways_to_choose(measured)
    means = {way: float(success.mean()) for way, success in ways.items()}
    return {
        "states": len(measured.phase),
        **outcomes(measured),
        **means,
        "regret": means["oracle's best"] - means["critic's best"],
        "M-step": means["critic's posterior"] - means["policy"],
        "rho": mean(spearman(measured.q, measured.returns.mean(-1))),
        "rho of halves": mean(spearman(*halves)),
        **errors(measured),
    }


def mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


PERCENT = (
    "lost",
    "sure",
    "policy",
    "critic's posterior",
    "critic's best",
    "oracle's posterior",
    "oracle's best",
    "regret",
    "M-step",
)
PLAIN = ("rho", "rho of halves", "bias", "true spread", "critic's spread", "error")


def found_phases(measured: Measured) -> list[str]:
    return [phase for phase in PHASES if (measured.phase == phase).any()]


def table(measured: Measured) -> str:
    """Return a Markdown table, a column per phase; success in percent."""
    phases = found_phases(measured)
    reports = [report(measured.of(phase)) for phase in phases]
    lines = ["| | " + " | ".join(phases) + " |", "|---" * (len(phases) + 1) + "|"]
    lines.append("| states | " + " | ".join(str(one["states"]) for one in reports) + " |")
    for name in PERCENT:
        cells = [f"{100 * one[name]:.0f}" for one in reports]
        lines.append(f"| {name} % | " + " | ".join(cells) + " |")
    for name in PLAIN:
        cells = [f"{one[name]:.3g}" for one in reports]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(measured: Measured, task: str, path: Path) -> Path:
    """Draw a task: ways to choose, kinds of states, ranking and calibration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = new_figure(11, 8, 2, 2)
    draw_ways(axes[0, 0], measured)
    draw_outcomes(axes[0, 1], measured)
    draw_ranking(axes[1, 0], measured)
    draw_calibration(axes[1, 1], measured)
    for panel in axes.ravel():
        panel.spines[["top", "right"]].set_visible(False)
    states = count_of([len(measured.phase)], "state")
    figure.suptitle(f"{task}, {count_of([measured.runs], 'run')}, {states}")
    return save_figure(figure, path)


def draw_ways(axes: Any, measured: Measured) -> None:
    """Draw the success of each way to choose, with 95 % bootstrap intervals over states."""
    colors = [BLUE, ORANGE, "#e69f00", GREEN, "#000000"]
    phases = found_phases(measured)
    for place, phase in enumerate(phases):
        ways = ways_to_choose(measured.of(phase))
        for i, (way, success) in enumerate(ways.items()):
            middle = success.mean()
            low, high = interval(success)
            axes.errorbar(
                place + 0.14 * (i - 2),
                100 * middle,
                yerr=[[100 * (middle - low)], [100 * (high - middle)]],
                fmt="o",
                color=colors[i],
                capsize=2.5,
                label=way if place == 0 else None,
            )
    name_phases(axes, phases)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("success (%)")
    axes.set_title("Who chooses among the candidates", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def draw_outcomes(axes: Any, measured: Measured) -> None:
    phases = found_phases(measured)
    shares = [outcomes(measured.of(phase)) for phase in phases]
    below = np.zeros(len(phases))
    colors = {"lost": ORANGE, "between": "0.8", "sure": BLUE}
    labels = {
        "lost": "no candidate ever succeeds",
        "between": "some rollouts succeed",
        "sure": "all rollouts succeed",
    }
    for name, color in colors.items():
        heights = np.array([100 * share[name] for share in shares])
        axes.bar(range(len(phases)), heights, 0.6, below, color=color, label=labels[name])
        below = below + heights
    name_phases(axes, phases)
    axes.set_ylabel("states (%)")
    axes.set_ylim(0, 100)
    axes.set_title("What the policy offers", fontsize=11)
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=3,
        columnspacing=1,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )


def draw_ranking(axes: Any, measured: Measured) -> None:
    phases = found_phases(measured)
    reports = [report(measured.of(phase)) for phase in phases]
    places = np.arange(len(phases))
    critic = [one["rho"] for one in reports]
    halves = [one["rho of halves"] for one in reports]
    axes.bar(places - 0.18, critic, 0.34, color=ORANGE, label="critic against rollouts")
    axes.bar(places + 0.18, halves, 0.34, color="0.7", label="one half of the rollouts, other half")
    axes.axhline(0, color="0.3", linewidth=0.8)
    name_phases(axes, phases)
    axes.set_ylim(-1, 1)
    axes.set_ylabel("Spearman's rho within a state")
    axes.set_title("Ranking of the candidates", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def draw_calibration(axes: Any, measured: Measured) -> None:
    colors = dict(zip(PHASES, (BLUE, GREEN, ORANGE, "#000000")))
    value = measured.returns.mean(-1)
    for phase in found_phases(measured):
        rows = measured.phase == phase
        axes.scatter(
            value[rows], measured.q[rows], s=8, alpha=0.5, color=colors[phase], label=phase
        )
    ends = [min(value.min(), measured.q.min()), max(value.max(), measured.q.max())]
    axes.plot(ends, ends, color="0.3", linewidth=0.8)
    axes.set_xlabel("true discounted return")
    axes.set_ylabel("critic's value")
    axes.set_title("Calibration, a point per candidate", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def name_phases(axes: Any, phases: list[str]) -> None:
    axes.set_xticks(range(len(phases)), phases)
    axes.set_xlabel("phase of the task")
