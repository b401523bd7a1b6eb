"""The table of tasks, their environments, open-loop chunks and evaluation (Tables I-III).

    import envs
    env = envs.make_env("lift", seed=0)               # or a gymnasium id: "my_module:PointMass-v0"
    result = envs.evaluate(policy, "lift", episodes=50, seed=1000)
    # policy(obs (1, D), rng) -> chunk (H, A)

The first environment takes 4 s (simulator import). Then one core makes 290 to 1,060 steps/s.
Episodes are never padded; environments never reset themselves.
Not here: the simulators (simulators/), policies, replay, demonstrations, training seeds.

Shapes: D observation, A action, H chunk, T steps of an episode, E evaluation episodes, C conditions
of a goal.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

import simulators
from logbook import wilson
from simulators import Goal, gym_env

ROBOMIMIC_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


@dataclass(frozen=True)
class Task:
    """One row of the table. `paper` and `cpu` are its training settings under these presets."""

    name: str
    suite: str  # which simulator: robosuite, ogbench or gymnasium
    env_name: str  # the simulator's own name
    description: str
    obs_dim: int
    action_dim: int
    episode_limit: int | None  # steps after which an episode is truncated; None: has to be given
    obs_keys: tuple[str, ...] = ()  # robomimic's names, in order
    obs_sizes: tuple[int, ...] = ()
    goal: Goal | None = None  # of OGBench's tasks
    counts: bool = False  # the reward is minus the number of unmet conditions, not 1 when all hold
    success_key: str | None = None  # of a gymnasium task's info; None: success or is_success
    action_low: tuple[float, ...] = ()  # a gymnasium task's own units, which are [-1, 1] here
    action_high: tuple[float, ...] = ()
    paper: dict[str, Any] = field(default_factory=dict)
    paper_online: dict[str, Any] = field(default_factory=dict)  # what --setting online changes
    cpu: dict[str, Any] = field(default_factory=dict)
    cpu_online: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> int:
        """C, the number of conditions of the goal; 1 for a plain success."""
        return sum(map(len, self.goal)) if self.goal else 1

    def reward(self, met: np.ndarray) -> np.ndarray:
        """Reward a step by what holds after it: met (..., C) bool -> (...).

        The one reward function, of rollouts, demonstrations and files.
        """
        met = np.atleast_1d(met)
        if met.shape[-1] != self.conditions:
            raise ValueError(
                f"task '{self.name}' has a goal of {self.conditions} conditions, "
                f"got {met.shape[-1]}"
            )
        if self.counts:
            return met.sum(-1) - float(self.conditions)
        return met.all(-1) * 1.0

    def unit_actions(self, actions: np.ndarray) -> np.ndarray:
        """Turn actions (..., A) in the environment's own units into [-1, 1]."""
        if not self.action_low:
            return np.asarray(actions)
        return gym_env.to_unit(actions, np.array(self.action_low), np.array(self.action_high))


# What the `cpu` preset sets for every task, beside the task's own block; no key stands in both. All
# of it is ours: the same method with less work, so that two cores finish in minutes. The `paper`
# preset's common values (Sec. V-A1, Tables II-III) are the defaults of the training scripts.
CPU = {
    "hidden": 256,
    "layers": 3,
    "flow_steps": 5,
    "batch_size": 128,
    "num_candidates": 16,
    "threads": min(2, os.cpu_count() or 1),
    "clip": 0.6,
    "policy_tau": 0.005,
    "eval_episodes": 50,
    "log_every": 250,
    "save_every": 2500,
}

