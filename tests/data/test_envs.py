"""The environments: seeds, exact replay, the queue of actions, episode ends, evaluation."""

import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

import envs
from simulators import SimulatorEnv
from simulators.robosuite_env import RobosuiteEnv

pytestmark = pytest.mark.sim
ROOT = Path(envs.__file__).parent


@pytest.fixture(scope="module")
def env():
    env = envs.make_env("lift", seed=0)
    yield env
    env.close()


@pytest.fixture(autouse=True)
def restore_limit(request):
    yield
    if "env" in request.fixturenames:
        request.getfixturevalue("env").episode_limit = envs.TASKS["lift"].episode_limit


class PlainRobosuite(RobosuiteEnv):
    """robosuite as it comes."""

    patched = False


class RandomPolicy:
    """Uses its observation and its generator, so that a mix-up of either shows; picklable."""

    def __call__(self, obs, rng):
        assert obs.shape == (1, 19) and obs.dtype == np.float32
        return np.clip(rng.normal(size=(4, 7)) + obs[0, :7], -1, 1)


class FailingPolicy:
    def __call__(self, obs, rng):
        raise KeyError("no such weight")


class SeedEnv(gymnasium.Env):
    """Shows its episode's seed, for as many steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.episode_seed = seed
        self.left = seed
        return np.full(1, seed, np.float32), {}

    def step(self, action):
        time.sleep(0.01)
        self.left -= 1
        obs = np.full(1, self.episode_seed, np.float32)
        return obs, 1.0, False, self.left <= 0, {"success": False}


class DyingPolicy:
    """Dies in episode 2, as if the kernel had run out of memory; the others take a while."""

    def __call__(self, obs, rng):
        if obs[0, 0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((1, 1))


class StillPolicy:
    def __call__(self, obs, rng):
        return np.zeros((1, 1))


def grasp(obs):
    """A chunk of a minimal expert: over the cube, down, close, up."""
    error, width = obs[9:12] - obs[0:3], obs[7] - obs[8]
    if np.linalg.norm(error) < 0.015:
        lifting = width < 0.06
        return np.tile(np.array([0, 0, 1.0 * lifting, 0, 0, 0, 1]), (4, 1))
    over = np.array([0, 0, 0.1]) if np.linalg.norm(error[:2]) > 0.01 else np.zeros(3)
    return np.tile(np.concatenate([(error + over) / 0.05, np.zeros(3), [-1]]), (2, 1)).clip(-1, 1)


def chunk_of(value, steps=4):
    return lambda obs: np.full((steps, 7), value, np.float32)


def random_actions(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 7)).astype(np.float32)


def roll(env, seed, actions):
    observations = [env.reset(seed=seed)[0]]
    return np.array(observations + [env.step(action)[0] for action in actions])


# ---- the table of tasks --------------------------------------------------------------------------
def test_unknown_task_lists_the_tasks():
    with pytest.raises(ValueError, match="unknown task 'lfit'; tasks: lift, can, square, scene"):
        envs.make_env("lfit", 0)


def test_a_tasks_settings_win_over_the_presets():
    task = envs.Task(
        "x", "robosuite", "X", "", 1, 1, 7, paper={"clip": 1.0}, cpu={"clip": 2.0, "hidden": 3}
    )
    assert envs.settings(task, "paper") == {"episode_limit": 7, "clip": 1.0}
    cpu = envs.settings(task, "cpu")
    assert (cpu["clip"], cpu["hidden"]) == (2.0, 3)
    assert cpu["batch_size"] == envs.CPU["batch_size"]


@pytest.mark.parametrize("name", envs.TASKS)
def test_a_task_names_each_of_its_settings_once(name):
    """A reader of its block need not know what it would replace elsewhere."""
    task = envs.TASKS[name]
    assert task.name == name
    assert not envs.CPU.keys() & task.cpu.keys()
    assert {"online_learning_rate", "critic_learning_rate", "temperature"} <= task.cpu.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lift", "gpu"), "the preset is paper or cpu, got 'gpu'"),
        (("lift", "cpu", "offline"), "the setting is offline-to-online or online, got 'offline'"),
        (("lfit", "cpu"), "unknown task 'lfit'"),
    ],
)
def test_unknown_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        envs.settings(*arguments)


@pytest.mark.parametrize(
    "name, limit, demonstrations",
    [
        ("scene", 750, 1000),
        ("puzzle-3x3", 500, 1000),
        ("cube-double", 500, 1000),
        ("cube-triple", 1000, 3000),
    ],
)
def test_settings_are_the_papers(name, limit, demonstrations):
    offline = envs.settings(name, "paper")
    online = envs.settings(name, "paper", "online")
    table_2 = {"pretrain_steps": 0, "temperature": 0.1, "clip": 0.3}
    table_3 = {"pretrain_steps": 500_000, "temperature": 0.001, "clip": 0.15}
    assert online.items() >= table_2.items()
    assert (offline["episode_limit"], offline["demo_episodes"]) == (limit, demonstrations)  # Tab. I
    if name in ("scene", "puzzle-3x3"):
        assert offline.items() >= table_3.items()


def test_the_setting_online_changes_what_it_says():
    assert envs.settings("square", "paper")["clip"] == 0.08
    assert envs.settings("square", "paper", "online")["clip"] == 0.15
    ours = [envs.settings(name, "cpu", "online") for name in ("lift", "can", "scene")]
    assert [one.get("demo_share") for one in ours] == [None, 0.5, 0.5]
    assert [one["warmup_steps"] for one in ours] == [1000, 1000, 1000]


def test_envs_does_not_import_a_simulator():
    code = "import sys, envs; print({'robosuite', 'ogbench', 'mujoco', 'h5py'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == "set()\n"
    )


# ---- gymnasium's interface -----------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
def test_gymnasium_accepts_the_environment():
    from gymnasium.utils.env_checker import check_env

    check_env(envs.make_env("lift", 0, episode_limit=20), skip_render_check=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["can", "square"])
def test_other_robosuite_tasks_step_and_replay(task):
    from gymnasium.utils.env_checker import check_env

    env = envs.make_env(task, 3)
    check_env(env, skip_render_check=True)
    actions = random_actions(8)
    first = roll(env, 7, actions)
    assert first.shape == (9, envs.TASKS[task].obs_dim) and first.dtype == np.float32
    assert np.array_equal(first, roll(env, 7, actions)) and not np.array_equal(
        first[0], env.reset(seed=8)[0]
    )
    env.close()


def test_steps_without_gl_and_without_noise_on_the_terminal():
    code = (
        "import os, envs; env = envs.make_env('lift', 0); env.reset();"
        "env.step(env.action_space.sample());"
        "print(os.environ['MUJOCO_GL'])"
    )
    environ = {**os.environ, "MUJOCO_GL": "disable"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environ
    )
    assert (done.returncode, done.stdout) == (0, "disable\n"), done.stderr
    assert "robosuite" not in done.stderr


def test_render_without_render_mode_says_what_to_do(env):
    with pytest.raises(RuntimeError, match="render_mode='rgb_array'"):
        env.render()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_action_is_refused(env, bad):
    env.reset(seed=0)
    action = np.zeros(7)
    action[3] = bad
    with pytest.raises(ValueError, match="non-finite"):
        env.step(action)


def test_action_of_the_wrong_shape_is_refused(env):
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"takes actions of \(7,\), got \(6,\)"):
        env.step(np.zeros(6))


def test_a_simulator_gets_actions_in_range_and_every_episode_its_whole_limit():
    class Plain(SimulatorEnv):
        def _build(self, render, env_args):
            pass

        def _reset(self, seed):
            return np.zeros(19)

        def _advance(self, action):
            self.got = action
            return np.zeros(19), [False]

    env = Plain(envs.TASKS["lift"], episode_limit=2)
    env.reset(seed=0)
    assert not env.step(np.linspace(-3, 3, 7))[3] and np.array_equal(
        env.got, [-1, -1, -1, 0, 1, 1, 1]
    )
    env.reset(seed=0)
    assert [env.step(np.zeros(7))[3] for _ in range(2)] == [False, True]


# ---- seeds and exactness -------------------------------------------------------------------------
def test_reset_seed_decides_cube_and_arm(env):
    one, two, again = env.reset(seed=1)[0], env.reset(seed=2)[0], env.reset(seed=1)[0]
    assert np.array_equal(one, again)
    assert not np.allclose(one[:3], two[:3], atol=1e-4)  # the arm
    assert not np.allclose(one[9:12], two[9:12], atol=1e-4)  # the cube


def test_make_env_seeds_the_first_reset_and_the_rest_follows():
    first, second = envs.make_env("lift", seed=5), envs.make_env("lift", seed=5)
    stream = [first.reset()[0] for _ in range(3)]
    np.random.seed(123)
    assert all(np.array_equal(one, second.reset()[0]) for one in stream)
    assert np.array_equal(stream[0], first.reset(seed=5)[0]) and not np.array_equal(
        stream[0], stream[1]
    )
    first.close(), second.close()


def test_used_and_fresh_environment_agree_bitwise(env):
    actions = random_actions(60)
    for seed in range(3):  # wear it: contacts, gripper state, solver warm starts
        roll(env, seed, random_actions(50, seed))
    fresh = envs.make_env("lift", seed=99)
    assert np.array_equal(roll(env, 11, actions), roll(fresh, 11, actions))
    fresh.close()


def test_fresh_process_agrees_bitwise(env, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); import envs, numpy as np, test_envs as t;"
        "np.save(sys.argv[1], t.roll(envs.make_env('lift'), 4, t.random_actions(40)))"
    )
    path = tmp_path / "roll.npy"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)
    assert np.array_equal(np.load(path), roll(env, 4, random_actions(40)))


@pytest.mark.parametrize("task", ["lift", "can", "square"])
def test_trajectories_are_the_simulators_own(task):
    """Our speed patches change no bit of the physics, in the air or pressed on the table."""
    fast, plain = envs.make_env(task), PlainRobosuite(envs.TASKS[task])
    exact = slice(None)
    if task != "lift":
        exact = [*range(9), *range(16, 23)]  # for 9 to 15 see read_sensors_once_per_action
    air = np.random.default_rng(0).uniform(-1, 1, (20, 7))
    down = np.concatenate(
        [np.tile([0.0, 0, -1, 0, 0, 0, -1], (25, 1)), air * [1, 1, 0.2, 1, 1, 1, 1]]
    )
    for seed, actions in (0, air), (1, down), (0, down):
        ours, own = fast.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        for action in actions:
            assert np.array_equal(ours[exact], own[exact])
            ours, own = fast.step(action)[0], plain.step(action)[0]
            for name in ("qpos", "qvel", "ctrl", "qfrc_constraint"):
                assert np.array_equal(
                    *(getattr(one.simulator.sim.data, name) for one in (fast, plain))
                )
        assert np.array_equal(ours[exact], own[exact]) and np.abs(ours - own).max() < 0.01
    assert plain.simulator.sim.data.ncon > 0 and "_pre_action" not in vars(plain.simulator)
    assert "_pre_action" in vars(fast.simulator)  # it was the fast way
    fast.close(), plain.close()


OTHER_CONTROLLERS = [
    ({"lite_physics": False}, False),
    ({"kp": 80, "input_ref_frame": "base"}, True),
]


@pytest.mark.parametrize("controller, fast", OTHER_CONTROLLERS)
def test_a_files_other_controller_is_followed(env, controller, fast):
    """A recorded controller of another kind is left to robosuite; other gains are followed."""
    args = copy.deepcopy(env.env_args)
    args["env_kwargs"]["controller_configs"]["body_parts"]["right"] |= controller
    args["env_kwargs"] |= {"lite_physics": controller.get("lite_physics", True)}
    ours, plain = (
        envs.make_env("lift", env_args=args),
        PlainRobosuite(envs.TASKS["lift"], env_args=args),
    )
    actions = random_actions(15)
    assert np.array_equal(roll(ours, 3, actions), roll(plain, 3, actions))
    assert ("_pre_action" in vars(ours.simulator)) is fast
    ours.close(), plain.close()


def test_env_args_of_a_file_rebuild_the_same_world(env):
    import json

    rebuilt = envs.make_env("lift", env_args=json.loads(json.dumps(env.env_args)))
    assert np.array_equal(roll(env, 3, random_actions(10)), roll(rebuilt, 3, random_actions(10)))
    rebuilt.close()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"env_version": "1.4.1"}, "pip install robosuite==1.4.1"),
        ({"env_name": "Stack"}, "env_args are for Stack"),
        (
            {"env_kwargs": {"robots": "Panda", "gravity": 3}},
            "robosuite 1.5.* does not take these env_args: .*gravity",
        ),
    ],
)
def test_env_args_of_another_world_are_refused(env, change, message):
    with pytest.raises(ValueError, match=message):
        envs.make_env("lift", env_args={**env.env_args, **change})


# ---- episode ends --------------------------------------------------------------------------------
def test_success_terminates_and_pays_one(env):
    runner = envs.ChunkRunner(env, grasp)
    runner.reset(0)
    steps = []
    while not runner.ended:
        steps.append(runner.step())
    last = steps[-1]
    assert (last.terminated, last.truncated, last.success, last.reward) == (True, False, True, 1.0)
    assert not any(step.terminated or step.truncated or step.reward for step in steps[:-1])
    assert last.next_obs[11] > 0.839  # the cube's height, after the step


def test_limit_truncates_and_pays_nothing(env):
    env.episode_limit = 6
    runner = envs.ChunkRunner(env, chunk_of(0.0))
    runner.reset(0)
    ends = [runner.step() for _ in range(6)]
    assert [step.truncated for step in ends] == [False] * 5 + [True]
    assert not any(step.terminated or step.success or step.reward for step in ends)
    with pytest.raises(RuntimeError, match="reset"):
        runner.step()


def test_success_at_the_limit_is_terminal_not_truncated(env):
    runner = envs.ChunkRunner(env, grasp)
    runner.reset(0)
    while not runner.ended:
        runner.step()
    env.episode_limit = env.steps
    runner.reset(0)
    while not runner.ended:
        last = runner.step()
    assert last.terminated and not last.truncated


def test_episode_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="episode_limit"):
        envs.make_env("lift", episode_limit=0)


# ---- the queue of actions ------------------------------------------------------------------------
def test_policy_is_asked_once_per_chunk_and_executed_in_order(env):
    seen = []

    def act(obs):
        seen.append(obs)
        return np.arange(3)[:, None] / 10 * np.ones(7) + len(seen) / 100

    runner = envs.ChunkRunner(env, act)
    runner.reset(1)
    steps = [runner.step() for _ in range(7)]
    assert len(seen) == 3
    assert np.allclose(
        [step.action[0] for step in steps], [0.01, 0.11, 0.21, 0.02, 0.12, 0.22, 0.03]
    )
    assert all(np.array_equal(obs, steps[3 * index].obs) for index, obs in enumerate(seen))
    assert all(np.array_equal(one.next_obs, two.obs) for one, two in zip(steps, steps[1:]))


def test_reset_empties_the_queue(env):
    runner = envs.ChunkRunner(env, chunk_of(0.5))
    runner.reset(1)
    runner.step()
    runner.act = chunk_of(-0.5)
    runner.reset(2)
    assert runner.step().action[0] == -0.5


def test_a_chunk_is_not_a_view_of_the_policys_buffer(env):
    buffer = np.zeros((4, 7), np.float32)
    runner = envs.ChunkRunner(env, lambda obs: buffer)
    runner.reset(1)
    runner.step()
    buffer[:] = 1.0
    assert (runner.step().action == 0).all()


@pytest.mark.parametrize("shape", [(7,), (1, 4, 7), (4, 6), (0, 7)])
def test_chunk_of_the_wrong_shape_is_refused(env, shape):
    runner = envs.ChunkRunner(env, lambda obs: np.zeros(shape))
    runner.reset(1)
    with pytest.raises(ValueError, match=r"a chunk is \(H, 7\)"):
        runner.step()


def test_step_before_reset_is_refused(env):
    with pytest.raises(RuntimeError, match="reset"):
        envs.ChunkRunner(env, chunk_of(0.0)).step()


@pytest.mark.parametrize("executed", [0, 1, 4, 10])
def test_runner_resumes_exactly_in_another_environment(env, executed):
    generator = np.random.default_rng(0)
    runner = envs.ChunkRunner(env, lambda obs: generator.uniform(-1, 1, (4, 7)))
    runner.reset(None)  # the seed that the environment drew itself must be known
    for _ in range(executed):
        runner.step()
    state, noise = runner.state_dict(), generator.bit_generator.state
    expected = [runner.step() for _ in range(6)]
    generator.bit_generator.state = noise
    other = envs.make_env("lift", seed=77)
    resumed = envs.ChunkRunner(other, runner.act)
    resumed.load_state_dict(state)
    for one, two in zip(expected, [resumed.step() for _ in range(6)]):
        assert all(np.array_equal(a, b) for a, b in zip(one, two))
    other.close()


def test_a_runner_that_ended_or_never_began_resumes_as_such(env):
    fresh, ended = envs.ChunkRunner(env, chunk_of(0.0)), envs.ChunkRunner(env, chunk_of(0.0))
    ended.load_state_dict(fresh.state_dict())
    assert ended.ended and ended.seed is None
    env.episode_limit = 2
    ended.reset(3)
    ended.step(), ended.step()
    fresh.load_state_dict(ended.state_dict())
    assert fresh.ended and fresh.seed == 3


# ---- evaluation ----------------------------------------------------------------------------------
def same(one, two):
    return all(np.array_equal(getattr(one, key), getattr(two, key)) for key in vars(one))


def test_evaluation_does_not_depend_on_workers():
    with envs.Evaluator(lift_of_12_steps, workers=1) as evaluator:
        alone = evaluator.run(RandomPolicy(), 5, seed=50)
        later = evaluator.run(RandomPolicy(), 2, seed=53)
    assert list(alone.seed) == [50, 51, 52, 53, 54]
    assert list(alone.length) == [12] * 5
    assert list(later.seed) == [53, 54]
    with envs.Evaluator(lift_of_12_steps, workers=2) as pool:
        assert same(alone, pool.run(RandomPolicy(), 5, seed=50))
        for process in multiprocessing.active_children():
            # A cluster's scheduler signals the whole group; the parent answers.
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        assert same(later, pool.run(RandomPolicy(), 2, seed=53))


def test_a_policy_that_fails_is_one_error_and_the_pool_can_be_used_again():
    with envs.Evaluator(SeedEnv, workers=2) as pool:
        with pytest.raises(RuntimeError, match="worker failed: KeyError.*no such weight"):
            pool.run(FailingPolicy(), 3, seed=1)
        result = pool.run(StillPolicy(), 3, seed=1)
    assert list(result.seed) == list(result.length) == list(result.episode_return) == [1, 2, 3]


def test_a_worker_that_dies_is_one_error_that_names_memory_and_the_others_end():
    with envs.Evaluator(SeedEnv, workers=2) as pool:
        pool.run(StillPolicy(), 4, seed=10)
        before = multiprocessing.active_children()
        with pytest.raises(RuntimeError, match="worker died: out of memory .*__main__"):
            pool.run(DyingPolicy(), 40, seed=1)
        assert before and not any(process.is_alive() for process in before)
        assert list(pool.run(StillPolicy(), 2, seed=1).seed) == [1, 2]


def test_a_policy_that_cannot_be_pickled_is_refused_at_once():
    with envs.Evaluator(SeedEnv, workers=2) as pool:
        with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
            pool.run(lambda obs, rng: np.zeros((1, 1)), 3, seed=1)
        assert not multiprocessing.active_children()


def test_a_worker_that_cannot_build_its_environment_says_why():
    with (
        envs.Evaluator(no_environment, workers=2) as pool,
        pytest.raises(RuntimeError, match="worker failed: ValueError: no such world"),
    ):
        pool.run(StillPolicy(), 3, seed=0)


def lift_of_12_steps():
    return envs.make_env("lift", episode_limit=12)


def no_environment():
    raise ValueError("no such world")


POOL_SCRIPT = """
import multiprocessing, signal, time
import gymnasium, numpy, envs

