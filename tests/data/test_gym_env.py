"""Any gymnasium environment: its spaces, units, ends and success; resume; what must be refused."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import envs
from simulators import gym_env

HERE = Path(__file__).parent
POINT = "gym_worlds:PointMass-v0"
LIMITS = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=4)


@pytest.fixture
def point():
    env = envs.make_env(POINT, seed=0)
    yield env
    env.close()


class Wander:
    """A picklable policy for two actions."""

    def __call__(self, obs, rng):
        return rng.uniform(-1, 1, (4, 2))


class Seek:
    """Walks straight to the goal: 0.1 m per step at full speed."""

    def __call__(self, obs, rng):
        return ((obs[0, 1:3] - obs[0, 3:5]) / 0.1).clip(-1, 1)[None]


def draw_actions(count, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size)).astype(np.float32)


# ---- spaces and units ----------------------------------------------------------------------------


def test_a_task_is_read_from_an_environments_spaces():
    task = envs.get_task(POINT)
    assert (task.obs_dim, task.action_dim, task.episode_limit) == (5, 2, 40)
    assert (task.name, task.suite, task.conditions) == (POINT, "gymnasium", 1)
    assert envs.get_task(POINT) is task and envs.get_task(task) is task


@pytest.mark.parametrize("name, sizes", [("Reacher-v5", (10, 2, 50)), ("Pusher-v5", (23, 7, 100))])
def test_gymnasiums_own_environments_give_their_own_rewards_and_observations(name, sizes):
    task = envs.get_task(name)
    assert (task.obs_dim, task.action_dim, task.episode_limit) == sizes
    ours = envs.make_env(name)
    own = gymnasium.make(name)
    high = own.action_space.high
    obs, _ = own.reset(seed=4)
    assert np.array_equal(ours.reset(seed=4)[0], obs.astype(np.float32))
    for action in draw_actions(sizes[2], sizes[1]):
        step = ours.step(action)
        obs, reward, terminated, truncated, _ = own.step(action * high)
        assert step[0].dtype == np.float32 and np.array_equal(step[0], obs.astype(np.float32))
        assert step[1:4] == (reward, terminated, truncated)
    assert truncated
    ours.close()
    own.close()


@pytest.mark.filterwarnings("ignore")
def test_gymnasium_accepts_the_environment(point):
    from gymnasium.utils.env_checker import check_env

    check_env(point, skip_render_check=True)


def test_a_dict_is_flattened_in_the_order_of_its_space(point):
    obs, _ = point.reset(seed=3)
    inner = point.simulator.unwrapped
    assert list(inner.observation_space.spaces) == ["clock", "goal", "position"]
    expected = np.concatenate([[inner.time], inner.goal, inner.position]).astype(np.float32)
    assert obs.dtype == np.float32 and np.array_equal(obs, expected)
    obs, *_ = point.step(np.ones(2))
    assert obs[0] == 1 and np.array_equal(obs[3:], inner.position.astype(np.float32))


def test_an_array_of_several_dimensions_is_flattened():
    env = envs.make_env("gym_worlds:Matrix-v0")
    assert env.reset(seed=0)[0].shape == (6,)
    assert env.step(np.zeros(2))[0].shape == (6,)


def test_actions_reach_the_environment_in_its_own_units_and_clipped(point):
    point.reset(seed=0)
    for given_, own in (([-1, 1], [-2, 2]), ([0.25, 0], [0.5, 0]), ([-7, 7], [-2, 2])):
        point.step(np.array(given_))
        assert np.array_equal(point.simulator.unwrapped.action, np.array(own, np.float32))


@given(LIMITS, st.integers(0, 2**31))
def test_units_there_and_back_are_the_same_and_never_leave_the_limits(limits, seed):
    low = np.array([first for first, _ in limits])
    high = low + np.array([width for _, width in limits])
    unit = np.random.default_rng(seed).uniform(-1, 1, (5, len(limits)))
    own = gym_env.from_unit(unit, low, high)
    assert (own >= low).all() and (own <= high).all()
    assert np.allclose(gym_env.to_unit(own, low, high), unit, atol=1e-8)
    one = np.ones(len(low))
    assert np.allclose(gym_env.from_unit(one, low, high), high, rtol=1e-12)
    assert np.allclose(gym_env.from_unit(-one, low, high), low, rtol=1e-12)


def test_limits_of_one_change_no_bit_of_an_action():
    one = np.ones(2)
    actions = draw_actions(1000, 2)
    assert np.array_equal(gym_env.from_unit(actions, -one, one), actions)


def test_a_tasks_recorded_actions_are_rescaled():
    task = envs.get_task(POINT)
    assert np.array_equal(task.unit_actions([[-2, 1]]), [[-1, 0.5]])
    assert np.array_equal(envs.get_task("lift").unit_actions([[0.3] * 7]), [[0.3] * 7])


def test_a_dimension_without_width_is_no_division_by_zero():
    assert np.array_equal(gym_env.to_unit([3.0, 1.0], np.array([3, 0]), np.array([3, 1])), [0, 1])


# ---- ends and success ----------------------------------------------------------------------------


@pytest.mark.parametrize("how, ends", [("terminated", (True, False)), ("truncated", (False, True))])
def test_the_episode_ends_where_the_environment_says_so(how, ends):
    env = envs.make_env(f"gym_worlds:Ends-{how}-v0")
    env.reset(seed=0)
    steps = [env.step(np.zeros(1)) for _ in range(3)]
    assert [step[1] for step in steps] == [-2.5] * 3
    assert [step[2:4] for step in steps] == [(False, False), (False, False), ends]


def test_success_stays_until_the_next_reset_and_ends_nothing():
    env = envs.make_env("gym_worlds:Ends-passing-v0")
    for _ in range(2):
        assert env.reset(seed=0)[1] == {"success": False}
        steps = [env.step(np.zeros(1)) for _ in range(5)]
        assert [step[4]["success"] for step in steps] == [False, False, True, True, True]
        assert not any(step[2] for step in steps)
        assert [step[3] for step in steps] == [False] * 4 + [True]  # its registered limit


def test_an_end_at_the_limit_is_terminal_not_truncated():
    env = envs.make_env("gym_worlds:Ends-terminated-v0", episode_limit=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(1))[2:4] for _ in range(3)][-1] == (True, False)


def test_the_limit_is_the_users_then_the_environments():
    result = envs.evaluate(Wander(), POINT, 2, seed=0)
    assert list(result.length) == [40, 40]
    for limit in (7, 60):  # also beyond the registered one
        result = envs.evaluate(Wander(), POINT, 2, seed=0, episode_limit=limit)
        assert list(result.length) == [limit, limit]
        result = envs.evaluate(Wander(), "gym_worlds:Limitless-v0", 1, seed=0, episode_limit=limit)
        assert list(result.length) == [limit]


def test_evaluation_counts_successes_and_says_the_return_where_there_are_none():
    assert envs.evaluate(Seek(), POINT, 20, seed=0).success.all()
    task = envs.get_task("gym_worlds:Reached-v0", success_key="reached")
    assert envs.evaluate(Seek(), task, 20, seed=0).success.all()
    silent = envs.evaluate(Seek(), "gym_worlds:Silent-v0", 20, seed=0)
    assert not silent.success.any()
    assert f", mean return {silent.episode_return.mean():.4g}" in str(silent)


def test_spawned_workers_import_the_module_and_play_the_same_episodes():
    alone = envs.evaluate(Wander(), POINT, 4, seed=5)
    pool = envs.evaluate(Wander(), POINT, 4, seed=5, workers=2)
    for name in vars(alone):
        assert np.array_equal(getattr(alone, name), getattr(pool, name)), name


def test_the_module_may_lie_in_the_working_directory(tmp_path):
    code = "import envs; print(envs.get_task('gym_worlds:PointMass-v0').obs_dim)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(Path(envs.__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "5\n", done.stderr


def test_a_video_is_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    make_env = functools.partial(envs.make_env, POINT, episode_limit=3)
    envs.record(Wander(), make_env, tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").stat().st_size > 500


@pytest.mark.parametrize("preset", ["paper", "cpu"])
@pytest.mark.parametrize("setting", ["offline-to-online", "online"])
def test_the_presets_have_stated_defaults(preset, setting):
    values = envs.settings(POINT, preset, setting)
    assert values["episode_limit"] == 40
    assert (
        values.items()
        >= {
            name: value
            for name, value in envs.GYM_DEFAULTS[preset].items()
            if name != "pretrain_steps" or setting != "online"
        }.items()
    )
    assert not envs.CPU.keys() & envs.GYM_DEFAULTS["cpu"].keys()


# ---- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [POINT, "Reacher-v5"])
@pytest.mark.parametrize("executed", [0, 1, 9])
def test_a_runner_resumes_exactly_in_another_environment(name, executed, capfd):
    rng = np.random.default_rng(0)
    runner = envs.ChunkRunner(envs.make_env(name), lambda obs: rng.uniform(-1, 1, (4, 2)))
    runner.reset(5)
    for _ in range(executed):
        runner.step()
    state = runner.state_dict()
    noise = rng.bit_generator.state
    expected = [runner.step() for _ in range(6)]
    rng.bit_generator.state = noise
    resumed = envs.ChunkRunner(envs.make_env(name, seed=77), runner.act)
    assert resumed.load_state_dict(state) is True
    for one, two in zip(expected, [resumed.step() for _ in range(6)]):
        assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("executed", [0, 5])
def test_an_environment_that_is_not_a_function_of_its_seed_goes_on_with_another_episode(
    executed, capfd
):
    name = "gym_worlds:Drifting-v0"
    runner = envs.ChunkRunner(envs.make_env(name), lambda obs: draw_actions(4, 2))
    runner.reset(5)
    for _ in range(executed):
        runner.step()
    resumed = envs.ChunkRunner(envs.make_env(name), runner.act)
    assert resumed.load_state_dict(runner.state_dict()) is False
    assert "not a function of seed and actions" in capfd.readouterr().err
    assert not resumed.ended and len(resumed.state_dict()["actions"]) == 0
    assert resumed.state_dict()["pending"].shape == (0, 2)
    resumed.step()


@pytest.mark.parametrize("where", ["first_obs", "obs"])
def test_a_difference_in_the_first_or_the_last_observation_is_enough(where, capfd):
    runner = envs.ChunkRunner(envs.make_env(POINT), lambda obs: draw_actions(4, 2))
    runner.reset(5)
    for _ in range(5):
        runner.step()
    state = runner.state_dict()
    state[where] = state[where] + np.float32(0.01)
    assert runner.load_state_dict(state) is False
    assert "another begins" in capfd.readouterr().err


def test_a_lower_limit_shows_as_an_end_and_not_as_another_world(capfd):
    runner = envs.ChunkRunner(envs.make_env(POINT), lambda obs: draw_actions(4, 2))
    runner.reset(5)
    for _ in range(5):
        runner.step()
    shorter = envs.ChunkRunner(envs.make_env(POINT, episode_limit=3), runner.act)
    assert shorter.load_state_dict(runner.state_dict()) is True
    assert shorter.ended and capfd.readouterr().err == ""


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "gym_worlds:Discrete-v0": "actions in Discrete.3.: .* register the environment with a Box",
    "gym_worlds:Whole-v0": r"actions in Box\(0, 5.*int64\): .* with a Box of floats",
    "gym_worlds:Infinite-v0": "actions without limits, .*register.* Box of finite limits",
    "gym_worlds:Picture-v0": "give it the state instead of pictures .*vla_head.py",
    "gym_worlds:PictureInside-v0": "under 'eye': .* instead of pictures",
    "gym_worlds:Letter-v0": r"Discrete\(3\) under 'letter': .* FlattenObservation",
    "gym_worlds:Missing-v0": "gymnasium cannot make 'gym_worlds:Missing-v0': .*doesn't exist",
    "no_such_module:X-v0": "module 'no_such_module' of task .* cannot be imported: ModuleNotFound",
    "broken_world:X-v0": "module 'broken_world' .* RuntimeError: the robot's licence has expired",
    "Recher-v5": "Did you mean: `Reacher`",
    "Reacher-v9": "Environment version `v9` .* doesn't exist",
    "pointmass": "unknown task 'pointmass'; tasks: lift, .*cube-triple; a gymnasium id works too",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence_that_names_the_fix(name):
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        envs.get_task(name)
    assert "\n" not in str(caught.value)


def test_an_environment_without_a_limit_needs_one():
    task = envs.get_task("gym_worlds:Limitless-v0")
    assert task.episode_limit is None and envs.settings(task, "cpu")["episode_limit"] is None
    with pytest.raises(ValueError, match="sets no limit to its episodes: give one, --episode-lim"):
        envs.make_env(task)


def test_a_success_key_that_is_not_there_names_those_that_are():
    env = envs.make_env(envs.get_task(POINT, success_key="reached"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="no 'reached' in its info, which holds is_success"):
        env.step(np.zeros(2))


def test_a_non_finite_observation_is_refused():
    env = envs.make_env("gym_worlds:Ends-nan-v0")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="non-finite observation at step 3"):
        [env.step(np.zeros(1)) for _ in range(3)]


@pytest.mark.parametrize(
    "action, message", [(np.zeros(3), r"takes actions of \(2,\)"), ([0, np.nan], "non-finite")]
)
def test_bad_actions_are_refused(point, action, message):
    point.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        point.step(np.array(action))


def test_env_args_are_refused():
    with pytest.raises(ValueError, match="takes no env_args"):
        envs.make_env(POINT, env_args={"env_name": "Lift"})
