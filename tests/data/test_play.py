"""How OGBench's oracles play here: the recipe, errands that serve the task, files that replay.

    python -m pytest tests/data/test_play.py

Not here: how such files are read (test_npz.py).
"""

from types import SimpleNamespace

import numpy as np
import pytest

import envs
from demos import npz, ogbench

pytest.importorskip("ogbench")
pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore:.*precision lowered")]
ROWS = 41  # short trajectories: an errand takes about 80 steps
EPISODES = 2


@pytest.fixture(scope="module", params=("scene", "cube-double"))
def made(request, tmp_path_factory):
    """(task, path) of a small file made in this process."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ogbench, "ROWS", ROWS)
    path = tmp_path_factory.mktemp("play") / f"{request.param}.npz"
    ogbench.collect(request.param, EPISODES, seed=1, path=path, progress=False)
    patch.undo()
    return request.param, path


# ---- the file


def test_recorded_trajectories_replay_bitwise_and_labels_are_the_environments_own(made):
    name, path = made
    file = np.load(path)
    data = npz.load(path, name)
    env = ogbench.PlayEnv(envs.TASKS[name])
    row = 0
    step = 0
    assert len(file["seeds"]) == EPISODES and len(np.unique(file["seeds"])) == EPISODES
    for seed in file["seeds"]:
        obs = env.reset(seed=int(seed))[0]
        for index in range(ROWS):
            assert np.array_equal(obs, file["observations"][row]), (row, index)
            obs, reward, terminated, _, _ = env.step(file["actions"][row])
            if index < ROWS - 1:  # nothing is solved in so short a file, so every step is kept
                found = (data["reward"][step], data["terminated"][step])
                assert found == (reward, terminated)
                assert np.array_equal(data["next_obs"][step], obs)
                assert data["truncated"][step] == (index == ROWS - 2)
                step += 1
            row += 1
    assert step == len(data["obs"]) == EPISODES * (ROWS - 1)
    assert np.abs(np.diff(file["actions"], axis=0)).max() > 0.05  # something is going on
    env.close()


def test_the_first_reading_of_an_episode_is_of_its_own_first_state(made):
    """The drawer is placed after OGBench's first reading: the oracle would reach beside it."""
    name, _ = made
    env, _ = ogbench.world(envs.TASKS[name])
    for seed in range(2):
        env.reset(seed=seed)
        reading = env.simulator.compute_ob_info()
        fresh = type(env.simulator).compute_ob_info(env.simulator)
        assert all(np.array_equal(reading[key], fresh[key]) for key in fresh)


def test_the_file_does_not_depend_on_the_workers(made, tmp_path, monkeypatch):
    name, path = made
    if name != "cube-double":
        pytest.skip("one task is enough for the processes")
    monkeypatch.setattr(ogbench, "ROWS", ROWS)
    out = tmp_path / "two.npz"
    again = ogbench.collect(name, EPISODES, seed=1, path=out, workers=2, progress=False)
    one = np.load(path)
    two = np.load(again)
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
    theirs = load_dataset(str(path), add_info=True)
    ours = npz.load(path, name)
    names = {"obs": "observations", "action": "actions", "next_obs": "next_observations"}
    for key, name_of_theirs in names.items():
        assert np.array_equal(ours[key], theirs[name_of_theirs])
    assert np.array_equal(ours["terminated"] | ours["truncated"], theirs["terminals"] > 0)


def test_only_ogbench_has_play_data(tmp_path):
    with pytest.raises(ValueError, match="task 'lift' has no play data"):
        ogbench.collect("lift", 1, 0, tmp_path / "x.npz")
    with pytest.raises(ValueError, match="at least one trajectory"):
        ogbench.collect("scene", 0, 0, tmp_path / "x.npz")


# ---- the recipe


def test_a_scene_whose_cube_is_out_of_sight_is_played_again(monkeypatch):
    seen = []
    rule = iter([False, False, True])

    def in_sight(cube):
        seen.append(cube.shape)
        return next(rule)

    monkeypatch.setattr(ogbench, "in_sight", in_sight)
    monkeypatch.setattr(ogbench, "play", lambda *job: {"qpos": np.zeros((job[-1], 25))})
    monkeypatch.setattr(ogbench, "world", lambda task: (None, None))
    ogbench.make_trajectory((envs.TASKS["scene"], 0, 0, False, 6))
    assert seen == [(6, 3)] * 3


