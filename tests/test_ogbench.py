"""OGBench: the four tasks, the one reward rule, play data, and files that must be refused. How play is made:
test_play.py."""
import os
import pickle
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

import envs
from demos import ogbench

pytest.importorskip("ogbench")
pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore:.*precision lowered")]
TASKS = ("scene", "puzzle-3x3", "cube-double", "cube-triple")
ROWS, EPISODES = 41, 2  # short trajectories: an errand takes about 80 steps
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


# -------------------------------------------------------------------------------------------------- play data
@pytest.fixture(scope="module", params=("scene", "cube-double"))
def made(request, tmp_path_factory):
    """(task, path) of a small file made in this process."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ogbench, "ROWS", ROWS)
    path = tmp_path_factory.mktemp("play") / f"{request.param}.npz"
    ogbench.collect(request.param, EPISODES, seed=1, path=path, progress=False)
    patch.undo()
    return request.param, path


def write(path, rows=7, task="cube-double", **changes):
    """A file of two trajectories of `rows` states, nothing solved, with some columns replaced or, by None, left out."""
    task = envs.TASKS[task]
    count, goal = 2 * rows, task.goal
    joints = 14 + 7 * len(goal.cubes) + len(goal.buttons) + len(goal.slides)
    columns = {
        "observations": np.arange(count, dtype=np.float32)[:, None] * np.ones(task.obs_dim, np.float32),
        "actions": np.full((count, 5), 0.5, np.float32), "terminals": np.arange(count) % rows == rows - 1,
        "qpos": np.zeros((count, joints), np.float32), "qvel": np.zeros((count, joints), np.float32),
    }
    if goal.buttons:
        columns["button_states"] = np.zeros((count, len(goal.buttons)), np.int64)
    columns |= changes
    np.savez(path, **{key: value for key, value in columns.items() if value is not None})
    return path


def test_recorded_trajectories_replay_bitwise_and_labels_are_the_environments_own(made):
    name, path = made
    file, data = np.load(path), ogbench.load(path, name)
    env, row, step = ogbench.PlayEnv(envs.TASKS[name]), 0, 0
    assert len(file["seeds"]) == EPISODES and len(np.unique(file["seeds"])) == EPISODES
    for seed in file["seeds"]:
        obs = env.reset(seed=int(seed))[0]
        for index in range(ROWS):
            assert np.array_equal(obs, file["observations"][row]), (row, index)
            obs, reward, terminated, _, _ = env.step(file["actions"][row])
            if index < ROWS - 1:  # nothing is solved in so short a file, so every step is kept
                assert (data["reward"][step], data["terminated"][step]) == (reward, terminated)
                assert np.array_equal(data["next_obs"][step], obs) and data["truncated"][step] == (index == ROWS - 2)
                step += 1
            row += 1
    assert step == len(data["obs"]) == EPISODES * (ROWS - 1)
    assert np.abs(np.diff(file["actions"], axis=0)).max() > 0.05  # something is going on
    env.close()


def test_the_first_reading_of_an_episode_is_of_its_own_first_state(made):
    """The drawer is placed after OGBench's own first reading: the oracle would reach for where the handle was."""
    name, _ = made
    env = ogbench._env if ogbench._env.task.name == name else ogbench.PlayEnv(envs.TASKS[name])
    for seed in range(2):
        env.reset(seed=seed)
        reading, own = env.simulator.compute_ob_info(), type(env.simulator).compute_ob_info(env.simulator)
        assert all(np.array_equal(reading[key], own[key]) for key in own)


def test_the_file_does_not_depend_on_the_workers(made, tmp_path, monkeypatch):
    name, path = made
    if name != "cube-double":
        pytest.skip("one task is enough for the processes")
    monkeypatch.setattr(ogbench, "ROWS", ROWS)
    again = ogbench.collect(name, EPISODES, seed=1, path=tmp_path / "two.npz", workers=2, progress=False)
    one, two = np.load(path), np.load(again)
    assert sorted(one) == sorted(two) and all(np.array_equal(one[key], two[key]) for key in one)


def test_collecting_leaves_numpys_global_stream_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(ogbench, "ROWS", 3)
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    ogbench.collect("cube-double", 1, 0, tmp_path / "x.npz", progress=False)
    assert np.random.rand() == expected


def test_ogbench_opens_what_is_written_here(made):
    from ogbench.utils import load_dataset

    name, path = made
    theirs, ours = load_dataset(str(path), add_info=True), ogbench.load(path, name)
    for key, name_of_theirs in {"obs": "observations", "action": "actions", "next_obs": "next_observations"}.items():
        assert np.array_equal(ours[key], theirs[name_of_theirs])
    assert np.array_equal(ours["terminated"] | ours["truncated"], theirs["terminals"] > 0)


def solved_qpos(task, rows, at):
    qpos = np.zeros((rows, 14 + 7 * len(task.goal.cubes)), np.float32)
    for index, cube in enumerate(task.goal.cubes):
        qpos[at, 14 + 7 * index : 17 + 7 * index] = cube
    return qpos