# The table. clip is from digests of the paper and the authors' code. Lift and the cubes appear only
# in Table II: their pre-training steps in Table III's setting are ours, and so is every cpu block.
# On long tasks the critic's errors decide: hence pessimism, five heads, acting from the posterior.
TASKS: dict[str, Task] = {
    "lift": Task(
        name="lift",
        suite="robosuite",
        env_name="Lift",
        description="a Panda arm lifts a cube 4 cm off the table",
        obs_dim=19,
        action_dim=7,
        episode_limit=300,
        obs_keys=ROBOMIMIC_KEYS,
        obs_sizes=(3, 4, 2, 10),
        paper={"demo_episodes": 300},
        paper_online={"temperature": 0.001, "clip": 0.15},
        cpu={
            "episode_limit": 100,
            "pretrain_steps": 5000,
            "warmup_steps": 1000,
            "online_steps": 15_000,
            "eval_every": 3000,
            "capacity": 8000,
            "online_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "reward_offset": -0.01,
            "temperature": 0.01,
        },
    ),
    "can": Task(
        name="can",
        suite="robosuite",
        env_name="PickPlaceCan",
        description="a Panda arm bins a can",
        obs_dim=23,
        action_dim=7,
        episode_limit=300,
        obs_keys=ROBOMIMIC_KEYS,
        obs_sizes=(3, 4, 2, 14),
        paper={"demo_episodes": 300, "pretrain_steps": 100_000, "clip": 0.3},
        paper_online={"temperature": 0.001, "clip": 0.15},
        cpu={
            "episode_limit": 200,
            "demo_episodes": 50,
            "pretrain_steps": 10_000,
            "warmup_steps": 5000,
            "online_steps": 20_000,
            "eval_every": 5000,
            "capacity": 100_000,
            "online_learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "act": "posterior",
            "heads": 5,
            "pessimism": 1.0,
            "tau": 0.02,
            "reward_offset": -0.01,
            "temperature": 0.01,
        },
        cpu_online={"warmup_steps": 1000, "demo_share": 0.5},
    ),
    "square": Task(
        name="square",
        suite="robosuite",
        env_name="NutAssemblySquare",
        description="a Panda arm puts a nut on its peg",
        obs_dim=23,
        action_dim=7,
        episode_limit=400,
        obs_keys=ROBOMIMIC_KEYS,
        obs_sizes=(3, 4, 2, 14),
        paper={
            "demo_episodes": 300,
            "pretrain_steps": 500_000,
            "temperature": 0.001,
            "clip": 0.08,
        },
        paper_online={"temperature": 0.001, "clip": 0.15},
        cpu={
            "episode_limit": 250,
            "demo_episodes": 200,
            "pretrain_steps": 60_000,
            "learning_rate": 1e-3,
            "warmup_steps": 10_000,
            "online_steps": 50_000,
            "updates_per_step": 0.25,
            "demo_share": 0.5,
            "eval_every": 12_500,
            "capacity": 100_000,
            "online_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "act": "posterior",
            "heads": 5,
            "pessimism": 1.0,
            "tau": 0.02,
            "reward_offset": -0.01,
            "temperature": 0.01,
        },
        cpu_online={"warmup_steps": 1000, "demo_share": 0.5},
    ),
    "scene": Task(
        name="scene",
        suite="ogbench",
        env_name="scene-singletask-task1-v0",
        description="a UR5e arm opens a drawer and a window, everything else stays as it is",
        obs_dim=40,
        action_dim=5,
        episode_limit=750,
        goal=Goal(cubes=((0.35, 0.05, 0.02),), buttons=(1, 1), slides=(-0.16, 0.2)),
        paper={
            "demo_episodes": 1000,
            "pretrain_steps": 500_000,
            "temperature": 0.001,
            "clip": 0.15,
        },
        paper_online={"temperature": 0.1, "clip": 0.3},
        cpu={
            "episode_limit": 200,
            "demo_episodes": 50,
            "directed": True,
            "pretrain_steps": 10_000,
            "warmup_steps": 5000,
            "online_steps": 20_000,
            "eval_every": 5000,
            "capacity": 100_000,
            "online_learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "act": "posterior",
            "heads": 5,
            "pessimism": 1.0,
            "tau": 0.02,
            "reward_offset": -0.01,
            "temperature": 0.01,
        },
        cpu_online={"warmup_steps": 1000, "demo_share": 0.5},
    ),
    "puzzle-3x3": Task(
        name="puzzle-3x3",
        suite="ogbench",
        env_name="puzzle-3x3-singletask-task1-v0",
        description="a UR5e arm solves Lights Out in two presses",
        obs_dim=55,
        action_dim=5,
        episode_limit=500,
        goal=Goal(buttons=(1, 1, 0, 1, 0, 1, 0, 1, 1)),
        paper={
            "demo_episodes": 1000,
            "pretrain_steps": 500_000,
            "temperature": 0.001,
            "clip": 0.15,
        },
        paper_online={"temperature": 0.1, "clip": 0.3},
        cpu={
            "episode_limit": 100,
            "demo_episodes": 10,
            "directed": True,
            "pretrain_steps": 10_000,
            "warmup_steps": 5000,
            "online_steps": 20_000,
            "eval_every": 5000,
            "capacity": 100_000,
            "online_learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "act": "posterior",
            "heads": 5,
            "pessimism": 1.0,
            "tau": 0.02,
            "reward_offset": -0.01,
            "temperature": 0.01,
        },
        cpu_online={"warmup_steps": 1000, "demo_share": 0.5},
    ),
    "cube-double": Task(
        name="cube-double",
        suite="ogbench",
        env_name="cube-double-singletask-task1-v0",
        description="a UR5e arm moves one of two cubes",
        obs_dim=37,
        action_dim=5,
        episode_limit=500,
        goal=Goal(cubes=((0.425, 0.0, 0.02), (0.425, 0.1, 0.02))),
        counts=True,
        paper={
            "demo_episodes": 1000,
            "pretrain_steps": 500_000,
            "temperature": 0.1,
            "clip": 0.3,
        },
        paper_online={"temperature": 0.1, "clip": 0.3},
        cpu={
            "episode_limit": 100,
            "demo_episodes": 50,
            "directed": True,
            "pretrain_steps": 10_000,
            "warmup_steps": 5000,
            "online_steps": 20_000,
            "eval_every": 5000,
            "capacity": 100_000,
            "online_learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "act": "posterior",
            "heads": 5,
            "pessimism": 1.0,
            "tau": 0.02,
            "reward_offset": 0.0,
            "temperature": 0.3,
        },
        cpu_online={"warmup_steps": 1000, "demo_share": 0.5},
    ),
    "cube-triple": Task(
        name="cube-triple",
        suite="ogbench",
        env_name="cube-triple-singletask-task1-v0",
        description="a UR5e arm moves one of three cubes",
        obs_dim=46,
        action_dim=5,
        episode_limit=1000,
        goal=Goal(cubes=((0.35, -0.1, 0.02), (0.35, 0.1, 0.02), (0.5, 0.1, 0.02))),
        counts=True,
        paper={
            "demo_episodes": 3000,
            "pretrain_steps": 500_000,
            "temperature": 0.1,
            "clip": 0.3,
        },
        paper_online={"temperature": 0.1, "clip": 0.3},
        cpu={
            "episode_limit": 100,
            "demo_episodes": 50,
            "directed": True,
            "pretrain_steps": 10_000,
            "warmup_steps": 5000,
            "online_steps": 20_000,
            "demo_share": 0.5,
            "eval_every": 5000,
            "capacity": 100_000,
            "online_learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "act": "posterior",
            "heads": 5,
            "pessimism": 1.0,
            "tau": 0.02,
            "reward_offset": 0.0,
            "temperature": 0.3,
        },
        cpu_online={"warmup_steps": 1000, "demo_share": 0.5},
    ),
}


