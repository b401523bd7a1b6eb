"""
The task table, one gymnasium environment per task, open-loop chunk execution, and evaluation (paper, section V-A1).

    import envs
    env = envs.make_env("lift", seed=0)
    result = envs.evaluate(policy, "lift", episodes=50, seed=1000)      # policy(obs (1, D), rng) -> chunk (H, A)

One core: the first environment takes 4 s (simulator import), then 290 to 1,060 steps/s (benchmarks/speed-cpu.json).
Shapes: D observation, A action, H chunk (paper: T), T steps of an episode, E evaluation episodes, C goal conditions.
Not here: policies, replay, demonstrations, training seeds. Nothing is ever padded or auto-reset. What robosuite draws
while it builds a model (the size of Lift's cube) is fixed; positions, angles and the arm's first pose are the seed's.
"""
from __future__ import annotations

import atexit
import contextlib
import ctypes.util
import importlib
import logging
import multiprocessing.connection
import os
import pickle
import signal
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple

import gymnasium
import numpy as np
from threadpoolctl import threadpool_limits

ROBOMIMIC_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


class Goal(NamedTuple):  # the C conditions of an OGBench goal
    cubes: tuple = ()  # positions (x, y, z) in metres
    buttons: tuple = ()  # states, 0 or 1
    slides: tuple = ()  # drawer and window, in metres


@dataclass(frozen=True)
class Task:
    """One row of the task table: `paper` and `cpu` hold what training changes for it, `online` is Table II's column."""

    name: str
    suite: str  # which builder in SUITES makes the environment
    env_name: str  # the suite's own name
    obs_dim: int
    action_dim: int
    episode_limit: int  # steps after which an episode is truncated
    obs_keys: tuple[str, ...]  # robomimic's names and order
    obs_sizes: tuple[int, ...]
    description: str
    paper: dict = field(default_factory=dict)
    cpu: dict = field(default_factory=dict)
    online: dict = field(default_factory=dict)
    goal: Goal | None = None
    counts: bool = False  # the reward is minus the number of conditions that do not hold, not 1 when all do

    @property
    def conditions(self) -> int:
        return sum(map(len, self.goal)) if self.goal else 1  # C

    def reward(self, met) -> np.ndarray:
        """The one reward function, of rollouts, demonstrations and files: a step is paid by what holds after it.
        met (..., C) bool, where C = 1 also a plain success -> reward (...).
        """
        met = np.atleast_1d(met)
        if met.shape[-1] != self.conditions:
            raise ValueError(f"task '{self.name}' has a goal of {self.conditions} conditions, got {met.shape[-1]}")
        return met.sum(-1) - float(self.conditions) if self.counts else met.all(-1) * 1.0

    def met(self, qpos, buttons=None) -> np.ndarray:
        """Which conditions of an OGBench goal hold, by OGBench's rule: within 4 cm, or the same button state.
        qpos (..., joints): 14 of the arm, 7 per cube, 1 per button, the slides; buttons (..., n) -> (..., C) bool
        """
        goal, slides = self.goal, qpos[..., qpos.shape[-1] - len(self.goal.slides) :]
        cubes = [qpos[..., 14 + 7 * i : 17 + 7 * i] - cube for i, cube in enumerate(goal.cubes)]
        met = [np.linalg.norm(offset, axis=-1) <= 0.04 for offset in cubes]
        met += [buttons[..., i] == state for i, state in enumerate(goal.buttons)]
        met += [np.abs(slides[..., i] - place) <= 0.04 for i, place in enumerate(goal.slides)]
        return np.stack(met, axis=-1)


def _robosuite_task(name, env_name, size, episode_limit, description, cpu=None, **paper) -> Task:
    return Task(name, "robosuite", env_name, 9 + size, 7, episode_limit, ROBOMIMIC_KEYS, (3, 4, 2, size), description,
                {"demo_episodes": 300} | paper, cpu or {}, dict(temperature=0.001, clip=0.15))


