"""Where success is lost: the true value of candidate chunks, rolled out in the simulator.

    python -m benchmarks.oracle runs/can-poco-s0                    # 5 to 10 minutes on one core
    python -m benchmarks.oracle runs/can-poco-s* --states 40        # seeds of a task, one figure
    python -m benchmarks.oracle runs/can-poco-s0 --states 8 --candidates 8 --repeats 2   # a look

Simulators are deterministic, so a state is restored by its episode's seed and actions, and checked
bitwise. At states along the bare policy's evaluation episodes this draws N candidates as the E-step
does, executes each and then the bare policy, several times, and compares with the target critic,
which the E-step asks. oracle_report.py says what is reported and how noise is kept out of it.

Phases of the task: start (the first chunk), reach (no object has moved), manipulate (one has),
overtime (later than nine of ten successes end). Each gets the same number of states.
Writes RUN/oracle.csv, a row per candidate, and RUN/oracle.json, its settings; both after each
state, so the same command continues. Draws runs/oracle-<task>.png over the given runs of a task.
Not here: training, success of whole episodes (train_online.py --eval), comparisons (compare.py).

Shapes: S states, N candidates, R repeats, M critic heads, H chunk, A action, D observation.
"""

import csv
import dataclasses
import importlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn

import envs
from benchmarks.oracle_report import COLUMNS, PHASES, draw, read_measured, table
from chunk_critic import aggregate
from logbook import Clock, UserError, cli, load_checkpoint, must_fit, read_args, replacing
from logbook.options import Count, Seed, parse
from poco import posterior_weights
from train_offline import EVAL_SEED, Acting, Simulation

SCRIPTS = {"poco": ("train_online", "POCO"), "qc": ("baselines.qc", "QC")}
# Where a suite's observation holds the objects, and how much of it changes with 1 cm of motion.
OBJECTS = {"robosuite": (slice(9, 12), 0.01), "ogbench": (slice(19, None), 0.1)}


@dataclass
class Args:
    """What to measure."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders
    states: Count = 20  # per run
    candidates: Count = 16  # N, chunks drawn at each state
    repeats: Count = 4  # R, rollouts of each candidate: one half chooses, the other judges
    episodes: Count = 20  # evaluation episodes that the states are taken from
    seed: Seed = 0  # of states, candidates and rollouts
    checkpoint: str = "last.pt"  # or best.pt
    out: str = "runs"  # folder of the figures

    kept: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def defaults(cls, known: dict[str, str | None]) -> dict[str, Any]:
        return {}


class State(NamedTuple):
    """A state at the beginning of a chunk, and how to return to it."""

    seed: int
    actions: np.ndarray  # (t, A), executed since the reset
    obs: np.ndarray  # (D,)
    phase: str


class Judge(NamedTuple):
    """What is judged: the policy that acts, the critic that ranks, and their run's settings."""

    policy: nn.Module
    critic: nn.Module
    pessimism: float
    temperature: float
    discount: float
    reward_offset: float
    step: int  # of the checkpoint


# ---- the run -------------------------------------------------------------------------------------


def load_run(folder: Path, checkpoint: str) -> tuple[Judge, Simulation]:
    """Load what a run's checkpoint delivers. Raises UserError for a method without candidates."""
    method = read_args(folder).get("method")
    if method not in SCRIPTS:
        raise UserError(f"{folder} is a run of {method}: the oracle judges {' and '.join(SCRIPTS)}")
    script, name = SCRIPTS[method]
    module = importlib.import_module(script)
    args = parse(module.Args, ["--eval", str(folder)])
    simulation = Simulation(args)
    agent = vars(module)[name](args, simulation.make_policy(torch.device("cpu")), Clock())
    state = load_checkpoint(folder / checkpoint)
    with must_fit(folder):
        agent.load_state_dict(state["agent"])
        step = int(state["world"]["steps"])
    temperature = args.temperature if method == "poco" else 1e-6  # QC takes the best
    judge = Judge(
        agent.actor,
        agent.target,
        args.pessimism,
        temperature,
        args.discount,
        args.reward_offset,
        step,
    )
    return judge, simulation