# What a gymnasium task starts from, per preset; set temperature and clip first (docs). They suit
# rewards between 0 and 1 per episode; where rewards are larger, so should the temperature be.
GYM_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 0.1, "clip": 0.3},
    "cpu": {
        "pretrain_steps": 5000,
        "warmup_steps": 1000,
        "online_steps": 15_000,
        "eval_every": 3000,
        "capacity": 100_000,
        "online_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "act": "posterior",
        "heads": 5,
        "pessimism": 1.0,
        "tau": 0.02,
        "reward_offset": 0.0,
        "temperature": 0.03,
    },
}


def get_task(task: str | Task, success_key: str | None = None) -> Task:
    """Return a row of the table, or make one for a gymnasium id ("module:Id-v0" imports module).

    success_key names the entry of a gymnasium environment's info that says whether an episode has
    succeeded. Raises ValueError for an unknown name, and for spaces that are not vectors.
    """
    if isinstance(task, Task):
        return task
    if task in TASKS:
        return TASKS[task]
    return _gym_task(task, success_key)


@functools.cache
def _gym_task(name: str, success_key: str | None) -> Task:
    try:
        sizes = gym_env.describe(name)
    except gym_env.NotMade as error:
        if "-v" in name or ":" in name:
            raise
        raise ValueError(
            f"unknown task '{name}'; tasks: {', '.join(TASKS)}; a gymnasium id works too, such as "
            "Reacher-v5 or my_module:MyEnv-v0"
        ) from error
    return Task(
        name=name,
        suite="gymnasium",
        env_name=name,
        description=f"gymnasium's {name}",
        success_key=success_key,
        paper=GYM_DEFAULTS["paper"],
        cpu=GYM_DEFAULTS["cpu"],
        **sizes,
    )