def _ogbench_task(name, obs_dim, episode_limit, description, goal, paper, cpu, counts=False) -> Task:
    return Task(name, "ogbench", f"{name}-singletask-task1-v0", obs_dim, 5, episode_limit, (), (), description,
                {"demo_episodes": 1000} | paper, cpu, dict(temperature=0.1, clip=0.3), goal, counts)


# Tables I and III, `clip` from digests and the authors' code; Lift and the cubes were online only: Table II and, ours,
# pre-training steps. `cpu` is ours: the critic's errors decide long tasks, hence pessimism and the posterior acting.
_BINARY = dict(pretrain_steps=500_000, temperature=0.001, clip=0.15)
_COUNT = dict(pretrain_steps=500_000, temperature=0.1, clip=0.3)
_HARD = dict(act="posterior", heads=5, pessimism=1.0, tau=0.02, warmup_steps=5000, online_steps=20_000,
             eval_every=5000, capacity=100_000, demo_episodes=50, pretrain_steps=10_000, online_learning_rate=3e-4)
_CPU = _HARD | dict(directed=True)
_CPU_COUNT = _CPU | dict(reward_offset=0.0, temperature=0.3)
TASKS: dict[str, Task] = {task.name: task for task in (
    _robosuite_task("lift", "Lift", 10, 300, "a Panda arm lifts a cube 4 cm off the table"),
    _robosuite_task("can", "PickPlaceCan", 14, 300, "a Panda arm bins a can", _HARD | dict(episode_limit=200),
                    pretrain_steps=100_000, clip=0.3),
    _robosuite_task("square", "NutAssemblySquare", 14, 400, "a Panda arm puts a nut on its peg", _HARD | dict(
        episode_limit=250, demo_episodes=200, pretrain_steps=60_000, learning_rate=1e-3, updates_per_step=0.25,
        online_learning_rate=1e-3, demo_share=0.5, warmup_steps=10_000, online_steps=50_000, eval_every=12_500),
        **_BINARY | {"clip": 0.08}),
    _ogbench_task("scene", 40, 750, "a UR5e arm opens a drawer and a window, everything else stays as it is",
                  Goal(((0.35, 0.05, 0.02),), (1, 1), (-0.16, 0.2)), _BINARY, _CPU | dict(episode_limit=200)),
    _ogbench_task("puzzle-3x3", 55, 500, "a UR5e arm solves Lights Out in two presses",
                  Goal(buttons=(1, 1, 0, 1, 0, 1, 0, 1, 1)), _BINARY, _CPU | dict(demo_episodes=10)),
    _ogbench_task("cube-double", 37, 500, "a UR5e arm moves one of two cubes",
                  Goal(((0.425, 0.0, 0.02), (0.425, 0.1, 0.02))), _COUNT, _CPU_COUNT, True),
    _ogbench_task("cube-triple", 46, 1000, "a UR5e arm moves one of three cubes",
                  Goal(((0.35, -0.1, 0.02), (0.35, 0.1, 0.02), (0.5, 0.1, 0.02))),
                  _COUNT | {"demo_episodes": 3000}, _CPU_COUNT | dict(demo_share=0.5), True),
)}


# What every task of a preset shares. paper: Sec. V-A1 and Tables II-III, `Args` of the training scripts hold those
# values already. cpu (ours): the same method with less work, so that two cores finish in minutes.
PRESETS = {"paper": {}, "cpu": dict(
    hidden=256, layers=3, flow_steps=5, batch_size=128, online_learning_rate=1e-3, num_candidates=16,
    threads=min(2, os.cpu_count() or 1), pretrain_steps=5000, warmup_steps=1000, online_steps=15_000, capacity=8000,
    episode_limit=100, reward_offset=-0.01, temperature=0.01, clip=0.6, policy_tau=0.005, eval_every=3000,
    eval_episodes=50, log_every=250, save_every=2500, num_envs=5, rollout_chunks=60, value_hidden=64, value_layers=1)}


