"""
OGBench's `play` data: made here by OGBench's own oracles, or read from the files it ships; labelled for one task.

    path = ogbench.collect("scene", episodes=100, seed=0, path="data/scene.npz", workers=2)     # 100,000 steps, 1-2 min
    data = ogbench.load(path, "scene")                                                # ready for the replay

An oracle carries out one random errand after another (put a cube there, press that button, open the drawer) along a
noisy plan, and never heads for the task. The recipe is that of OGBench's data_gen_scripts: trajectories of 1,001
states, plan noise 0.1, scenes whose cube got out of sight discarded. `directed` is ours, for minutes instead of hours:
demonstrations of the task, which begin where its episodes begin, hand out only errands that meet a condition of the
goal, and end when it is met; each has plan noise of its own, up to 0.4, as if by people of different skill.

A file holds, for N rows: observations (N, D), actions (N, A), terminals (N,), qpos (N, joints), qvel (N, speeds),
button_states (N, buttons) where the domain has buttons, and, ours only, directed () and seeds (one per trajectory):
PlayEnv.reset(seed, options={"directed": directed}) and the recorded actions repeat a trajectory bitwise.
"""
from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np

import demos
import envs
from demos import control
from demos.hdf5 import replacing

ROWS = 1001  # states of a trajectory
# Range, per trajectory, of the probability that a cube's errand is to be put on another cube.
STACKING = {"cube-double": (0.0, 0.25), "cube-triple": (0.05, 0.35)}
_env = _oracles = None  # one per process


class PlayEnv(envs.OGBenchEnv):
    """The task's world without its goal: everything lies anywhere, and errands are handed out."""

    def _build(self, render, env_args):
        super()._build(render, env_args, mode="data_collection", terminate_at_goal=False)
        self.simulator.set_tasks()
        self.simulator.num_tasks = len(self.simulator.task_infos)

    def reset(self, *, seed=None, options=None):
        """options={"directed": True}: the first state of an episode of the task, the one of this seed."""
        self._directed = bool(options and options.get("directed"))
        return super().reset(seed=seed)

    def _reset(self, seed):
        self.simulator._mode = "task" if self._directed else "data_collection"
        try:
            obs = super()._reset(seed)
        finally:
            self.simulator._mode = "data_collection"
        self.simulator.forget()  # the reading now names an errand
        self._save_time()
        return obs

    def _save_time(self):
        # Play is made by the million steps, and much of a step is OGBench's Python. Bitwise the same trajectories come
        # without its rotation objects and, where nothing is drawn, the colours that would tell what is solved.
        simulator = self.simulator
        control.direct(simulator)
        if self.render_mode is None:
            for name in [name for name in vars(simulator) if name.endswith("_geom_ids_list")]:
                setattr(simulator, name, [()] * len(getattr(simulator, name)))


def collect(task, episodes: int, seed: int, path, workers=1, progress: bool = True, directed: bool = False) -> Path:
    """Writes `episodes` trajectories, returns the path. The file depends on (task, episodes, seed, directed) alone."""
    from tqdm import tqdm

    task = envs.get_task(task)
    if task.suite != "ogbench":
        raise ValueError(f"task '{task.name}' has no play data: it is not of OGBench")
    if episodes < 1:
        raise ValueError(f"need at least one trajectory, got {episodes}")
    started, played = time.perf_counter(), []
    kind = "demonstrations" if directed else "play"
    with tqdm(total=episodes, desc=f"{task.name} {kind}", unit="episode", disable=not progress) as bar:
        for trajectory in _trajectories(task, episodes, seed, workers, directed):
            played.append(trajectory)
            bar.update()
    columns = {key: np.concatenate([trajectory[key] for trajectory in played]) for key in played[0]}
    save(path, columns | {"directed": np.array(directed)})
    if progress:
        steps, seconds = len(columns["terminals"]) - episodes, time.perf_counter() - started
        solved = int(load(path, task)["terminated"].sum())
        print(f"{path}: {episodes} trajectories, {steps} steps at {steps / seconds:.0f} per second, "
              f"the task was solved {solved} times")
    return Path(path)


def _trajectories(task, episodes: int, seed: int, workers: int, directed: float):
    jobs = [(task, seed, episode, directed, ROWS) for episode in range(episodes)]
    return demos.spread(_trajectory, jobs, min(workers, episodes))


def _trajectory(job) -> dict[str, np.ndarray]:
    global _env, _oracles
    task, seed, episode, directed, rows = job
    if _env is None or _env.task != task:
        _env = PlayEnv(task)
        _oracles = _make_oracles(task, _env.simulator)
    rng = np.random.default_rng([seed, episode])
    before = np.random.get_state()  # the oracles draw from numpy's global stream
    try:
        while True:
            np.random.seed(int(rng.integers(2**32)))
            trajectory = _play(_env, _oracles, rng, directed, rows)
            if task.name != "scene" or _in_sight(trajectory["qpos"][:, 14:17]):
                return trajectory
    finally:
        np.random.set_state(before)