def settings(task: str | Task, preset: str, setting: str = "offline-to-online") -> dict[str, Any]:
    """Return what a preset ("paper" or "cpu") sets of the training scripts' arguments.

    setting is "offline-to-online" (Table III), or "online" (Table II: demonstrations in the replay,
    no pre-training). Raises ValueError for another preset or setting.
    """
    task = get_task(task)
    if preset == "paper":
        values = {"episode_limit": task.episode_limit} | task.paper
        online = task.paper_online
    elif preset == "cpu":
        values = {"episode_limit": task.episode_limit} | CPU | task.cpu
        online = task.cpu_online
    else:
        raise ValueError(f"the preset is paper or cpu, got '{preset}'")
    if setting == "online":
        return values | online | {"pretrain_steps": 0}
    if setting != "offline-to-online":
        raise ValueError(f"the setting is offline-to-online or online, got '{setting}'")
    return values


def make_env(
    task: str | Task,
    seed: int | None = None,
    render_mode: str | None = None,
    episode_limit: int | None = None,
    env_args: dict | None = None,
) -> gymnasium.Env:
    """Build a task's environment.

    seed is that of the first reset(). env_args is the JSON of a robomimic file, where data comes
    from one.
    """
    return simulators.make(get_task(task), seed, render_mode, episode_limit, env_args)


# ---- chunks, open loop ---------------------------------------------------------------------------


class Transition(NamedTuple):
    obs: np.ndarray  # (D,)
    action: np.ndarray  # (A,)
    reward: float
    next_obs: np.ndarray  # (D,)
    terminated: bool
    truncated: bool
    success: bool