def test_a_step_is_labelled_by_the_state_it_leads_to(tmp_path):
    """States 3 and 4 of 7 are solved: step 2 ends an episode, steps 3 and 4 begin in a solved state and are gone."""
    task = envs.TASKS["cube-double"]
    qpos = solved_qpos(task, 14, slice(3, 5))
    qpos[9, 14:17] = task.goal.cubes[0]  # one cube of two
    data = ogbench.load(write(tmp_path / "x.npz", qpos=qpos, actions=np.full((14, 5), 1.5, np.float32)), task)
    assert list(data["obs"][:, 0]) == [0, 1, 2, 5, 7, 8, 9, 10, 11, 12] and (data["action"] == 1).all()
    assert list(data["next_obs"][:, 0]) == [1, 2, 3, 6, 8, 9, 10, 11, 12, 13]
    assert list(np.flatnonzero(data["terminated"])) == [2] and list(np.flatnonzero(data["truncated"])) == [3, 9]
    assert list(data["reward"]) == [-2, -2, 0, -2, -2, -1, -2, -2, -2, -2]
    first = ogbench.load(tmp_path / "x.npz", task, episodes=1)
    assert {key: len(value) for key, value in first.items()} == dict.fromkeys(data, 4)
    assert all(first[key].dtype == np.float32 for key in ("obs", "action", "reward", "next_obs"))


def test_a_success_in_the_last_state_is_terminal_not_truncated(tmp_path):
    data = ogbench.load(write(tmp_path / "x.npz", qpos=solved_qpos(envs.TASKS["cube-double"], 14, 6)), "cube-double")
    assert (data["terminated"][5], data["truncated"][5]) == (True, False) and data["truncated"][-1]


def test_conditions_are_those_of_ogbenchs_own_relabelling(env):
    """`relabel_dataset` labels the state a step begins in: its reward and mask are those of our conditions there."""
    from ogbench.relabel_utils import relabel_dataset

    env.reset(seed=0)
    (solved, pressed), rng = solved_state(env), np.random.default_rng(0)
    qpos = solved + rng.normal(0, 0.02, (400, len(solved)))
    dataset = {"qpos": qpos.astype(np.float32)}
    if pressed is not None:
        dataset["button_states"] = pressed ^ (rng.random((400, len(pressed))) < 0.05)
    relabel_dataset(env.task.env_name, env.simulator, dataset)
    met = env.task.met(dataset["qpos"], dataset.get("button_states"))
    assert np.array_equal(dataset["rewards"], met.sum(-1) - env.task.conditions)
    assert np.array_equal(dataset["masks"], 1.0 - met.all(-1)) and 20 < met.all(-1).sum() < 380


def test_without_terminals_the_recording_simply_stops(tmp_path):
    data = ogbench.load(write(tmp_path / "x.npz", terminals=np.zeros(14, bool)), "cube-double")
    assert len(data["obs"]) == 13 and list(np.flatnonzero(data["truncated"])) == [12]


BAD = {
    "missing": (dict(qpos=None), "key 'qpos' is missing"),
    "of another task": (dict(task="cube-triple"), r"key 'observations' must be \(N, 37\), found \(14, 46\)"),
    "without buttons": (dict(task="scene", button_states=None), "key 'button_states' is missing"),
    "text": (dict(actions=np.full((14, 5), "a")), "key 'actions' is not an array of numbers"),
    "nan": (dict(observations=np.full((14, 37), np.nan)), "key 'observations' has non-finite values"),
    "flat": (dict(actions=np.zeros(14)), r"key 'actions' must be \(N, 5\), found \(14,\)"),
    "scalar": (dict(terminals=np.array(True)), r"key 'terminals' must be \(N,\), found \(\)"),
    "ragged": (dict(actions=np.zeros((13, 5))), "same length"),
    "no rows": ({key: np.zeros((0, *shape)) for key, shape in (("terminals", ()), ("observations", (37,)),
                                                               ("actions", (5,)), ("qpos", (28,)))}, "at least 2"),
    "nothing but ends": (dict(terminals=np.ones(14, bool)), "no step to learn from"),
    "pickled": (dict(actions=np.array([{}] * 14)), "allow_pickle=False"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(tmp_path, case):
    changes, message = BAD[case]
    path = write(tmp_path / "bad.npz", **changes)
    task = "scene" if case == "without buttons" else "cube-double"
    with pytest.raises(ValueError, match=message) as caught:
        ogbench.load(path, task)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "npy", "pickle", "flipped"])
def test_files_that_are_no_npz_are_refused_by_name(tmp_path, kind):
    path = write(tmp_path / "x.npz")
    whole = path.read_bytes()
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        flipped = whole[:700] + bytes([whole[700] ^ 255]) + whole[701:]
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"Not found",
                          "pickle": pickle.dumps(1), "flipped": flipped}[kind])
    with pytest.raises(ValueError, match="not readable as npz") as caught:
        ogbench.load(path, "cube-double")
    assert str(caught.value).startswith(f"{path}: ")


def test_more_trajectories_than_there_are_and_no_file_are_refused(tmp_path):
    path = write(tmp_path / "x.npz")
    for episodes in (0, 3):
        with pytest.raises(ValueError, match=f"holds 2 trajectories, {episodes} were asked for"):
            ogbench.load(path, "cube-double", episodes)
    with pytest.raises(FileNotFoundError, match="python -m demos --task scene --out"):
        ogbench.load(tmp_path / "none.npz", "scene")


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "x.npz")
    old = path.read_bytes()

    def fail(file, **columns):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(KeyboardInterrupt):
        ogbench.save(path, {})
    assert path.read_bytes() == old and [one.name for one in tmp_path.iterdir()] == ["x.npz"]


def test_only_ogbench_has_play_data(tmp_path):
    with pytest.raises(ValueError, match="task 'lift' has no play data"):
        ogbench.collect("lift", 1, 0, tmp_path / "x.npz")
    with pytest.raises(ValueError, match="at least one trajectory"):
        ogbench.collect("scene", 0, 0, tmp_path / "x.npz")


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
