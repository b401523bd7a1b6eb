"""OGBench: the four tasks and the one reward rule. Its play data: tests/data."""
import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

import envs

pytest.importorskip("ogbench")
pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore:.*precision lowered")]
TASKS = ("scene", "puzzle-3x3", "cube-double", "cube-triple")
_cache = {}


@pytest.fixture(params=TASKS)
def env(request):
    if request.param not in _cache:
        _cache[request.param] = envs.make_env(request.param)
    _cache[request.param].episode_limit = envs.TASKS[request.param].episode_limit
    return _cache[request.param]


def actions_of(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 5)).astype(np.float32)


def roll(env, seed, actions):
    observations = [env.reset(seed=seed)[0]]
    return np.array(observations + [env.step(action)[0] for action in actions])


def physics(env):
    """All that MuJoCo's next step depends on, solver warm start included."""
    import mujoco

    state = np.zeros(mujoco.mj_stateSize(env.simulator._model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(env.simulator._model, env.simulator._data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return state


def set_state(env, qpos, buttons):
    """Put OGBench's own environment into a state; its buttons are part of it."""
    simulator = env.simulator
    extra = () if buttons is None else (np.array(buttons),)
    simulator.set_state(np.array(qpos, np.float64), np.zeros(simulator._model.nv), *extra)


def solved_state(env):
    """A state (qpos, buttons) that meets every condition of the task."""
    goal, qpos = env.task.goal, env.simulator._data.qpos.copy()
    for index, cube in enumerate(goal.cubes):
        qpos[14 + 7 * index : 17 + 7 * index] = cube
    if goal.slides:
        qpos[-2:] = goal.slides
    return qpos, np.array(goal.buttons) if goal.buttons else None


# -------------------------------------------------------------------------------------------- the environments
def test_observations_and_resets_are_exact_in_a_used_and_a_fresh_environment(env):
    actions = actions_of(25)
    used = [roll(env, seed, actions_of(9, seed)) for seed in range(2)] and roll(env, 7, actions)
    assert used.shape == (26, env.task.obs_dim) and used.dtype == np.float32
    fresh = envs.make_env(env.task)
    assert np.array_equal(used, roll(fresh, 7, actions))
    assert not np.array_equal(used[0], fresh.reset(seed=8)[0])
    env.reset(seed=8)
    assert np.array_equal(physics(env), physics(fresh)) and env.simulator._data.time == 0
    fresh.close()


@pytest.mark.filterwarnings("ignore")
def test_gymnasium_accepts_the_environment(env):
    from gymnasium.utils.env_checker import check_env

    env.episode_limit = 20
    check_env(env, skip_render_check=True)


def test_reading_the_state_once_changes_no_observation(env):
    """The cache must not change a bit of what OGBench itself would have returned."""
    reading = env.simulator.compute_ob_info
    rolls = []
    for read in (reading, type(env.simulator).compute_ob_info.__get__(env.simulator)):
        env.simulator.compute_ob_info = read
        env.reset(seed=3)
        rolls.append([env.simulator.step(action)[0] for action in actions_of(12)])
    env.simulator.compute_ob_info = reading
    assert np.array_equal(*rolls) and len(np.unique(np.array(rolls[0]), axis=0)) == 12


def test_the_goal_is_ogbenchs_task_1(env):
    env.reset(seed=0)
    simulator, goal = env.simulator, env.task.goal
    assert simulator.cur_task_id == 1 and simulator.cur_task_info["task_name"].startswith("task1")
    assert simulator._success_timing == "post"
    assert np.allclose(simulator._data.mocap_pos, np.reshape(goal.cubes, (-1, 3)))
    assert list(getattr(simulator, "_target_button_states", ())) == list(goal.buttons)
    if goal.slides:
        assert goal.slides == (simulator._target_drawer_pos, simulator._target_window_pos)


def test_conditions_and_reward_agree_with_ogbench_on_constructed_states(env):
    """From the solved state each condition is broken alone, by a little more and a little less than the 4 cm."""
    env.reset(seed=0)
    task, (solved, pressed) = env.task, solved_state(env)
    states = [(solved, pressed)]
    for index in range(len(task.goal.cubes)):
        for distance in (0.039, 0.041, -0.041):
            for axis in range(3):
                states.append((solved.copy(), pressed))
                states[-1][0][14 + 7 * index + axis] += distance
    for index in range(len(task.goal.buttons)):
        states.append((solved, pressed.copy()))
        states[-1][1][index] ^= 1
    for index, sign in ((-2, 1), (-1, -1)) * bool(task.goal.slides):
        for distance in (0.039, 0.041):
            states.append((solved.copy(), pressed))
            states[-1][0][index] += sign * distance
    unmet = []
    for qpos, buttons in states:
        set_state(env, qpos, buttons)
        met = task.met(qpos, buttons)
        unmet.append(task.conditions - met.sum())
        assert env.simulator.compute_reward() == -unmet[-1]
        assert task.reward(met) == (-unmet[-1] if task.counts else float(unmet[-1] == 0))
    assert unmet[0] == 0 and set(unmet) == {0, 1}
    batch = None if pressed is None else np.array([state[1] for state in states])
    assert np.array_equal(task.met(np.array([state[0] for state in states]), batch).sum(-1),
                          task.conditions - np.array(unmet))


@pytest.mark.parametrize("task, before", [("cube-double", -1.0), ("cube-triple", -1.0)])
def test_success_and_reward_belong_to_the_state_after_the_step(task, before):
    """A cube let go just above its goal: the step during which it gets near enough is the one that is paid."""
    env = _cache.get(task) or envs.make_env(task)
    env.episode_limit = 50
    env.reset(seed=0)
    qpos, _ = solved_state(env)
    qpos[16] += 0.07
    set_state(env, qpos, None)
    assert env.task.reward(env.task.met(env.simulator._data.qpos)) == before
    for _ in range(10):
        assert not env.task.met(env.simulator._data.qpos).all()
        _, reward, terminated, truncated, info = env.step(np.array([0, 0, 1, 0, -1.0]))
        solved = bool(env.task.met(env.simulator._data.qpos).all())
        assert (terminated, info["success"], env.simulator._success) == (solved, solved, solved)
        assert reward == (0.0 if solved else before) and not truncated
        if terminated:
            return
    raise AssertionError("the cube did not fall into its goal")


def test_an_episodes_return_is_the_sum_of_its_rewards():
    env, rewards = _cache.get("cube-double") or envs.make_env("cube-double"), []
    env.episode_limit = 4
    _, success, length, total = envs.run_episode(lambda *_: np.zeros((3, 5)), env, 2,
                                                 on_step=lambda step: rewards.append(step.reward))
    assert length == len(rewards) == 4 and total == sum(rewards) <= -4 and not success


def test_binary_tasks_pay_only_the_whole_goal():
    for name in ("scene", "puzzle-3x3"):
        task = envs.TASKS[name]
        met = np.ones((2, task.conditions), bool)
        met[0, -1] = False
        assert list(task.reward(met)) == [0.0, 1.0]
    assert list(envs.TASKS["cube-triple"].reward([[0, 0, 0], [1, 0, 1], [1, 1, 1]])) == [-3.0, -1.0, 0.0]
    assert envs.TASKS["lift"].reward(True) == 1.0 and envs.TASKS["lift"].reward(False) == 0.0
    with pytest.raises(ValueError, match="goal of 2 conditions, got 1"):
        envs.TASKS["cube-double"].reward(True)


def test_a_runner_resumes_exactly_in_another_environment(env):
    generator = np.random.default_rng(0)
    runner = envs.ChunkRunner(env, lambda obs: generator.uniform(-1, 1, (4, 5)))
    runner.reset(5)
    for _ in range(6):
        runner.step()
    state, noise = runner.state_dict(), generator.bit_generator.state
    expected = [runner.step() for _ in range(6)]
    generator.bit_generator.state = noise
    other = envs.make_env(env.task, seed=9)
    resumed = envs.ChunkRunner(other, runner.act)
    resumed.load_state_dict(state)
    for one, two in zip(expected, [resumed.step() for _ in range(6)]):
        assert all(np.array_equal(a, b) for a, b in zip(one, two))
    other.close()


def test_env_args_are_refused(env):
    with pytest.raises(ValueError, match=f"task '{env.task.name}' takes no env_args"):
        envs.make_env(env.task, env_args={"env_name": "Lift"})


def test_settings_are_the_papers():
    for name in TASKS:
        offline, online = (envs.settings(name, "paper", setting) for setting in ("offline-to-online", "online"))
        assert (online["pretrain_steps"], online["temperature"], online["clip"]) == (0, 0.1, 0.3)  # Table II
        assert offline["episode_limit"] == {"scene": 750, "puzzle-3x3": 500, "cube-double": 500}.get(name, 1000)
        assert offline["demo_episodes"] == (3000 if name == "cube-triple" else 1000)  # Table I
        if name in ("scene", "puzzle-3x3"):  # Table III
            assert [offline[key] for key in ("pretrain_steps", "temperature", "clip")] == [500_000, 0.001, 0.15]
    assert envs.settings("square", "paper", "online")["clip"] == 0.15 != envs.settings("square", "paper")["clip"]
    ours = {name: envs.settings(name, "cpu", "online") for name in ("lift", "can", "scene")}
    assert [one.get("demo_share") for one in ours.values()] == [None, 0.5, 0.5]
    assert [one["warmup_steps"] for one in ours.values()] == [1000, 1000, 1000]
    with pytest.raises(KeyError):
        envs.settings("scene", "cpu", "offline")


def _draws(code):
    """What a program of its own prints, and what it complains about until its very end."""
    root, environ = Path(envs.__file__).parent, {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environ)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not (find_library("EGL") or find_library("OSMesa")), reason="no OpenGL here")
@pytest.mark.parametrize("before", ["", "envs.make_env('cube-double', 0).reset();"])
def test_rendering_works_also_where_mujoco_was_imported_without_opengl(before):
    code = (
        f"import envs; {before} env = envs.make_env('cube-double', 0, 'rgb_array');"
        "env.reset(); frame = env.render(); print(frame.shape, frame.std() > 10)"
    )
    _, printed, complaints = _draws(code)
    assert (printed, complaints) == ("(512, 512, 3) True\n", ""), complaints


@pytest.mark.skipif(not (find_library("EGL") or find_library("OSMesa")), reason="no OpenGL here")
def test_a_video_is_written_and_the_program_ends_in_silence(tmp_path):
    """A renderer that is left to the interpreter's end fails there, in two tracebacks."""
    code = f"import numpy as np, envs; path = {str(tmp_path / 'video.mp4')!r}\n"
    code += "envs.record(lambda obs, rng: np.zeros((5, 5)), 'cube-double', path, episode_limit=3)"
    returned, _, complaints = _draws(code)
    assert (returned, complaints) == (0, "") and (tmp_path / "video.mp4").stat().st_size > 1000