class ChunkRunner:
    """Executes chunks open loop. It holds the only queue of pending actions.

    act(obs (D,)) -> chunk (H, A) is called once per chunk.
    """

    def __init__(self, env: gymnasium.Env, act: Callable[[np.ndarray], np.ndarray]):
        self.env = env
        self.act = act
        self._forget()

    def _forget(self) -> None:
        self.obs = None
        self.first_obs = None
        self.seed = None
        self.ended = True
        self._queue = []
        self._executed = []

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Begin an episode; what is left of an old chunk belongs to another state."""
        self._forget()
        self.obs, _ = self.env.reset(seed=seed)
        self.first_obs = self.obs
        self.seed = self.env.unwrapped.episode_seed
        self.ended = False
        return self.obs

    def step(self) -> Transition:
        """Execute the next action, of a new chunk where none is pending."""
        if self.ended:
            raise RuntimeError("the episode has ended or has not begun: call reset(seed) first")
        if not self._queue:
            self._queue = self._new_chunk()
        return self._execute(self._queue.pop(0))

    def _new_chunk(self) -> list[np.ndarray]:
        chunk = np.asarray(self.act(self.obs), dtype=np.float32)  # (H, A)
        size = self.env.action_space.shape
        if chunk.ndim != 2 or len(chunk) < 1 or chunk.shape[1:] != size:
            raise ValueError(f"a chunk is (H, {size[0]}), the policy returned {chunk.shape}")
        return list(chunk.copy())

    def _execute(self, action: np.ndarray) -> Transition:
        obs = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self._executed.append(action)
        self.ended = terminated or truncated
        return Transition(obs, action, reward, self.obs, terminated, truncated, info["success"])

    def state_dict(self) -> dict[str, Any]:
        """Return seed and actions: the simulator is deterministic, so they are its state."""
        size = self.env.action_space.shape
        return {
            "seed": self.seed,
            "first_obs": self.first_obs,  # (D,); this and the next tell whether it really is
            "obs": self.obs,
            "actions": np.array(self._executed, np.float32).reshape(-1, *size),  # (T, A)
            "pending": np.array(self._queue, np.float32).reshape(-1, *size),  # (k, A)
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Play the episode again up to where `state_dict` was taken.

        Returns False, and begins another episode, where the environment is not a function of seed
        and actions: its observations are not those it gave before.
        """
        if state["seed"] is None:  # saved before the first reset
            self._forget()
            return True
        self.reset(int(state["seed"]))
        if _about_equal(self.obs, state["first_obs"]) and self._replay(state):
            self._queue = list(np.array(state["pending"], np.float32))
            return True
        print(
            "the environment is not a function of seed and actions: the interrupted episode "
            "cannot be continued, another begins",
            file=sys.stderr,
        )
        self.reset()
        return False

    def _replay(self, state: dict[str, Any]) -> bool:
        for action in np.asarray(state["actions"], np.float32):
            move = self._execute(action)
            if self.ended and len(self._executed) < len(state["actions"]):
                return move.truncated  # by a limit lower than before, which the caller sees
        return _about_equal(self.obs, state["obs"])

    def close(self) -> None:
        self.env.close()


def _about_equal(obs: np.ndarray, recorded: Any) -> bool:
    """Compare two observations; another machine may round differently."""
    return np.allclose(obs, np.asarray(recorded), rtol=1e-4, atol=1e-4)


# ---- evaluation ----------------------------------------------------------------------------------

Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # obs (1, D), rng -> chunk (H, A)


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
        """The 95 % Wilson interval of the success rate."""
        return wilson(int(self.success.sum()), len(self.success))

    def __str__(self) -> str:
        """Say the success rate, and the mean return where nothing succeeded but returns differ."""
        low, high = self.interval
        count = len(self.success)
        text = f"{100 * self.success_rate:.0f}% [{100 * low:.0f}, {100 * high:.0f}] of {count}"
        if not self.success.any() and np.ptp(self.episode_return) > 0:
            text += f", mean return {self.episode_return.mean():.4g}"
        return text


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: faster for a batch of 1, and the same actions on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_episode(
    policy: Policy,
    env: gymnasium.Env,
    seed: int,
    on_step: Callable[[Transition], None] | None = None,
) -> tuple[int, bool, int, float]:
    """Play one full episode: seed, success, length and return.

    The policy's generator is the episode's own, so episodes can be spread over processes.
    """
    rng = np.random.default_rng([seed, 1])  # not the stream that places the objects
    runner = ChunkRunner(env, lambda obs: policy(obs[None], rng))
    runner.reset(seed)
    length = 0
    episode_return = 0.0
    success = False
    while not runner.ended:
        move = runner.step()
        length += 1
        episode_return += move.reward
        success = success or move.success
        if on_step is not None:
            on_step(move)
    return seed, success, length, episode_return