def settings(task: str | Task, preset: str, setting: str = "offline-to-online") -> dict[str, Any]:
    """The training scripts' arguments. Setting "online": Table II, demonstrations in the replay, no pre-training."""
    task = get_task(task)
    ours = dict(warmup_steps=1000, demo_share=0.5) if task.cpu else {}  # Lift does without
    online = {"pretrain_steps": 0} | (task.online if preset == "paper" else ours)
    changes = {"offline-to-online": {}, "online": online}[setting]
    return {"episode_limit": task.episode_limit} | PRESETS[preset] | getattr(task, preset) | changes


def get_task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}'; tasks: {', '.join(TASKS)}")
    return TASKS[task]


# ---------------------------------------------------------------------------------------- one environment
class SimulatorEnv(gymnasium.Env):
    """
    What every task shares. Terminates at the first success, truncates at the limit. An episode is a function of (reset
    seed, actions): bitwise, in a fresh environment or a used one. A suite adds _build, _reset, _advance and _draw.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: Task, seed=None, render_mode=None, episode_limit=None, env_args=None):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is None or 'rgb_array', got {render_mode!r}")
        self.task, self.render_mode = task, render_mode
        self.episode_limit = task.episode_limit if episode_limit is None else int(episode_limit)
        if self.episode_limit < 1:
            raise ValueError(f"episode_limit must be at least 1, got {episode_limit}")
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (task.action_dim,), np.float32)
        self._first_seed, self.episode_seed, self.steps = seed, None, 0
        try:
            self._build(render_mode is not None, env_args)
        except Exception as error:
            if render_mode is None or isinstance(error, (ModuleNotFoundError, ValueError)):
                raise
            raise RuntimeError(f"cannot render, OpenGL did not start ({error}); training and evaluation need none, for "
                               "videos install a software renderer: apt-get install libegl1 libgl1-mesa-dri") from error

    def reset(self, *, seed=None, options=None):
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        super().reset(seed=seed)
        self.episode_seed, self.steps = int(self.np_random.integers(2**31) if seed is None else seed), 0
        return self._reset(self.episode_seed).astype(np.float32), {"success": False}

    def step(self, action):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(f"task '{self.task.name}' takes actions of {self.action_space.shape}, got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"action has non-finite values at step {self.steps}: {action}; check the policy's output")
        obs, met = self._advance(np.clip(action, -1.0, 1.0))
        self.steps += 1
        success = bool(np.all(met))
        truncated = self.steps >= self.episode_limit and not success
        return obs.astype(np.float32), float(self.task.reward(met)), success, truncated, {"success": success}

    def render(self):
        if self.render_mode is None:
            raise RuntimeError("this environment draws nothing; use make_env(task, seed, render_mode='rgb_array')")
        return self._draw()

    def close(self):
        self.simulator.close()


def _import(module: str, render: bool):
    """Imports a simulator without its start-up warnings and without a display, unless something is to be drawn."""
    if render and os.environ.get("MUJOCO_GL") not in ("egl", "osmesa", "cgl"):
        os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "osmesa"
    chosen, previous = os.environ.setdefault("MUJOCO_GL", "disable"), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        simulator = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the simulator is missing ({error}): make .venv/ready") from error
    finally:
        logging.disable(previous)
        os.environ["MUJOCO_GL"] = chosen  # robosuite overwrites it with egl, which worker processes would inherit
    if render and not hasattr(opengl := importlib.import_module("mujoco.gl_context"), "GLContext"):
        importlib.reload(opengl)  # it was imported when nothing was to be drawn
    # numpy's BLAS, not torch's: to solve for 6 joints it would wake every core, slow where they are busy, and round
    # differently from one machine to another.
    threadpool_limits(1, "blas")
    return simulator


class RobosuiteEnv(SimulatorEnv):
    """A robosuite task with robomimic's low-dimensional observation."""

    def _build(self, render, env_args):
        robosuite = _import("robosuite", render)
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        version = robosuite.__version__
        if env_args is None:  # robomimic's world
            body = robosuite.load_composite_controller_config(controller="BASIC")["body_parts"]["right"]
            controller = {"type": "BASIC", "body_parts": {"right": {**body, "input_ref_frame": "world"}}}
            env_args = {"env_name": self.task.env_name, "env_version": version, "type": 1, "env_kwargs": {
                "robots": "Panda", "controller_configs": controller, "control_freq": 20}}
        name, recorded = env_args.get("env_name"), str(env_args.get("env_version", ""))
        if name != self.task.env_name:
            raise ValueError(f"task '{self.task.name}' is {self.task.env_name}, these env_args are for {name}")
        if recorded.split(".")[:2] != version.split(".")[:2]:
            raise ValueError(f"the data was recorded with robosuite {recorded or 'unknown'}, installed is {version}; "
                             f"the controllers differ: pip install robosuite=={recorded or version}")
        kwargs = env_args["env_kwargs"] | dict(
            has_renderer=False, has_offscreen_renderer=render, use_camera_obs=False, use_object_obs=True,
            reward_shaping=False, ignore_done=True,
            hard_reset=False,  # a hard reset rebuilds the model: 0.15 s instead of 1 ms
            seed=0,  # of the model only (see the header); reset() seeds the episodes
        )
        try:
            self.simulator = robosuite.make(self.task.env_name, **kwargs)
        except TypeError as error:
            raise ValueError(f"robosuite {version} does not take these env_args: {error}") from error
        self.env_args = {"env_name": name, "type": 1, "env_version": version, "env_kwargs": kwargs}
        self._read_sensors_once_per_step()

    def _read_sensors_once_per_step(self):
        # robosuite polls all its sensors at each of the 25 physics steps of an action and keeps the last reading.
        # Reading only ours, only then, gives bitwise the same observation at up to twice the speed. (Can and Square:
        # relative poses take the object where it was read last, one action ago here and 24 physics steps there.)
        simulator, wanted = self.simulator, set(self.task.obs_keys)
        simulator.sim.model._model.vis.global_.bvactive = 0  # see OGBenchEnv._reset
        for name, observable in simulator._observables.items():
            if name not in wanted and observable.modality != "object":
                observable.set_enabled(False)
        read = simulator._update_observables
        simulator._update_observables = lambda force=False: read(force=True) if force else None

    def _read_arm_directly(self):
        # The control law stays robosuite's, but what it reads, by name and several times per physics step, comes here
        # straight from MuJoCo: bitwise the same, nearly twice as fast again. A reset makes new controllers.
        import mujoco
        simulator, (robot,) = self.simulator, self.simulator.robots
        arm, model, data = robot.part_controllers["right"], simulator.sim.model._model, simulator.sim.data._data
        if type(arm).__name__ != "OperationalSpaceController" or arm.num_ref_sites != 1 or not arm.lite_physics:
            return  # a file's controller may be another
        site, joints, motors = model.site(arm.ref_name).id, arm.qvel_index, robot._ref_actuators_indexes_dict["right"]
        jacobian, inertia, limits = np.zeros((6, model.nv)), np.zeros((model.nv, model.nv)), model.actuator_ctrlrange
        low, high = limits[motors].T
        update, base, still = arm.update, f"{arm.naming_prefix}{arm.part_name}_center", np.zeros(3)

        def update_directly(force=False):
            if force or not arm.new_update:
                return update(force)
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
            mujoco.mj_fullM(model, inertia, data.qM)
            arm.ref_pos[:], arm.ref_ori_mat[:] = data.site_xpos[site], data.site_xmat[site].reshape(3, 3)
            arm.ref_pos_vel[:], arm.ref_ori_vel[:] = np.dot(jacobian[:3], data.qvel), np.dot(jacobian[3:], data.qvel)
            arm.J_full[:] = jacobian[:, joints]
            arm.J_pos[:], arm.J_ori[:] = arm.J_full[:3], arm.J_full[3:]
            arm.joint_pos, arm.joint_vel = data.qpos[arm.qpos_index], data.qvel[joints]
            arm.mass_matrix, arm.new_update = inertia[joints][:, joints], False

        def pre_action(action, policy_step=False):
            if policy_step:  # new goals; the gripper's command then stays for the rest of the action
                robot.control(action, True)
            else:
                data.ctrl[motors] = np.clip(arm.run_controller(), low, high)

        arm.update, simulator._pre_action = update_directly, pre_action
        for name in ("get_site_xvelp", "get_site_xvelr"):  # the base is bolted down
            read = getattr(type(simulator.sim.data), name).__get__(simulator.sim.data)
            setattr(simulator.sim.data, name, lambda one, read=read: still if one == base else read(one))

    def _observation(self, readings: dict) -> np.ndarray:
        keys = ("object-state" if key == "object" else key for key in self.task.obs_keys)
        return np.concatenate([readings[key] for key in keys]).astype(np.float32)  # (D,)

    def _reset(self, seed):
        generator = np.random.default_rng(seed)
        self.simulator.rng = generator  # draws the arm's first pose
        placement = self.simulator.placement_initializer
        for sampler in (placement, *getattr(placement, "samplers", {}).values()):
            sampler.rng = generator  # robosuite gave each sampler its own reference when it built the model
        readings = self.simulator.reset()
        self._read_arm_directly()
        return self._observation(readings)

    def _advance(self, action):
        self.simulator.step(action)
        readings = self.simulator._get_observations(force_update=True)
        return self._observation(readings), [bool(self.simulator._check_success())]

    def _draw(self):
        return self.simulator.sim.render(camera_name="agentview", width=512, height=512)[::-1]


