"""
Do the demonstrations and the simulator on this machine agree? Silent disagreement is a success rate of 0 %.

    python -m demos --check lift --data lift.hdf5

Each recorded state is put into the simulator. Its observation there must be the recorded one, and the recorded action
must lead from there to the recorded next observation and reward. The tolerances are ours: the recorded observation is
a physics step (2 ms) older than the state beside it, and contact forces are not part of a state.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

import envs
from demos import hdf5

METRES, TURNS = 0.005, 0.04  # largest error of a position and of a quaternion's component, at a recorded state
STEP, TYPICAL = 0.02, 0.001  # largest error of a position after one action, and its median over an episode, in metres
QUATERNIONS = {19: (3, 12), 23: (3, 12, 19)}  # first columns, by the observation's length (Lift; Can and Square)


@dataclass
class Report:
    """What a check found: steps compared, the largest errors, steps whose reward or success differs."""

    steps: int = 0
    position: float = 0.0  # metres, of observations at recorded states
    rotation: float = 0.0  # quaternion components, likewise
    step: float = 0.0  # metres, of observations after one recorded action
    typical: float = 0.0  # metres, the median of these in the worst episode
    rewards: int = 0
    where: str = ""  # the first disagreement

    def note(self, bad: bool, where: str) -> None:
        if bad and not self.where:
            self.where = where

    def __str__(self) -> str:
        return (f"{self.steps} steps: observations differ by at most {1000 * self.position:.2f} mm and "
                f"{self.rotation:.4f} in quaternions, after an action by {1000 * self.step:.2f} mm "
                f"(median {1000 * self.typical:.2f}), rewards in {self.rewards} steps")


def check(task, path, episodes: int = 5) -> Report:
    """
    Replays the first `episodes` demonstrations. ValueError: the file is bad, another simulator's, or disagrees; the
    message says what to install.
    """
    import h5py

    task = envs.get_task(task)
    if episodes < 1:
        raise ValueError(f"need at least one demonstration to replay, got {episodes}")
    if task.suite == "ogbench":
        return _check_play(task, path, episodes)
    hdf5.load(path, task)  # bad files are refused in one sentence
    env, report = envs.make_env(task, env_args=hdf5.env_args(path)), Report()  # refuses another robosuite
    try:
        with h5py.File(path, "r") as file:
            for name in hdf5.names(file)[:episodes]:
                group = file["data"][name]
                _refuse_states(f"{path}: data/{name}", group, env)
                _observations(env, group, name, report)
                _steps(env, group, name, report)
    finally:
        env.close()
    if report.where:
        raise ValueError(f"{path} and the simulator disagree, first at {report.where} ({report}). {_versions(path)}")
    return report


def _refuse_states(where: str, group, env) -> None:
    if "states" not in group:
        raise ValueError(f"{where}: key 'states' is missing; without recorded states nothing can be replayed")
    size = len(env.simulator.sim.get_state().flatten())
    if group["states"].shape != (len(group["actions"]), size):
        raise ValueError(f"{where}: key 'states' must be ({len(group['actions'])}, {size}) for this simulator's model, "
                         f"found {group['states'].shape}. {_versions(group.file.filename)}")


def _put(env, state) -> None:
    env.simulator.sim.set_state_from_flattened(state)
    env.simulator.sim.forward()


def _read(env) -> np.ndarray:
    return env._observation(env.simulator._get_observations(force_update=True))


def _observations(env, group, name: str, report: Report) -> None:
    env.reset(seed=0)
    recorded = _recorded(group, "obs", env.task)
    for t, state in enumerate(group["states"][()]):
        _put(env, state)
        position, rotation = _errors(_read(env), recorded[t], skip=t == 0)
        report.position, report.rotation = max(report.position, position), max(report.rotation, rotation)
        report.note(position > METRES or rotation > TURNS, f"{name} step {t}: observation of the recorded state")
        report.steps += 1


def _steps(env, group, name: str, report: Report) -> None:
    env.reset(seed=0)
    states, actions, rewards = group["states"][()], group["actions"][()], group["rewards"][()]
    recorded, errors, succeeded = _recorded(group, "next_obs", env.task), [], False
    for t, state in enumerate(states):
        _put(env, state)
        _read(env)  # the relative poses of the next reading use this one
        if t:  # robomimic judged the next recorded state, a live recording the end of the step: either will do
            _reward(report, name, t - 1, rewards, {succeeded, bool(env.simulator._check_success())})
        obs, _, succeeded, _, _ = env.step(actions[t])
        errors.append(_errors(obs, recorded[t])[0])
        report.note(errors[-1] > STEP, f"{name} step {t}: observation after the recorded action")
    report.step, report.typical = max(report.step, *errors), max(report.typical, float(np.median(errors)))
    report.note(report.typical > TYPICAL, f"{name}: observations after the recorded actions")
    _reward(report, name, len(states) - 1, rewards, {succeeded})


def _reward(report: Report, name: str, t: int, rewards, successes: set) -> None:
    if (rewards[t] > 0) not in successes:
        report.rewards += 1
        report.note(True, f"{name} step {t}: reward")


def _recorded(group, kind: str, task) -> np.ndarray:
    return np.concatenate([group[f"{kind}/{key}"][()] for key in task.obs_keys], axis=1)  # (T, D)


def _errors(found: np.ndarray, recorded: np.ndarray, skip: bool = False) -> tuple[float, float]:
    """
    Largest error of positions and of quaternions, q and -q being the same turn. `skip` leaves the object out: in an
    episode's first reading robosuite computes its relative pose from whatever it had read before.
    """
    turned = np.zeros(len(found), bool)
    for start in QUATERNIONS[len(found)]:
        block = slice(start, start + 4)
        turned[block] = True
        if found[block] @ recorded[block] < 0:
            found[block] *= -1
    error = np.abs(found - recorded)[: 9 if skip else None]
    turned = turned[: len(error)]
    return float(error[~turned].max()), float(error[turned].max())


def _check_play(task, path, episodes: int) -> Report:
    """An OGBench file. Its observations hold velocities that a state restores only roughly: medians decide."""
    from demos import ogbench

    ogbench.load(path, task)  # bad files are refused in one sentence
    with np.load(path, allow_pickle=False) as archive:
        file = {key: archive[key] for key in archive}
    if "qvel" not in file:
        raise ValueError(f"{path}: key 'qvel' is missing; without recorded states nothing can be replayed")
    file["terminals"][-1] = True  # the recording simply stops here
    env, report, first = envs.make_env(task), Report(), 0
    env.reset(seed=0)
    wanted = len(file["terminals"]), env.simulator._model.nv
    if file["qvel"].shape != wanted:
        raise ValueError(f"{path}: key 'qvel' must be {wanted}, found {file['qvel'].shape}; fetch or make it again")
    for number, end in enumerate(np.flatnonzero(file["terminals"])[:episodes]):
        _play(env, file, range(first, end), f"trajectory {number}", report)
        first = end + 1
    env.close()
    if not report.steps:
        raise ValueError(f"{path}: no step to compare: every trajectory has a single state")
    if report.where:
        raise ValueError(f"{path} and the simulator disagree, first at {report.where} ({report}). It was made with "
                         f"another ogbench or mujoco than {version('ogbench')} and {version('mujoco')}, or changed")
    return report


def _play(env, file, rows, name: str, report: Report) -> None:
    env.reset(seed=0)
    here, there, wrong = [], [], report.rewards
    for row in rows:
        buttons = [file["button_states"][row]] if "button_states" in file else []
        env.simulator.set_state(file["qpos"][row], file["qvel"][row], *buttons)
        env.simulator.forget()
        here.append(np.abs(env.simulator.compute_observation() - file["observations"][row]).max() / 10)
        obs, _, success, _, _ = env.step(file["actions"][row])
        there.append(np.abs(obs - file["observations"][row + 1]).max() / 10)  # OGBench counts in 10 cm
        met = env.task.met(file["qpos"][row + 1], file["button_states"][row + 1] if buttons else None)
        report.rewards += success != met.all()
    report.steps += len(rows)
    report.position, report.step = max(report.position, *here), max(report.step, *there)
    report.typical = max(report.typical, float(np.median(there)))
    report.note(np.median(here) > METRES or report.position > 10 * METRES, f"{name}: observations of recorded states")
    report.note(report.typical > METRES or report.step > 10 * METRES, f"{name}: observations after recorded actions")
    report.note(report.rewards - wrong > 0.01 * len(rows), f"{name}: success")


def _versions(path) -> str:
    """The file's simulator beside the installed one, with the command that makes them equal."""
    import h5py

    with h5py.File(path, "r") as file:
        attributes = dict(file["data"].attrs)
    wanted = {"robosuite": json.loads(attributes["env_args"]).get("env_version"),
              "mujoco": attributes.get("mujoco_version")}
    differ = {name: one for name, one in wanted.items() if one and str(one) != version(name)}
    if not differ:
        return "Their versions are the same, as far as the file tells: it was changed after the recording"
    told = ", ".join(f"{name} {one} (installed: {version(name)})" for name, one in differ.items())
    return f"It was recorded with {told}: pip install " + " ".join(f"{name}=={one}" for name, one in differ.items())


def newest(task) -> Path:
    """The file to check if none is named: the public one, else the newest that was made here."""
    from demos import download

    task = envs.get_task(task)
    here = sorted(Path("data").glob(f"{task.name}-*-s*.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (*download.places(task), *here):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no demonstrations of {task.name} found in {download.places(task)[0].parent} or data/: "
                            f"name a file with --data, or make one: python -m demos --task {task.name} --out FILE")