class Env(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    episode_seed = 0
    def reset(self, seed=None):
        return numpy.zeros(1), {}
    def step(self, action):
        time.sleep(0.01)
        return numpy.zeros(1), 0.0, False, True, {"success": False}

class Policy:
    def __call__(self, obs, rng):
        return numpy.zeros((1, 1))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background may lack it
    pool = envs.Evaluator(Env, workers=2)
    while len(multiprocessing.active_children()) < 2:
        pool.run(Policy(), 8, 0)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    pool.run(Policy(), 20_000, 0)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_with_their_parent_and_in_silence(tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(POOL_SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "errors", "w") as errors:
        parent = subprocess.Popen(
            [sys.executable, str(script)],
            env=environ,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    workers = [Path("/proc") / pid for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    if name == "SIGINT":
        os.killpg(parent.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    else:
        os.kill(parent.pid, getattr(signal, name))
    parent.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)
    tracebacks = (tmp_path / "errors").read_text().count("Traceback")
    assert tracebacks == (1 if name == "SIGINT" else 0)  # the parent's own


def is_alive(process):
    try:
        return process.joinpath("stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_an_episodes_randomness_is_its_own(env):
    """Episode 53 is the same whether it comes first or later: paired comparisons need that."""
    env.episode_limit = 8
    alone = observations_of_an_episode(env, 53)
    observations_of_an_episode(env, 51)
    assert np.array_equal(alone, observations_of_an_episode(env, 53))
    drawn = []

    def draw(obs, rng):
        drawn.append(rng.random())
        return np.zeros((1, 7))

    env.episode_limit = 1
    for seed in (51, 53):
        envs.run_episode(draw, env, seed)
    placing = [np.random.default_rng(seed).random() for seed in (51, 53)]
    assert len({*drawn, *placing}) == 4  # nor is it the stream that places the objects


def observations_of_an_episode(env, seed):
    rows = []
    envs.run_episode(RandomPolicy(), env, seed, on_step=lambda step: rows.append(step.next_obs))
    return np.array(rows)


def test_evaluate_counts_successes_and_stops_at_the_first():
    result = envs.evaluate(lambda obs, rng: grasp(obs[0]), "lift", 2, seed=0)
    assert (
        result.success.all() and (result.episode_return == 1).all() and (result.length < 100).all()
    )


def test_interval_is_wilsons():
    result = envs.EvalResult(np.arange(60), np.arange(60) < 52, np.ones(60), np.ones(60))
    assert result.success_rate == pytest.approx(52 / 60)
    assert result.interval == pytest.approx(
        (0.7583, 0.9308), abs=2e-4
    )  # statsmodels: proportion_confint "wilson"
    assert str(result) == "87% [76, 93] of 60"
    none = envs.EvalResult(np.arange(10), np.zeros(10, bool), np.ones(10), np.zeros(10))
    assert none.interval == pytest.approx((0.0, 0.2775), abs=2e-4)


def test_evaluation_of_no_episode_is_refused():
    with pytest.raises(ValueError, match="at least one episode"):
        envs.evaluate(RandomPolicy(), "lift", 0, seed=0)


def test_a_simulator_leaves_blas_one_thread_and_torch_its_own():
    """For a 6 by 6 system a second thread of numpy's only waits, and rounds differently."""
    before = torch.get_num_threads()
    with threadpool_limits(2, "blas"):
        assert any(
            pool["num_threads"] == 2 for pool in threadpool_info() if pool["user_api"] == "blas"
        )
        envs.make_env("lift").close()
        assert {
            pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"
        } == {1}
    assert torch.get_num_threads() == before