class OGBenchEnv(SimulatorEnv):
    """Task 1 of a domain; OGBench's own single-task environments pay for the state before a step, this one after it."""

    def _build(self, render, env_args, **options):
        if env_args is not None:
            raise ValueError(f"task '{self.task.name}' takes no env_args: those belong to robomimic files")
        _import("ogbench.manipspace", render)
        self.simulator = gymnasium.make(self.task.env_name, disable_env_checker=True, success_timing="post", width=512,
                                        height=512, **options).unwrapped
        self._read_state_once_per_step()
        if render:
            self._reset(0)
            self._draw()  # if OpenGL does not start, it is here

    def _read_state_once_per_step(self):
        # OGBench reads its whole state three times in a step. Once per state gives bitwise the same observation, 15%
        # faster. `forget` is for a reading that must change while the state does not.
        simulator, cache, read = self.simulator, {}, self.simulator.compute_ob_info

        def read_once():
            state = simulator._data.time, simulator._data.qpos.tobytes()
            if cache.get("state") != state:
                cache.update(state=state, reading=read())
            return cache["reading"]

        simulator.compute_ob_info, simulator.forget = read_once, cache.clear

    def _reset(self, seed):
        import mujoco
        simulator = self.simulator
        with warnings.catch_warnings(action="ignore"):  # about the precision of its own spaces
            simulator.reset(seed=seed)
        # For a viewer MuJoCo clears a byte per bounding volume at each physics step, 370 kB (see benchmarks/README.md).
        simulator._model.vis.global_.bvactive = 0
        # OGBench visits the goal by a few unseeded random actions first. Their traces in the solver must not stay.
        data = simulator._data
        kept = {name: getattr(data, name).copy() for name in ("qpos", "mocap_pos", "mocap_quat")}
        mujoco.mj_resetData(simulator._model, data)
        for name, value in kept.items():
            getattr(data, name)[:] = value
        mujoco.mj_forward(simulator._model, data)
        simulator.forget()
        return simulator.compute_observation()

    def _advance(self, action):
        obs = self.simulator.step(action)[0]
        return obs, self.task.met(self.simulator._data.qpos, getattr(self.simulator, "_cur_button_states", None))

    def _draw(self):
        return self.simulator.render()

    def close(self):
        if self.simulator._renderer is not None:  # OGBench leaves it to the interpreter's end, when OpenGL has gone
            self.simulator._renderer.close()
        super().close()


