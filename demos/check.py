"""Do the demonstrations and the simulator on this machine agree? Silent disagreement means 0 %.

    python -m demos --check --task lift --data lift.hdf5

It first says what was understood of the file. Then, where the file holds states, each of them is
put into the simulator: its observation there must be the recorded one, and the recorded action must
lead from there to the recorded next observation and reward. Where it holds the seeds of its
episodes instead, their actions are played again. The tolerances are ours: the recorded observation
is a physics step (2 ms) older than the state beside it, and contact forces are not part of a state.
Not here: what any reader checks (columns.py).

Shapes: T steps of a demonstration, D observation.
"""

import contextlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium
import numpy as np

import demos
import envs
from demos import download, hdf5, minari_data, npz
from demos.columns import DataError, existing, make_command, reading
from demos.ranges import refuse_implausible, starts
from simulators.ogbench_env import met

METRES = 0.005  # largest error of a position, at a recorded state
TURNS = 0.04  # ... and of a quaternion's component
STEP = 0.02  # largest error of a position after one action, in metres
TYPICAL = 0.001  # ... and its median over an episode
SAME = 1e-4  # error of an observation that is played again from its seed, relative to its size
# First columns of the quaternions, by the observation's length (Lift; Can and Square).
QUATERNIONS = {19: (3, 12), 23: (3, 12, 19)}


@dataclass
class Report:
    """What a check found: steps compared and the largest errors."""

    steps: int = 0
    position: float = 0.0  # metres, of observations at recorded states
    rotation: float = 0.0  # quaternion components, likewise
    step: float = 0.0  # metres, of observations after one recorded action
    typical: float = 0.0  # metres, the median of these in the worst episode
    rewards: int = 0  # steps whose reward or success differs
    where: str = ""  # the first disagreement

    def note(self, bad: bool, where: str) -> None:
        if bad and not self.where:
            self.where = where

    def __str__(self) -> str:
        return (
            f"{self.steps} steps: observations differ by at most {1000 * self.position:.2f} mm "
            f"and {self.rotation:.4f} in quaternions, after an action by "
            f"{1000 * self.step:.2f} mm (median {1000 * self.typical:.2f}), rewards in "
            f"{self.rewards} steps"
        )


# ---- what is asked


def check(
    task: str | envs.Task,
    path: str | Path,
    episodes: int = 5,
    obs_keys: Sequence[str] | None = None,
    filter_key: str | None = None,
) -> Report:
    """Replay the first `episodes` demonstrations. obs_keys and filter_key are demos.load's.

    Raises ValueError if the file is bad, another simulator's, or disagrees; the message says what
    to install. The report has 0 steps if the file holds nothing to replay from.
    """
    task = envs.get_task(task)
    if episodes < 1:
        raise ValueError(f"need at least one demonstration to replay, got {episodes}")
    path = located(path, task)
    # a bad file is refused here in one sentence, another robosuite in the next line
    data = demos.load(path, task, None, obs_keys, filter_key, clip_actions=True)
    env = envs.make_env(task, env_args=demos.env_args(path, task))
    try:
        refuse_implausible(path, data, env)
        return replay(path, task, data, env, episodes, filter_key)
    finally:
        env.close()


def located(path: str | Path, task: envs.Task) -> str | Path:
    """Return the path of a file that is there, or a Minari data set's name as it is."""
    return str(path) if minari_data.is_minari(path) else existing(path, task)


def replay(
    path: str | Path,
    task: envs.Task,
    data: dict,
    env: gymnasium.Env,
    episodes: int,
    filter_key: str | None,
) -> Report:
    """Replay a file from its states if it has some, else from its seeds, else not at all."""
    if not minari_data.is_minari(path):
        is_npz = demos.is_npz(path, task)
        if task.suite == "robosuite" and not is_npz:
            return check_states(path, env, episodes, filter_key)
        if task.suite == "ogbench" and is_npz and "qpos" in members(path):
            return check_play(path, env, episodes)
    seeds = recorded_seeds(path, task, filter_key)
    if seeds is None or len(seeds) == 0:
        return Report()
    return check_seeds(path, data, env, seeds, episodes)