@pytest.mark.parametrize("task", ["scene", "puzzle-3x3", "cube-double", "cube-triple"])
def test_directed_play_demonstrates_the_task_and_replays_bitwise(task, tmp_path):
    """From the first state of an episode of the task to its first success, which ends it."""
    path = ogbench.collect(task, 2, 2, tmp_path / "x.npz", progress=False, directed=True)
    file = np.load(path)
    data = npz.load(path, task)
    steps = 0
    first = np.r_[0, np.flatnonzero(file["terminals"])[:-1] + 1]
    episode = envs.make_env(task)  # not the world that made them
    for seed, row in zip(file["seeds"], first):
        obs = episode.reset(seed=int(seed))[0]
        ended = False
        while not ended:
            assert np.array_equal(obs, file["observations"][row]) and not file["terminals"][row]
            obs, reward, ended, truncated, _ = episode.step(file["actions"][row])
            assert (data["reward"][steps], data["terminated"][steps]) == (reward, ended)
            assert not truncated
            row += 1
            steps += 1
        assert file["terminals"][row] and np.array_equal(obs, file["observations"][row])
    assert steps == len(data["obs"]) and file["directed"]
    episode.close()


class Still:
    """An oracle that does nothing; each reset is noted."""

    def __init__(self, done, note):
        self.done = done
        self.note = note

    def reset(self, obs, info):
        self.note(self, info)

    def select_action(self, obs, info):
        return np.zeros(5)


def test_an_oracle_hears_of_the_present_errand():
    """A new errand does not move the world, yet the oracle must not get the old one's reading."""
    env = ogbench.PlayEnv(envs.TASKS["cube-double"])
    heard = []

    def note(oracle, info):
        block = info["privileged/target_block"]
        place = info["privileged/target_block_pos"]
        target = env.simulator._data.mocap_pos[env.simulator._cube_target_mocap_ids[block]]
        heard.append((block == env.simulator._target_block, np.array_equal(place, target)))

    ogbench.play(env, {"cube": Still(True, note)}, np.random.default_rng(0), True, 12)
    assert heard == [(True, True)] * 12
    env.close()


def test_the_recipe_of_play_is_ogbenchs(monkeypatch):
    """Play has noise 0.1 and never ends early; demonstrations draw their noise and end solved."""
    env = ogbench.PlayEnv(envs.TASKS["cube-double"])
    noises = []
    oracles = {"cube": Still(False, lambda oracle, info: noises.append(oracle._noise))}
    monkeypatch.setattr(ogbench, "met", lambda *_: np.ones(2, bool))
    lengths = [
        len(ogbench.play(env, oracles, np.random.default_rng(seed), directed, 5)["actions"])
        for seed in range(3)
        for directed in (False, True)
    ]
    assert lengths == [5, 2] * 3 and noises[::2] == [0.1] * 3
    assert len(set(noises)) == 4 and all(0.1 < noise < 0.4 for noise in noises[1::2])
    # as in OGBench's data_gen_scripts
    assert ogbench.ROWS == 1001 and ogbench.STACKING["cube-double"] == (0.0, 0.25)
    env.close()


def test_every_trajectory_draws_from_a_stream_of_its_own(monkeypatch):
    monkeypatch.setattr(ogbench, "world", lambda task: (None, None))
    monkeypatch.setattr(ogbench, "play", lambda *_: {"drawn": np.random.rand()})
    drawn = [
        ogbench.make_trajectory((envs.TASKS["cube-double"], seed, episode, False, 3))["drawn"]
        for seed, episode in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


def test_lights_out_is_solved():
    goal = envs.TASKS["puzzle-3x3"].goal.buttons
    assert list(ogbench.lights_out(np.zeros(9, int), goal)) == [0, 8]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lights, goal = rng.integers(0, 2, (2, 9))
        for button in ogbench.lights_out(lights, goal):
            for other in range(9):
                distance = abs(button // 3 - other // 3) + abs(button % 3 - other % 3)
                lights[other] ^= distance <= 1
        assert np.array_equal(lights, goal)


def test_conditions_are_named_in_the_order_of_the_goal():
    goal = envs.TASKS["scene"].goal
    found = [ogbench.condition(goal, number) for number in range(5)]
    assert found == [("cube", 0), ("button", 0), ("button", 1), ("drawer", 0), ("window", 0)]


def test_a_cube_is_within_reach_unless_another_lies_on_it_or_the_drawer_holds_it():
    places = np.array([[0.4, 0.0, 0.02], [0.41, 0.01, 0.06], [0.4, 0.1, 0.06], [0.3, -0.3, 0.07]])
    qpos = np.zeros(14 + 7 * 4)
    qpos[14:].reshape(4, 7)[:, :3] = places
    world = SimpleNamespace(_data=SimpleNamespace(qpos=qpos))
    assert [ogbench.within_reach(world, i, 4) for i in range(4)] == [False, True, True, True]
    world._is_in_drawer = lambda place: place[1] < -0.2
    assert [ogbench.within_reach(world, i, 4) for i in range(4)] == [False, True, True, False]


def test_out_of_sight_is_ogbenchs_rule():
    # on the table, in the drawer
    inside = np.array([[0.4, 0.1, 0.02], [0.33, -0.35, 0.061], [0.33, -0.35, 0.079]])
    assert ogbench.in_sight(inside)
    for y, z in ((0.29, 0.02), (-0.31, 0.02), (-0.31, 0.09)):
        assert not ogbench.in_sight(np.array([*inside, [0.4, y, z]]))
