"""OGBench: the four environments and the one reward rule. Its play data: test_play.py."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

import envs
from simulators.ogbench_env import met

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
    mujoco.mj_getState(
        env.simulator._model, env.simulator._data, state, mujoco.mjtState.mjSTATE_INTEGRATION
    )
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


def test_observations_and_resets_are_exact_in_a_used_and_a_fresh_environment(env):
    actions = actions_of(25)
    for seed in range(2):
        roll(env, seed, actions_of(9, seed))
    used = roll(env, 7, actions)
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
    """Our reader must not change a bit of what OGBench itself would have returned."""
    simulator = env.simulator
    rolls = []
    for read in (env.reader.compute_ob_info, env.reader.read):
        simulator.compute_ob_info = read
        env.reset(seed=3)
        rolls.append([simulator.step(action)[0] for action in actions_of(12)])
    simulator.compute_ob_info = env.reader.compute_ob_info
    assert env.reader.read.__func__ is type(simulator).compute_ob_info
    assert np.array_equal(*rolls)
    assert len(np.unique(np.array(rolls[0]), axis=0)) == 12


def test_a_reading_is_made_once_per_state_and_again_when_it_is_forgotten(env):
    env.reset(seed=3)
    first = env.simulator.compute_ob_info()
    assert env.simulator.compute_ob_info() is first
    env.reader.forget()
    assert env.simulator.compute_ob_info() is not first
    env.step(np.zeros(5))
    assert not np.array_equal(env.simulator.compute_ob_info()["qpos"], first["qpos"])


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
    """Each condition of the solved state is broken alone, a little less and more than by 4 cm."""
    env.reset(seed=0)
    task = env.task
    solved, pressed = solved_state(env)
    states = [(solved, pressed)]
    for index in range(len(task.goal.cubes)):
        for distance in (0.039, 0.041, -0.041):
            for axis in range(3):
                states.append((solved.copy(), pressed))
                states[-1][0][14 + 7 * index + axis] += distance
    for index in range(len(task.goal.buttons)):
        states.append((solved, pressed.copy()))
        states[-1][1][index] ^= 1
    if task.goal.slides:
        for index, offset in ((-2, 0.039), (-2, 0.041), (-1, -0.039), (-1, -0.041)):
            states.append((solved.copy(), pressed))
            states[-1][0][index] += offset
    unmet = []
    for qpos, buttons in states:
        set_state(env, qpos, buttons)
        holds = met(task.goal, qpos, buttons)
        unmet.append(task.conditions - holds.sum())
        assert env.simulator.compute_reward() == -unmet[-1]
        assert task.reward(holds) == (-unmet[-1] if task.counts else float(unmet[-1] == 0))
    assert unmet[0] == 0 and set(unmet) == {0, 1}
    positions = np.array([qpos for qpos, _ in states])
    buttons = None if pressed is None else np.array([buttons for _, buttons in states])
    together = met(task.goal, positions, buttons)
    assert np.array_equal(together.sum(-1), task.conditions - np.array(unmet))


@pytest.mark.parametrize("task, before", [("cube-double", -1.0), ("cube-triple", -1.0)])
def test_success_and_reward_belong_to_the_state_after_the_step(task, before):
    """A cube is let go just above its goal: the step that brings it near enough is paid."""
    env = _cache.get(task) or envs.make_env(task)
    env.episode_limit = 50
    env.reset(seed=0)
    qpos, _ = solved_state(env)
    qpos[16] += 0.07
    set_state(env, qpos, None)
    qpos = env.simulator._data.qpos  # a view of the present state
    assert env.task.reward(met(env.task.goal, qpos)) == before
    for _ in range(10):
        assert not met(env.task.goal, qpos).all()
        _, reward, terminated, truncated, info = env.step(np.array([0, 0, 1, 0, -1.0]))
        solved = bool(met(env.task.goal, qpos).all())
        assert (terminated, info["success"], env.simulator._success) == (solved, solved, solved)
        assert reward == (0.0 if solved else before) and not truncated
        if terminated:
            return
    raise AssertionError("the cube did not fall into its goal")


def test_an_episodes_return_is_the_sum_of_its_rewards():
    env = _cache.get("cube-double") or envs.make_env("cube-double")
    rewards = []
    env.episode_limit = 4
    _, success, length, total = envs.run_episode(
        lambda *_: np.zeros((3, 5)), env, 2, on_step=lambda step: rewards.append(step.reward)
    )
    assert length == len(rewards) == 4
    assert total == sum(rewards) <= -4 and not success


def test_binary_tasks_pay_only_the_whole_goal():
    for name in ("scene", "puzzle-3x3"):
        task = envs.TASKS[name]
        met = np.ones((2, task.conditions), bool)
        met[0, -1] = False
        assert list(task.reward(met)) == [0.0, 1.0]
    counted = envs.TASKS["cube-triple"].reward([[0, 0, 0], [1, 0, 1], [1, 1, 1]])
    assert list(counted) == [-3.0, -1.0, 0.0]
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


def run_program(code):
    """Return what a program prints, and what it complains about until its very end."""
    environ = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(envs.__file__).parent,
        capture_output=True,
        text=True,
        env=environ,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not (find_library("EGL") or find_library("OSMesa")), reason="no OpenGL here")
@pytest.mark.parametrize("before", ["", "envs.make_env('cube-double', 0).reset();"])
def test_rendering_works_also_where_mujoco_was_imported_without_opengl(before):
    code = (
        f"import envs; {before} env = envs.make_env('cube-double', 0, 'rgb_array');"
        "env.reset(); frame = env.render(); print(frame.shape, frame.std() > 10)"
    )
    _, printed, complaints = run_program(code)
    assert (printed, complaints) == ("(512, 512, 3) True\n", ""), complaints


@pytest.mark.skipif(not (find_library("EGL") or find_library("OSMesa")), reason="no OpenGL here")
def test_a_video_is_written_and_the_program_ends_in_silence(tmp_path):
    """A renderer that is left to the interpreter's end fails there, in two tracebacks."""
    code = (
        "from functools import partial; import numpy as np, envs;"
        "make_env = partial(envs.make_env, 'cube-double', episode_limit=3);"
        f"path = {str(tmp_path / 'video.mp4')!r};"
        "envs.record(lambda obs, rng: np.zeros((5, 5)), make_env, path)"
    )
    returned, _, complaints = run_program(code)
    assert (returned, complaints) == (0, "") and (tmp_path / "video.mp4").stat().st_size > 1000
