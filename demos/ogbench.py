"""OGBench's `play` data and demonstrations of its tasks, made here by OGBench's own oracles.

    path = ogbench.collect("scene", episodes=100, seed=0, path="data/scene.npz", workers=2)
    # 100,000 steps in 2 to 3 minutes

An oracle carries out one random errand after another (put a cube there, press that button, open the
drawer) along a noisy plan, and never heads for the task. The recipe is that of OGBench's
data_gen_scripts: trajectories of 1,001 states, plan noise 0.1; scenes whose cube got out of sight
are discarded. `directed` is ours, for minutes instead of hours: demonstrations of the task. They
begin where its episodes begin, hand out only errands that meet a condition of the goal, and end
when it is met. Each has plan noise of its own, up to 0.4, as if by people of different skill.

The file holds, for N rows: observations (N, D), actions (N, A), terminals (N,), qpos (N, joints),
qvel (N, speeds), button_states (N, buttons) where the domain has buttons, and, ours only,
directed () and seeds, one per trajectory. PlayEnv.reset(seed, options={"directed": directed}) and
the recorded actions repeat a trajectory bitwise.
Not here: how the file is read and labelled (npz.py).
"""

import time
from pathlib import Path

import numpy as np

import envs
from demos import npz
from demos.processes import spread
from simulators.ogbench_env import OGBenchEnv, met

ROWS = 1001  # states of a trajectory
# Per trajectory, the probability that a cube's errand is to be put on another cube is drawn from:
STACKING = {"cube-double": (0.0, 0.25), "cube-triple": (0.05, 0.35)}
DTYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "terminals": bool,
    "qpos": np.float32,
    "qvel": np.float32,
    "button_states": np.int8,
}
_worlds: dict[str, tuple] = {}  # of this process: task name -> environment, oracles


class PlayEnv(OGBenchEnv):
    """The task's world without its goal: everything lies anywhere, and errands are handed out."""

    def _build(self, render, env_args):
        super()._build(render, env_args, mode="data_collection", terminate_at_goal=False)
        self.directed = False
        self.simulator.set_tasks()
        self.simulator.num_tasks = len(self.simulator.task_infos)

    def reset(self, *, seed=None, options=None):
        """Begin a trajectory; options={"directed": True} begins where the task's episode does."""
        self.directed = bool(options and options.get("directed"))
        return super().reset(seed=seed)

    def _reset(self, seed):
        self.simulator._mode = "task" if self.directed else "data_collection"
        try:
            obs = super()._reset(seed)
        finally:
            self.simulator._mode = "data_collection"
        self.reader.forget()  # the reading now names an errand
        return obs


# ---- making a file


def collect(
    task: str | envs.Task,
    episodes: int,
    seed: int,
    path: str | Path,
    workers: int = 1,
    progress: bool = True,
    directed: bool = False,
) -> Path:
    """Write `episodes` trajectories and return the path.

    The file depends on (task, episodes, seed, directed) alone.
    """
    from tqdm import tqdm

    task = envs.get_task(task)
    if task.suite != "ogbench":
        raise ValueError(f"task '{task.name}' has no play data: it is not of OGBench")
    if episodes < 1:
        raise ValueError(f"need at least one trajectory, got {episodes}")
    started = time.perf_counter()
    kind = "demonstrations" if directed else "play"
    jobs = [(task, seed, episode, directed, ROWS) for episode in range(episodes)]
    trajectories = []
    with tqdm(
        total=episodes, desc=f"{task.name} {kind}", unit="episode", disable=not progress
    ) as bar:
        for trajectory in spread(make_trajectory, jobs, min(workers, episodes)):
            trajectories.append(trajectory)
            bar.update()
    columns = {key: np.concatenate([one[key] for one in trajectories]) for key in trajectories[0]}
    npz.save(path, columns | {"directed": np.array(directed)})
    if progress:
        steps = len(columns["terminals"]) - episodes
        rate = steps / (time.perf_counter() - started)
        solved = int(npz.load(path, task)["terminated"].sum())
        print(
            f"{path}: {episodes} trajectories, {steps} steps at {rate:.0f} per second, "
            f"the task was solved {solved} times"
        )
    return Path(path)