class Evaluator:
    """Evaluates policies again and again, in this process or in a pool; a context manager.

    make_env() builds an environment. With workers > 1 it and the policies must be picklable. The
    episodes are bitwise the same however many workers play them.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env], workers: int = 1):
        self.make_env = make_env
        self.workers = workers
        self._env = None
        self._pool = None

    def run(self, policy: Policy, episodes: int, seed: int) -> EvalResult:
        """Play exactly `episodes` full episodes with reset seeds seed, seed + 1, ...

        Raises RuntimeError if a worker fails or dies; the next run starts new ones.
        """
        if episodes < 1:
            raise ValueError(f"evaluation needs at least one episode, got {episodes}")
        seeds = range(seed, seed + episodes)
        if self.workers > 1:
            rows = self._run_in_pool(policy, seeds)
        else:
            rows = self._run_here(policy, seeds)
        return EvalResult(*(np.array(column) for column in zip(*rows)))

    def _run_here(self, policy, seeds):
        if self._env is None:
            self._env = self.make_env()
        with one_thread():
            return [run_episode(policy, self._env, one) for one in seeds]

    def _run_in_pool(self, policy, seeds):
        pickled = pickle.dumps(policy)  # once, not once per episode
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),  # fork would copy torch's locked threads
                initializer=_start_worker,
                initargs=(self.make_env,),
            )
        try:
            with _signals_held():  # what starts here inherits it: the parent handles them
                rows = self._pool.map(_worker_episode, itertools.repeat(pickled), seeds)
            return list(rows)
        except BrokenProcessPool as error:
            for process in self._pool._processes.values():
                process.kill()  # the pool's own SIGTERM is held
            self.close()
            raise RuntimeError(
                "an evaluation worker died: out of memory (try --workers 1), or the main script "
                "lacks its `if __name__ == '__main__':` guard"
            ) from error
        except Exception as error:
            self.close()
            raise RuntimeError(
                f"an evaluation worker failed: {type(error).__name__}: {error}"
            ) from error
        except BaseException:
            self.close()  # Ctrl-C: drop the episodes that have not begun
            raise

    def close(self) -> None:
        """End the workers, after the episodes they are playing, and close the environment."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._env is not None:
            self._env.close()
            self._env = None

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM meanwhile; processes started meanwhile never receive them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_make_env = None
_worker_env = None  # each worker process has one environment


def _start_worker(make_env):
    global _worker_make_env

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker_make_env = make_env


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _worker_episode(pickled_policy, seed):
    global _worker_env

    if _worker_env is None:  # here, so that its errors reach the parent
        _worker_env = _worker_make_env()
    policy = pickle.loads(pickled_policy)  # it comes from our own parent
    return run_episode(policy, _worker_env, seed)


def evaluate(
    policy: Policy,
    task: str | Task,
    episodes: int,
    seed: int,
    workers: int = 1,
    episode_limit: int | None = None,
    env_args: dict | None = None,
) -> EvalResult:
    """Play `episodes` full episodes of a task. With workers > 1 the policy must be picklable."""
    build = functools.partial(
        make_env, get_task(task), episode_limit=episode_limit, env_args=env_args
    )
    with Evaluator(build, workers) as evaluator:
        return evaluator.run(policy, episodes, seed)


def record(
    policy: Policy,
    make_env: Callable[..., gymnasium.Env],
    path: str | Path,
    episodes: int = 1,
    seed: int = 0,
) -> None:
    """Write an mp4 of full episodes; make_env is called with render_mode="rgb_array"."""
    try:
        import imageio_ffmpeg  # noqa: F401
        from imageio import get_writer
    except ImportError as error:
        raise ImportError("videos need ffmpeg: pip install imageio imageio-ffmpeg") from error
    with contextlib.closing(make_env(render_mode="rgb_array")) as env:
        writer = get_writer(path, fps=env.metadata["render_fps"])
        with writer, one_thread():
            for one in range(seed, seed + episodes):
                run_episode(policy, env, one, on_step=lambda _: writer.append_data(env.render()))