# ---- the states ----------------------------------------------------------------------------------


def visited_states(
    policy: nn.Module, env: gymnasium.Env, episodes: int, moved: Callable
) -> list[State]:
    """Play evaluation episodes with the bare policy and return the states where a chunk began.

    moved(first obs, obs) says whether an object has moved since the episode's beginning.
    """
    acting = Acting(policy)
    played = []
    for seed in range(EVAL_SEED, EVAL_SEED + episodes):
        moves: list[envs.Transition] = []
        _, success, length, _ = envs.run_episode(acting, env, seed, moves.append)
        played.append((seed, moves, success, length))
    lengths = [length for _, _, success, length in played if success]
    late = np.quantile(lengths, 0.9) if lengths else np.inf
    states = []
    for seed, moves, _, _ in played:
        actions = np.array([move.action for move in moves], np.float32)
        for step in range(0, len(moves), policy.horizon):
            obs = moves[step].obs
            phase = phase_of(step, late, moved(moves[0].obs, obs))
            states.append(State(seed, actions[:step], obs, phase))
    return states


def phase_of(step: int, late: float, has_moved: bool) -> str:
    if step == 0:
        return "start"
    if step > late:
        return "overtime"
    return "manipulate" if has_moved else "reach"


def object_moved(task: envs.Task) -> Callable[[np.ndarray, np.ndarray], bool]:
    """Return a function of two observations that says whether an object moved between them."""
    if task.suite not in OBJECTS:  # where its objects are is unknown: it only has early and late
        return lambda first, obs: False
    part, threshold = OBJECTS[task.suite]

    def moved(first: np.ndarray, obs: np.ndarray) -> bool:
        return bool(np.abs(obs[part] - first[part]).max() > threshold)

    return moved


def choose_states(states: list[State], count: int, seed: int) -> list[State]:
    """Choose states at random, as far as possible the same number of each phase."""
    rng = np.random.default_rng([seed, 0])
    groups = []
    for phase in PHASES:
        group = [state for state in states if state.phase == phase]
        groups.append([group[i] for i in rng.permutation(len(group))])
    chosen = []
    while len(chosen) < count and any(groups):
        for group in groups:  # in turn, one of each phase
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


# ---- the rollouts --------------------------------------------------------------------------------


def rollout(
    env: gymnasium.Env,
    state: State,
    chunk: np.ndarray,
    judge: Judge,
    rng: np.random.Generator,
) -> tuple[bool, float]:
    """Execute a chunk (H, A) at a state, then the bare policy. Returns success and return.

    The return is discounted, from the state on. A truncated episode is taken to go on like its last
    step, since the critic bootstraps there. Raises UserError where the simulator does not return to
    the state bitwise.
    """
    acting = Acting(judge.policy)
    waiting = [chunk]
    if len(state.actions):
        waiting.insert(0, state.actions)

    def act(obs: np.ndarray) -> np.ndarray:
        return waiting.pop(0) if waiting else acting(obs[None], rng)

    runner = envs.ChunkRunner(env, act)
    runner.reset(state.seed)
    for _ in state.actions:
        runner.step()
    if not np.array_equal(runner.obs, state.obs):
        raise UserError(
            f"the simulator is not deterministic: after {len(state.actions)} steps of the episode "
            f"of seed {state.seed} it is in another state"
        )
    total = 0.0
    weight = 1.0
    while not runner.ended:
        move = runner.step()
        reward = move.reward + judge.reward_offset
        total += weight * reward
        weight *= judge.discount
    if move.truncated and judge.discount < 1:
        total += weight * reward / (1 - judge.discount)
    return move.success, total