def make_trajectory(job: tuple) -> dict[str, np.ndarray]:
    """Make one trajectory: job is (task, seed, episode, directed, rows)."""
    task, seed, episode, directed, rows = job
    env, oracles = world(task)
    rng = np.random.default_rng([seed, episode])
    before = np.random.get_state()  # the oracles draw from numpy's global stream
    try:
        while True:
            np.random.seed(int(rng.integers(2**32)))
            trajectory = play(env, oracles, rng, directed, rows)
            if task.name != "scene" or in_sight(trajectory["qpos"][:, 14:17]):
                return trajectory
    finally:
        np.random.set_state(before)


def world(task: envs.Task) -> tuple[PlayEnv, dict]:
    """Return this process's environment of a task, and its oracles."""
    if task.name not in _worlds:
        _worlds.clear()
        env = PlayEnv(task)
        _worlds[task.name] = (env, make_oracles(task, env.simulator))
    return _worlds[task.name]


def make_oracles(task: envs.Task, simulator) -> dict:
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    options = {"env": simulator, "noise_smoothing": 0.5}
    fist = {"gripper_always_closed": True} if task.name.startswith("puzzle") else {}
    return {
        "cube": cube_plan.CubePlanOracle(**options),
        "button": button_plan.ButtonPlanOracle(**fist, **options),
        "drawer": drawer_plan.DrawerPlanOracle(**options),
        "window": window_plan.WindowPlanOracle(**options),
    }


# ---- one trajectory


def play(
    env: PlayEnv, oracles: dict, rng: np.random.Generator, directed: bool, count: int
) -> dict[str, np.ndarray]:
    """Play one trajectory of at most `count` states, each with the action taken there."""
    simulator = env.simulator
    seed = int(rng.integers(2**31))
    p_stack = rng.uniform(*STACKING.get(env.task.name, (0.5, 0.5)))
    noise = rng.uniform(0.1, 0.4) if directed else 0.1
    obs, _ = env.reset(seed=seed, options={"directed": directed})
    for one in oracles.values():
        one._noise = noise
    rows = []
    oracle = None
    solved = False
    new_errand = directed  # OGBench's reset has handed out a random one
    while len(rows) < count:
        if new_errand:
            hand_out(env, rng, p_stack, directed)
            oracle = None
        if oracle is None:
            env.reader.forget()  # the reading names the errand
            reading = simulator.compute_ob_info()
            oracle = oracles[reading["privileged/target_task"]]
            oracle.reset(None, reading)
        reading = simulator.compute_ob_info()
        action = oracle.select_action(None, reading)
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        rows.append(reading | {"observations": obs, "actions": action})
        if solved:
            break
        obs = simulator.step(action.astype(np.float64))[0]
        solved = directed and unmet(env).size == 0
        new_errand = oracle.done
    return as_columns(rows) | {"seeds": np.array([seed])}


def as_columns(rows: list[dict]) -> dict[str, np.ndarray]:
    """Put the rows of a trajectory into the columns of a file."""
    names = [name for name in DTYPES if name in rows[0]]
    columns = {name: np.array([row[name] for row in rows]).astype(DTYPES[name]) for name in names}
    return columns | {"terminals": np.arange(len(rows)) == len(rows) - 1}


def in_sight(cube: np.ndarray) -> bool:
    """Apply OGBench's rule for the scene: cube (T, 3) neither far right nor far left.

    In the drawer it may lie far left.
    """
    y = cube[:, 1]
    z = cube[:, 2]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return not ((y >= 0.29) | ((y <= -0.3) & ~in_drawer)).any()


# ---- errands that serve the task


def buttons_of(simulator) -> np.ndarray | None:
    """Return the states of the simulator's buttons, where it has some."""
    return vars(simulator).get("_cur_button_states")


def unmet(env: PlayEnv) -> np.ndarray:
    """Return which conditions of the goal do not hold now, by their numbers."""
    simulator = env.simulator
    return np.flatnonzero(~met(env.task.goal, simulator._data.qpos, buttons_of(simulator)))