def describe(
    task: str | envs.Task,
    path: str | Path,
    obs_keys: Sequence[str] | None = None,
    filter_key: str | None = None,
) -> str:
    """Say in a few lines what was understood of a file."""
    task = envs.get_task(task)
    path = located(path, task)
    with contextlib.redirect_stdout(io.StringIO()):  # check() has printed what load() says
        data = demos.load(path, task, None, obs_keys, filter_key, clip_actions=True)
    first = starts(data)
    lengths = np.diff(np.append(first, len(data["obs"])))
    terminal = int(data["terminated"].sum())
    meaning = "succeed" if task.suite != "gymnasium" else "end where the environment says so"
    lines = [
        f"{path}: {len(first)} demonstrations, {len(data['obs']):,} steps, {lengths.min()} to "
        f"{lengths.max()} long, {lengths.mean():.0f} on average",
        f"{terminal} of {len(first)} {meaning}, {len(first) - terminal} run out of time",
        f"observations {spread_of(data['obs'])}",
        f"actions {spread_of(data['action'])}",
        f"rewards {data['reward'].min():g} to {data['reward'].max():g}",
    ]
    if not minari_data.is_minari(path) and not demos.is_npz(path, task):
        with hdf5.opened(path) as file:
            lists = hdf5.filters(file)
        counts = [f"{name} ({len(members)})" for name, members in lists.items()]
        lines.append(f"filters: {', '.join(counts) or 'none'}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            demos.load(path, task, None, obs_keys, filter_key)
    except DataError as error:
        lines.append(f"training refuses it: {error}")
    return "\n".join(lines)


def spread_of(array: np.ndarray) -> str:
    return f"({array.shape[1]},) from {array.min():.3g} to {array.max():.3g}"


def newest(task: str | envs.Task) -> Path:
    """Return the file to check if none is named: the public one, else the newest made here."""
    task = envs.get_task(task)
    if task.suite not in ("robosuite", "ogbench"):
        raise DataError(f"name a file of {task.name} with --data FILE")
    here = sorted(
        Path("data").glob(f"{task.name}-*-s*.*"),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    places = download.places(task)
    for path in (*places, *here):
        if path.is_file():
            return path
    command = make_command(task.name, demos.made(task, 20, 0))
    raise FileNotFoundError(
        f"no demonstrations of {task.name} found in {places[0].parent} or data/: name a file with "
        f"--data, or make one: {command}"
    )


# ---- robosuite, whose files hold states


def check_states(path: Path, env: gymnasium.Env, episodes: int, filter_key: str | None) -> Report:
    """Put every recorded state into the simulator, and act from there."""
    report = Report()
    with hdf5.opened(path) as file:
        for name in hdf5.chosen(path, file, filter_key)[:episodes]:
            group = file["data"][name]
            refuse_states(f"{path}: data/{name}", group, env)
            compare_observations(env, group, name, report)
            compare_steps(env, group, name, report)
    if report.where:
        raise ValueError(
            f"{path} and the simulator disagree, first at {report.where} ({report}). "
            f"{versions(path)}"
        )
    return report


def refuse_states(where: str, group, env) -> None:
    """Raise DataError unless the states are there and of this simulator's model."""
    states = hdf5.member(group, "states")
    if states is None:
        raise DataError(
            f"{where}: key 'states' is missing; without recorded states nothing can be replayed"
        )
    wanted = (len(group["actions"]), len(env.simulator.sim.get_state().flatten()))
    if states.shape != wanted:
        raise DataError(
            f"{where}: key 'states' must be {wanted} for this simulator's model, found "
            f"{states.shape}. {versions(Path(group.file.filename))}"
        )


def put(env, state: np.ndarray) -> None:
    env.simulator.sim.set_state_from_flattened(state)
    env.simulator.sim.forward()


def observe(env) -> np.ndarray:
    return env._observation(env.simulator._get_observations(force_update=True))


def compare_observations(env, group, name: str, report: Report) -> None:
    env.reset(seed=0)
    recorded = observations(group, "obs", env.task)
    for t, state in enumerate(group["states"][()]):
        put(env, state)
        position, rotation = errors(observe(env), recorded[t], skip_object=t == 0)
        report.position = max(report.position, position)
        report.rotation = max(report.rotation, rotation)
        report.note(
            position > METRES or rotation > TURNS,
            f"{name} step {t}: observation of the recorded state",
        )
        report.steps += 1


def compare_steps(env, group, name: str, report: Report) -> None:
    env.reset(seed=0)
    states = group["states"][()]
    actions = group["actions"][()]
    rewards = group["rewards"][()]
    recorded = following(group, env.task)
    distances = []
    succeeded = False
    for t, state in enumerate(states):
        put(env, state)
        observe(env)  # the relative poses of the next reading use this one
        if t:
            # robomimic judged the next recorded state, a live recording the end of the step.
            judged = {succeeded, bool(env.simulator._check_success())}
            compare_reward(report, name, t - 1, rewards, judged)
        obs, _, succeeded, _, _ = env.step(actions[t])
        if t < len(recorded):
            distances.append(errors(obs, recorded[t])[0])
            report.note(
                distances[-1] > STEP, f"{name} step {t}: observation after the recorded action"
            )
    report.step = max(report.step, *distances)
    report.typical = max(report.typical, float(np.median(distances)))
    report.note(report.typical > TYPICAL, f"{name}: observations after the recorded actions")
    compare_reward(report, name, len(states) - 1, rewards, {succeeded})


def compare_reward(report: Report, name: str, t: int, rewards, successes: set) -> None:
    if (rewards[t] > 0) not in successes:
        report.rewards += 1
        report.note(True, f"{name} step {t}: reward")


def observations(group, kind: str, task) -> np.ndarray:
    return np.concatenate([group[f"{kind}/{key}"][()] for key in task.obs_keys], axis=1)  # (T, D)


def following(group, task) -> np.ndarray:
    """Return the observations after each step, as far as the file knows them."""
    if "next_obs" in group:
        return observations(group, "next_obs", task)
    return observations(group, "obs", task)[1:]


def errors(
    found: np.ndarray, recorded: np.ndarray, skip_object: bool = False
) -> tuple[float, float]:
    """Return the largest error of positions and of quaternions; q and -q are the same turn.

    skip_object: in an episode's first reading robosuite computes the object's relative pose from
    whatever it had read before.
    """
    turned = np.zeros(len(found), bool)
    for start in QUATERNIONS[len(found)]:
        block = slice(start, start + 4)
        turned[block] = True
        if found[block] @ recorded[block] < 0:
            found[block] *= -1
    error = np.abs(found - recorded)
    if skip_object:
        error = error[:9]
        turned = turned[:9]
    return float(error[~turned].max()), float(error[turned].max())


def versions(path: Path) -> str:
    """Put the file's simulator beside the installed one, with the command that makes them equal."""
    with hdf5.opened(path) as file:
        wanted = {
            "robosuite": hdf5.described_world(path, file["data"]).get("env_version"),
            "mujoco": hdf5.attribute(file["data"], "mujoco_version"),
        }
    differ = {name: one for name, one in wanted.items() if one and str(one) != version(name)}
    if not differ:
        return (
            "Their versions are the same, as far as the file tells: it was changed after the "
            "recording"
        )
    stated = ", ".join(f"{name} {one} (installed: {version(name)})" for name, one in differ.items())
    install = " ".join(f"{name}=={one}" for name, one in differ.items())
    return f"It was recorded with {stated}: pip install {install}"


# ---- OGBench's files, which hold states too


def check_play(path: Path, env: gymnasium.Env, episodes: int) -> Report:
    """Compare an OGBench file.

    Its observations hold velocities that a state restores only roughly: medians decide.
    """
    if "qvel" not in members(path):
        raise DataError(
            f"{path}: key 'qvel' is missing; without recorded states nothing can be replayed"
        )
    env.reset(seed=0)
    file = npz.read(path, env.task)
    speeds = env.simulator._model.nv
    try:
        file["qvel"] = npz.read_column(path, "qvel", speeds)
        if len(file["qvel"]) != len(file["qpos"]):
            raise DataError(f"{path}: key 'qvel' must be {(len(file['qpos']), speeds)}")
    except DataError as error:
        wanted = (len(file["qpos"]), speeds)
        raise DataError(
            f"{path}: key 'qvel' must be {wanted} ({error}); fetch or make it again"
        ) from error
    last = file["terminals"] > 0
    last[-1] = True  # the recording simply stops here
    report = Report()
    first = 0
    for number, end in enumerate(np.flatnonzero(last)[:episodes]):
        compare_trajectory(env, file, range(first, end), f"trajectory {number}", report)
        first = end + 1
    if not report.steps:
        raise DataError(f"{path}: no step to compare: every trajectory has a single state")
    if report.where:
        raise ValueError(
            f"{path} and the simulator disagree, first at {report.where} ({report}). It was made "
            f"with another ogbench or mujoco than {version('ogbench')} and {version('mujoco')}, "
            "or changed"
        )
    return report


def compare_trajectory(env, file: dict, rows: range, name: str, report: Report) -> None:
    """Compare the rows of one trajectory; OGBench counts in 10 cm."""
    env.reset(seed=0)
    here = []
    there = []
    wrong = 0
    for row in rows:
        buttons = [file["button_states"][row].astype(int)] if "button_states" in file else []
        env.simulator.set_state(file["qpos"][row], file["qvel"][row], *buttons)
        env.reader.forget()
        error = np.abs(env.simulator.compute_observation() - file["observations"][row])
        here.append(error.max() / 10)
        obs, _, success, _, _ = env.step(file["actions"][row])
        there.append(np.abs(obs - file["observations"][row + 1]).max() / 10)
        after = file["button_states"][row + 1] if buttons else None
        conditions = met(env.task.goal, file["qpos"][row + 1], after)
        wrong += success != conditions.all()
    if not here:
        return
    report.steps += len(rows)
    report.rewards += wrong
    report.position = max(report.position, *here)
    report.step = max(report.step, *there)
    report.typical = max(report.typical, float(np.median(there)))
    report.note(
        np.median(here) > METRES or report.position > 10 * METRES,
        f"{name}: observations of recorded states",
    )
    report.note(
        report.typical > METRES or report.step > 10 * METRES,
        f"{name}: observations after recorded actions",
    )
    report.note(wrong > 0.01 * len(rows), f"{name}: success")


# ---- files that hold the seeds of their episodes


def recorded_seeds(path: str | Path, task: envs.Task, filter_key: str | None) -> np.ndarray | None:
    """Return the reset seed of each episode, None where the file does not know them all."""
    if minari_data.is_minari(path):
        return minari_data.seeds(str(path))
    if demos.is_npz(path, task):
        return npz.read_column(path, "seeds", None) if "seeds" in members(path) else None
    with hdf5.opened(path) as file:
        found = [
            hdf5.attribute(file["data"][name], "seed")
            for name in hdf5.chosen(path, file, filter_key)
        ]
    return None if None in found else np.array(found)


def members(path: Path) -> set[str]:
    """Return the names of an npz file's arrays."""
    with reading(path, "readable as npz"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def check_seeds(
    path: str | Path, data: dict, env: gymnasium.Env, seeds: np.ndarray, episodes: int
) -> Report:
    """Play episodes again from their seeds; observations and rewards must come back."""
    first = starts(data)
    if len(seeds) != len(first):
        raise DataError(f"{path}: {len(seeds)} seeds for {len(first)} demonstrations")
    stops = np.append(first[1:], len(data["obs"]))
    report = Report()
    for number in range(min(episodes, len(first))):
        obs, _ = env.reset(seed=int(seeds[number]))
        for row in range(first[number], stops[number]):
            compare_replayed(report, obs, data["obs"][row], f"episode {number}, row {row}")
            obs, reward, _, _, _ = env.step(data["action"][row])
            report.rewards += not np.isclose(reward, data["reward"][row], rtol=1e-3, atol=1e-5)
            report.steps += 1
    if report.where or report.rewards:
        where = report.where or f"the rewards of {report.rewards} steps"
        raise ValueError(
            f"{path} and the environment disagree, first at {where}: it was recorded with another "
            "version of it, or the environment is not a function of seed and actions"
        )
    return report


def compare_replayed(report: Report, found: np.ndarray, recorded: np.ndarray, where: str) -> None:
    error = np.abs(found - recorded).max()
    report.position = max(report.position, float(error))
    report.note(error > SAME * max(1.0, np.abs(recorded).max()), f"{where}: observation")