@torch.no_grad()
def candidates_of(
    judge: Judge, obs: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Do the E-step at one state: chunks (N, H, A), Q (N,), its deviation over heads, weights."""
    policy = judge.policy
    shape = (1, count, policy.horizon, policy.action_dim)
    noise = torch.as_tensor(rng.standard_normal(shape, dtype=np.float32))
    context = policy.encode(torch.as_tensor(obs[None]))
    chunks = policy.sample(context, count, noise=noise)
    heads = judge.critic(policy.critic_obs(context), chunks)  # (M, 1, N)
    q = aggregate(heads, judge.pessimism)  # (1, N)
    weights = posterior_weights(q, judge.temperature)
    spread = heads.std(0, correction=0)
    return tuple(value[0].double().numpy() for value in (chunks, q, spread, weights))


def measure_state(
    env: gymnasium.Env, number: int, state: State, judge: Judge, args: Args
) -> list[dict[str, Any]]:
    """Roll out every candidate of a state and return its rows of oracle.csv."""
    rng = np.random.default_rng([args.seed, 1, number])
    chunks, q, spread, weights = candidates_of(judge, state.obs, args.candidates, rng)
    rows = []
    for i, chunk in enumerate(chunks):
        successes = []
        returns = []
        for repeat in range(args.repeats):
            # The same noise for all candidates: they differ only by their chunk.
            noise = np.random.default_rng([args.seed, 2, number, repeat])
            success, value = rollout(env, state, chunk, judge, noise)
            successes.append(int(success))
            returns.append(value)
        values = (number, state.seed, len(state.actions), state.phase, i, q[i], spread[i])
        judged = (weights[i], join(successes), join(returns))
        rows.append(dict(zip(COLUMNS, (*values, *judged))))
    return rows


def join(values: list[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


# ---- a run's files -------------------------------------------------------------------------------


def measure_run(folder: Path, args: Args) -> None:
    """Measure the states of a run that RUN/oracle.csv does not hold yet."""
    judge, simulation = load_run(folder, args.checkpoint)
    settings = dataclasses.asdict(args) | {"task": simulation.args.task}
    settings |= {"temperature": judge.temperature, "step": judge.step}
    del settings["runs"], settings["out"]
    rows = rows_so_far(folder, settings)
    done = {int(row["state"]) for row in rows}
    env = simulation.make_eval_env()
    try:
        with envs.one_thread():
            visited = visited_states(
                judge.policy, env, args.episodes, object_moved(simulation.task)
            )
            states = choose_states(visited, args.states, args.seed)
            for number, state in enumerate(states):
                if number in done:
                    continue
                start = time.perf_counter()
                rows += measure_state(env, number, state, judge, args)
                write_rows(folder, rows, settings)
                seconds = time.perf_counter() - start
                print(
                    f"{folder}: state {number + 1} of {len(states)}, {state.phase}, "
                    f"{seconds:.0f} s",
                    flush=True,
                )
    finally:
        env.close()


def rows_so_far(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows measured earlier. Raises UserError if it was with other settings."""
    if not (folder / "oracle.json").exists():
        return []
    stored = json.loads((folder / "oracle.json").read_text())
    for name, value in settings.items():
        if stored.get(name) != value:
            raise UserError(
                f"{folder}/oracle.csv was measured with {name} {stored.get(name)}, not {value}: "
                "move it and oracle.json away to measure anew"
            )
    with open(folder / "oracle.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / "oracle.csv") as file:
        file.write(text.getvalue().encode())
    with replacing(folder / "oracle.json") as file:
        file.write(json.dumps(settings, indent=2).encode() + b"\n")


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    if not args.runs:
        raise UserError("give run folders: python -m benchmarks.oracle RUN [RUN ...]")
    if args.repeats % 2 or args.candidates < 2:
        raise UserError("--repeats is even, half of them judge; --candidates is at least 2")
    tasks: dict[str, list[Path]] = {}
    for folder in map(Path, args.runs):
        measure_run(folder, args)
        tasks.setdefault(str(read_args(folder)["task"]), []).append(folder)
    for task, folders in tasks.items():
        measured = read_measured(folders)
        print(table(measured))
        print(draw(measured, task, Path(args.out) / f"oracle-{task}.png"))


if __name__ == "__main__":
    cli(main)