def hand_out(env: PlayEnv, rng: np.random.Generator, p_stack: float, directed: bool) -> None:
    """Hand out a random errand; a directed one meets a condition of the goal.

    A condition is left out where the arm cannot meet it now. Without any, the random one stays.
    """
    env.simulator.set_new_target(return_info=False, p_stack=p_stack)
    if not directed:
        return
    errands = useful_errands(env)
    if errands:
        kind, index = errands[rng.integers(len(errands))]
        aim(env.simulator, env.task.goal, kind, index, rng)


def useful_errands(env: PlayEnv) -> list[tuple[str, int]]:
    """List the errands (kind, index) that meet a condition of the goal."""
    simulator = env.simulator
    goal = env.task.goal
    open_conditions = [condition(goal, number) for number in unmet(env)]
    cubes = [
        (kind, i)
        for kind, i in open_conditions
        if kind == "cube" and within_reach(simulator, i, len(goal.cubes))
    ]
    if env.task.name.startswith("puzzle"):
        presses = [("button", i) for i in lights_out(buttons_of(simulator), goal.buttons)]
    else:
        presses = [one for one in open_conditions if one[0] == "button"]
    if presses:  # buttons unlock drawer and window
        return cubes + presses
    return cubes + [one for one in open_conditions if one[0] in ("drawer", "window")]


def condition(goal, number: int) -> tuple[str, int]:
    """Name a condition of the goal by kind, and its index among those of its kind."""
    if number < len(goal.cubes):
        return "cube", number
    number -= len(goal.cubes)
    if number < len(goal.buttons):
        return "button", number
    return ("drawer", "window")[number - len(goal.buttons)], 0


def aim(simulator, goal, kind: str, index: int, rng: np.random.Generator) -> None:
    """Replace the simulator's errand."""
    simulator._target_task = kind
    if kind == "cube":
        mocap = simulator._cube_target_mocap_ids[index]
        turn = rng.uniform(0, np.pi)
        simulator._target_block = index
        simulator._data.mocap_pos[mocap] = goal.cubes[index]
        simulator._data.mocap_quat[mocap] = np.cos(turn), 0.0, 0.0, np.sin(turn)
    elif kind == "button":
        simulator._target_button = index
        simulator._target_button_states[index] = 1 - buttons_of(simulator)[index]
    elif kind == "drawer":
        simulator._target_drawer_pos = goal.slides[0]
        move_target(simulator, "drawer_handle_center_target", 1, goal.slides[0])
    else:
        simulator._target_window_pos = goal.slides[1]
        move_target(simulator, "window_handle_center_target", 0, goal.slides[1])


def move_target(simulator, site: str, axis: int, place: float) -> None:
    """Move the site that the oracle of a drawer or window reads."""
    import mujoco

    simulator._model.site(site).pos[axis] = place
    mujoco.mj_kinematics(simulator._model, simulator._data)


def within_reach(simulator, cube: int, cubes: int) -> bool:
    """Tell whether a cube lies neither under another nor in the drawer."""
    places = simulator._data.qpos[14 : 14 + 7 * cubes].reshape(cubes, 7)[:, :3]
    offset = places - places[cube]
    above = (np.linalg.norm(offset[:, :2], axis=1) < 0.03) & (offset[:, 2] > 0.02)
    in_drawer = hasattr(simulator, "_is_in_drawer") and simulator._is_in_drawer(places[cube])
    return not above.any() and not in_drawer


def lights_out(lights: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Solve a 3x3 Lights Out: the buttons to press, each once and in any order."""
    index = np.arange(9)
    row = np.abs(index[:, None] // 3 - index // 3)
    column = np.abs(index[:, None] % 3 - index % 3)
    toggles = (row + column <= 1).astype(int)  # (9, 9) a press toggles its button and neighbours
    presses = (np.arange(512)[:, None] >> index) & 1  # (512, 9) every set of presses
    solves = (presses @ toggles % 2 == np.bitwise_xor(lights, goal)).all(1)
    return np.flatnonzero(presses[solves.argmax()])  # a 3x3 board has exactly one solution