SUITES: dict[str, Callable[..., gymnasium.Env]] = {"robosuite": RobosuiteEnv, "ogbench": OGBenchEnv}


def make_env(task, seed=None, render_mode=None, episode_limit=None, env_args=None) -> gymnasium.Env:
    """`seed` is that of the first reset(); `env_args` the JSON of a robomimic file, if data comes from one."""
    task = get_task(task)
    return SUITES[task.suite](task, seed, render_mode, episode_limit, env_args)


# --------------------------------------------------------------------------------------- chunks, open loop
Transition = namedtuple("Transition", "obs action reward next_obs terminated truncated success")  # (D,) (A,) () ...


class ChunkRunner:
    """Executes chunks open loop and holds the only queue of pending actions. act: obs (D,) -> chunk (H, A)."""

    def __init__(self, env: gymnasium.Env, act: Callable[[np.ndarray], np.ndarray]):
        self.env, self.act = env, act
        self.obs, self.seed, self.ended, self._queue, self._actions = None, None, True, [], []

    def reset(self, seed: int | None = None) -> np.ndarray:
        self._queue, self._actions = [], []  # what is left of an old chunk belongs to another state
        self.obs, _ = self.env.reset(seed=seed)
        self.seed, self.ended = self.env.unwrapped.episode_seed, False
        return self.obs

    def step(self) -> Transition:
        if self.ended:
            raise RuntimeError("the episode has ended or has not begun: call ChunkRunner.reset(seed) before step()")
        if not self._queue:
            chunk = np.asarray(self.act(self.obs), dtype=np.float32)  # (H, A)
            if chunk.ndim != 2 or chunk.shape[0] < 1 or chunk.shape[1:] != self.env.action_space.shape:
                raise ValueError(f"a chunk is (H, {self.env.action_space.shape[0]}), the policy returned {chunk.shape}")
            self._queue = list(chunk.copy())
        return self._execute(self._queue.pop(0))

    def _execute(self, action: np.ndarray) -> Transition:
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(action)
        self.ended = terminated or truncated
        return Transition(obs, action, reward, self.obs, terminated, truncated, info["success"])

    def state_dict(self) -> dict[str, Any]:
        """The simulator is deterministic, so the seed and the actions are its state: no solver internals are saved."""
        executed, pending = (np.array(rows, np.float32).reshape(-1, *self.env.action_space.shape)
                             for rows in (self._actions, self._queue))  # (T, A), (k, A)
        return {"seed": self.seed, "actions": executed, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] is None:  # saved before the first reset
            return self.__init__(self.env, self.act)
        self.reset(int(state["seed"]))
        for action in np.asarray(state["actions"], np.float32):
            self._execute(action)
        self._queue = list(np.array(state["pending"], np.float32))