def _make_oracles(task, simulator) -> dict:
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    options = dict(env=simulator, noise_smoothing=0.5)
    fist = {"gripper_always_closed": True} if task.name.startswith("puzzle") else {}
    oracles = {
        "cube": cube_plan.CubePlanOracle(**options), "button": button_plan.ButtonPlanOracle(**fist, **options),
        "drawer": drawer_plan.DrawerPlanOracle(**options), "window": window_plan.WindowPlanOracle(**options),
    }
    for oracle in oracles.values():
        oracle.compute_plan = partial(control.plan, oracle)
    return oracles


def _play(env: PlayEnv, oracles: dict, rng, directed: bool, count: int) -> dict[str, np.ndarray]:
    """One trajectory of at most `count` states, each with the action taken there."""
    simulator, rows, seed = env.simulator, [], int(rng.integers(2**31))
    p_stack = rng.uniform(*STACKING.get(env.task.name, (0.5, 0.5)))
    noise = rng.uniform(0.1, 0.4) if directed else 0.1
    env.reset(seed=seed, options={"directed": directed})
    for one in oracles.values():
        one._noise = noise
    oracle, solved, errand = None, False, directed  # whether an errand is to be handed out
    while len(rows) < count:
        if errand:
            simulator.set_new_target(return_info=False, p_stack=p_stack)
            if directed:
                _send_to_goal(simulator, env.task, rng)
            oracle = None
        if oracle is None:
            simulator.forget()  # the reading names the errand
            info = simulator.compute_ob_info()
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(None, info)
        seen = control.look(simulator, env.task)
        action = np.clip(oracle.select_action(None, seen), -1.0, 1.0).astype(np.float32)
        rows.append(seen | {"actions": action})
        if solved:
            break
        control.advance(simulator, action.astype(np.float64), seen)
        buttons = getattr(simulator, "_cur_button_states", None)
        solved = directed and env.task.met(simulator._data.qpos, buttons).all()
        errand = oracle.done
    return _columns(env.task, rows) | {"seeds": np.array([seed])}


def _columns(task, rows: list[dict]) -> dict[str, np.ndarray]:
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0] if not key.startswith("privileged")}
    columns |= {"observations": control.observe(task, columns), "terminals": np.arange(len(rows)) == len(rows) - 1}
    dtypes = {key: np.float32 for key in ("observations", "actions", "qpos", "qvel")}
    dtypes |= {"button_states": np.int8, "terminals": bool}
    return {key: columns[key].astype(dtype) for key, dtype in dtypes.items() if key in columns}


def _send_to_goal(simulator, task, rng) -> None:
    """Replace the errand by one that meets a condition of the goal, if one is left that the arm can meet now."""
    goal, qpos, buttons = task.goal, simulator._data.qpos, getattr(simulator, "_cur_button_states", None)
    kinds = ["cube"] * len(goal.cubes) + ["button"] * len(goal.buttons) + ["drawer", "window"]
    unmet = [(kinds[i], i - kinds.index(kinds[i])) for i in np.flatnonzero(~task.met(qpos, buttons))]
    errands = [("cube", i) for kind, i in unmet if kind == "cube" and _within_reach(simulator, i, len(goal.cubes))]
    presses = [("button", i) for kind, i in unmet if kind == "button"]
    if task.name.startswith("puzzle"):
        presses = [("button", i) for i in lights_out(buttons, goal.buttons)]
    errands += presses or [(kind, i) for kind, i in unmet if kind in ("drawer", "window")]  # buttons unlock these two
    if not errands:
        return
    kind, i = errands[rng.integers(len(errands))]
    simulator._target_task = kind
    if kind == "cube":
        mocap, turn = simulator._cube_target_mocap_ids[i], rng.uniform(0, np.pi)
        simulator._target_block, simulator._data.mocap_pos[mocap] = i, goal.cubes[i]
        simulator._data.mocap_quat[mocap] = np.cos(turn), 0.0, 0.0, np.sin(turn)
    elif kind == "button":
        simulator._target_button, simulator._target_button_states[i] = i, 1 - buttons[i]
    else:
        _aim_slide(simulator, kind, goal.slides[kind == "window"])


def _aim_slide(simulator, kind: str, place: float) -> None:
    import mujoco

    setattr(simulator, f"_target_{kind}_pos", place)
    simulator._model.site(f"{kind}_handle_center_target").pos[1 if kind == "drawer" else 0] = place
    mujoco.mj_kinematics(simulator._model, simulator._data)  # moves the target's site, which the oracle reads