# -------------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class EvalResult:
    """One entry per episode, in the order of the seeds."""

    seed: np.ndarray  # (E,)
    success: np.ndarray  # (E,) bool
    length: np.ndarray  # (E,) steps
    episode_return: np.ndarray  # (E,) undiscounted

    @property
    def success_rate(self) -> float:
        return float(self.success.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the success rate; unlike the normal one it is right at 0% and 100%."""
        z, n, p = 1.959964, len(self.success), self.success_rate
        centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return tuple(float(np.clip((centre + side * half) / (1 + z * z / n), 0.0, 1.0)) for side in (-1, 1))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.success_rate:.0f}% [{100 * low:.0f}, {100 * high:.0f}] of {len(self.success)}"


@contextlib.contextmanager
def _one_thread():
    """Batch-1 policies are faster on one thread, and give bitwise the same actions however many workers there are."""
    set_threads = getattr(sys.modules.get("torch"), "set_num_threads", lambda _: None)
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1
    set_threads(1)
    try:
        yield
    finally:
        set_threads(threads)


def run_episode(policy, env: gymnasium.Env, seed: int, on_step: Callable | None = None) -> tuple[int, bool, int, float]:
    """One full episode. The policy's generator is the episode's own, so episodes can be spread over processes."""
    generator = np.random.default_rng([seed, 1])  # [seed, 1]: not the stream that places the objects
    runner = ChunkRunner(env, lambda obs: policy(obs[None], generator))
    runner.reset(seed)
    length, episode_return, success = 0, 0.0, False
    while not runner.ended:
        step = runner.step()
        length, episode_return, success = length + 1, episode_return + step.reward, success or step.success
        if on_step is not None:
            on_step(step)
    return seed, success, length, episode_return


def _worker(connection, env_options: dict) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):  # the parent's to answer; it closes the pipe, which ends this loop
        signal.signal(one, signal.SIG_IGN)
    env = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            policy, seed = connection.recv()
            try:
                env = env or make_env(**env_options)
                with _one_thread():
                    connection.send(run_episode(pickle.loads(policy), env, seed))  # from our own parent's pipe
            except Exception as error:
                connection.send(f"{type(error).__name__}: {error}")


class Evaluator(contextlib.AbstractContextManager):
    """A pool of processes, each with one environment, for repeated evaluation. `workers=1` stays in this process."""

    def __init__(self, task, workers: int = 1, episode_limit: int | None = None, env_args: dict | None = None):
        self.workers = workers
        self._options = dict(task=get_task(task), episode_limit=episode_limit, env_args=env_args)
        self._env, self._pool = None, []

    def run(self, policy, episodes: int, seed: int) -> EvalResult:
        """Exactly `episodes` full episodes with reset seeds seed, seed + 1, ..."""
        if episodes < 1:
            raise ValueError(f"evaluation needs at least one episode, got {episodes}")
        seeds = list(range(seed, seed + episodes))
        if self.workers > 1:
            rows = self._run_pool(policy, seeds)
        else:
            self._env = self._env or make_env(**self._options)
            with _one_thread():
                rows = [run_episode(policy, self._env, one) for one in seeds]
        return EvalResult(*(np.array(column) for column in zip(*sorted(rows))))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy torch's locked thread pools
        for _ in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, self._options), daemon=True)
            process.start()
            atexit.register(process.kill)  # multiprocessing would send SIGTERM
            theirs.close()  # so that a worker's death shows as the end of the pipe
            self._pool.append((process, ours))

    def _run_pool(self, policy, seeds: list[int]) -> list:
        payload = pickle.dumps(policy)
        try:
            if not self._pool:
                self._start()
            waiting, rows, busy = list(seeds), [], [connection for _, connection in self._pool[: len(seeds)]]
            for connection in busy:
                connection.send((payload, waiting.pop(0)))
            while busy:
                for connection in multiprocessing.connection.wait(busy):
                    answer = connection.recv()
                    if isinstance(answer, str):
                        raise RuntimeError(f"an evaluation worker failed: {answer}")
                    rows.append(answer)
                    if waiting:
                        connection.send((payload, waiting.pop(0)))
                    else:
                        busy.remove(connection)
            return rows
        except BaseException as error:
            self.close()  # answers to an interrupted call must not be read by the next one
            if isinstance(error, (EOFError, BrokenPipeError, ConnectionResetError)):
                raise RuntimeError("an evaluation worker died: out of memory (try workers=1), or the main script lacks "
                                   "its `if __name__ == '__main__':` guard") from error
            raise

    def close(self) -> None:
        for process, connection in self._pool:
            connection.close()
            process.kill()
            process.join()
        self._pool = []
        if self._env is not None:
            self._env.close()
            self._env = None

    def __exit__(self, *_):
        self.close()


def evaluate(policy, task, episodes, seed, workers=1, episode_limit=None, env_args=None) -> EvalResult:
    """policy(obs (1, D) float32, rng: np.random.Generator) -> chunk (H, A); with workers > 1 it must be picklable."""
    with Evaluator(task, workers, episode_limit, env_args) as evaluator:
        return evaluator.run(policy, episodes, seed)


def record(policy, task, path, episodes=1, seed=0, episode_limit=None, env_args=None) -> None:
    """Writes an mp4 of full episodes."""
    try:
        import imageio_ffmpeg  # noqa: F401
        from imageio import get_writer
    except ImportError as error:
        raise ImportError("videos need ffmpeg: pip install imageio imageio-ffmpeg") from error
    env = make_env(task, render_mode="rgb_array", episode_limit=episode_limit, env_args=env_args)
    with get_writer(path, fps=env.metadata["render_fps"]) as writer, _one_thread():
        for one in range(seed, seed + episodes):
            run_episode(policy, env, one, on_step=lambda _: writer.append_data(env.render()))
    env.close()