def _within_reach(simulator, cube: int, cubes: int) -> bool:
    """Neither under another cube nor in the drawer."""
    places = simulator._data.qpos[14 : 14 + 7 * cubes].reshape(cubes, 7)[:, :3]
    offset = places - places[cube]
    buried = ((np.linalg.norm(offset[:, :2], axis=1) < 0.03) & (offset[:, 2] > 0.02)).any()
    return not buried and not (hasattr(simulator, "_is_in_drawer") and simulator._is_in_drawer(places[cube]))


def lights_out(lights, goal) -> np.ndarray:
    """The buttons of a 3x3 Lights Out to press, each once and in any order, to get from `lights` to `goal`."""
    index = np.arange(9)
    row, column = np.abs(index[:, None] // 3 - index // 3), np.abs(index[:, None] % 3 - index % 3)
    toggles = (row + column <= 1).astype(int)  # (9, 9) a press toggles its button and the neighbours
    presses = (np.arange(512)[:, None] >> index) & 1  # (512, 9) every set of presses
    solves = (presses @ toggles % 2 == np.bitwise_xor(lights, goal)).all(1)
    return np.flatnonzero(presses[solves.argmax()])  # a 3x3 board has exactly one solution


def _in_sight(cube: np.ndarray) -> bool:
    """OGBench's rule for the scene: cube (T, 3) neither far right, nor far left without being in the drawer."""
    y, z = cube[:, 1], cube[:, 2]
    return not ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any()


def save(path, columns: dict[str, np.ndarray]) -> Path:
    """Atomic: a reader finds the old file or the whole new one."""
    path = Path(path)
    with replacing(path) as handle:
        np.savez_compressed(handle, **columns)  # 30-45% smaller for 1% of the time it took to make
    return path


def load(path, task: str | envs.Task, episodes: int | None = None) -> dict[str, np.ndarray]:
    """
    The steps of an OGBench file (or of its first `episodes` trajectories), in order: obs (N, D), action (N, A), reward
    (N,), next_obs (N, D), terminated and truncated (N,).

    A step is labelled by the state it leads to and terminates when that state solves the task. Play goes on there, but
    the environment would not have: steps that begin in a solved state are left out. (OGBench's own single-task labels
    belong to the state a step begins in, keep those steps, and count the unmet conditions of scene and puzzle too.)
    """
    path, task = Path(path), envs.get_task(task)
    if not path.is_file():
        raise FileNotFoundError(f"no play data at {path}; make some: python -m demos --task {task.name} --out {path}")
    file = _read(path, task, episodes)
    met = task.met(file["qpos"], file.get("button_states"))
    last, solved = file["terminals"], met.all(-1)
    start = np.flatnonzero(~last[:-1] & ~solved[:-1])  # the last state of a trajectory has no next one
    if not len(start):
        raise ValueError(f"{path}: holds no step to learn from: every state is a trajectory's last, or solved already")
    after = start + 1
    return {
        "obs": file["observations"][start], "action": np.clip(file["actions"][start], -1.0, 1.0),
        "reward": task.reward(met[after]).astype(np.float32), "next_obs": file["observations"][after],
        "terminated": solved[after], "truncated": last[after] & ~solved[after],
    }


def _read(path: Path, task, episodes: int | None) -> dict[str, np.ndarray]:
    """The checked columns of a file, cut after `episodes` trajectories."""
    goal = task.goal
    joints = 14 + 7 * len(goal.cubes) + len(goal.buttons) + len(goal.slides)
    widths = {"terminals": None, "observations": task.obs_dim, "actions": task.action_dim, "qpos": joints}
    if goal.buttons:
        widths["button_states"] = len(goal.buttons)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in widths if key in archive}
    except Exception as error:  # a damaged file can raise almost anything
        raise ValueError(f"{path}: not readable as npz, truncated perhaps ({error}): make or fetch it anew") from error
    file = {key: _column(f"{path}: key '{key}'", arrays.get(key), width) for key, width in widths.items()}
    lengths = {len(column) for column in file.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(f"{path}: all keys must have the same length of at least 2, found {sorted(lengths)}")
    file["terminals"] = file["terminals"] > 0
    file["terminals"][-1] = True  # the recording simply stops here
    ends = np.flatnonzero(file["terminals"]) + 1
    if episodes is not None and not 0 < episodes <= len(ends):
        raise ValueError(f"{path}: holds {len(ends)} trajectories, {episodes} were asked for")
    return {key: column[: ends[episodes - 1 if episodes else -1]] for key, column in file.items()}


def _column(where: str, array: np.ndarray | None, width: int | None) -> np.ndarray:
    if array is None:
        raise ValueError(f"{where} is missing; this is not an OGBench file with states")
    if array.dtype.kind not in "bifu":
        raise ValueError(f"{where} is not an array of numbers")
    expected = array.shape[:1] if width is None else (*array.shape[:1], width)
    if array.ndim < 1 or array.shape != expected:
        raise ValueError(f"{where} must be {'(N,)' if width is None else f'(N, {width})'}, found {array.shape}")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{where} has non-finite values")
    return array
