"""Demonstrations: the scripted expert, the file format, labels, and files that must be refused."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import demos
import envs
from demos import motion
from demos.square import HANDLE

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.sim
EPISODES = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return demos.collect("lift", EPISODES, seed=1, path=tmp_path_factory.mktemp("demos") / "lift.hdf5", progress=False)


@pytest.fixture
def copy(path, tmp_path):
    return shutil.copy(path, tmp_path / "copy.hdf5")


def test_transitions_are_ready_for_the_replay(path):
    data, count = demos.load(path, "lift"), len(demos.load(path)["obs"])
    shapes = {"obs": (19,), "action": (7,), "reward": (), "next_obs": (19,), "terminated": (), "truncated": ()}
    assert {key: array.shape for key, array in data.items()} == {key: (count, *rest) for key, rest in shapes.items()}
    assert data["terminated"].sum() == EPISODES == data["reward"].sum() and not data["truncated"].any()
    assert data["terminated"].dtype == data["truncated"].dtype == bool and data["obs"].dtype == np.float32
    inside = ~data["terminated"][:-1]
    assert np.array_equal(data["next_obs"][:-1][inside], data["obs"][1:][inside])
    assert np.abs(data["action"]).max() <= 1.0


def test_labels_are_the_environments_own(path):
    """Replaying seed and actions gives bitwise the stored observations, rewards and ends."""
    env, data, row = envs.make_env("lift", env_args=demos.env_args(path)), demos.load(path), 0
    with h5py.File(path) as file:
        seeds = [int(file[f"data/demo_{index}"].attrs["seed"]) for index in range(EPISODES)]
    for seed in seeds:
        obs, ended = env.reset(seed=seed)[0], False
        while not ended:
            assert np.array_equal(obs, data["obs"][row])
            obs, reward, terminated, truncated, _ = env.step(data["action"][row])
            assert np.array_equal(obs, data["next_obs"][row])
            assert (reward, terminated) == (data["reward"][row], data["terminated"][row])
            ended, row = terminated or truncated, row + 1
    assert row == len(data["obs"])
    env.close()


def test_states_belong_to_their_observations(path):
    env = envs.make_env("lift")
    env.reset(seed=0)
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        for step in (0, len(demo["states"]) - 1):
            env.simulator.sim.set_state_from_flattened(demo["states"][step])
            env.simulator.sim.forward()
            cube = env.simulator.sim.data.body_xpos[env.simulator.cube_body_id]
            assert np.allclose(cube, demo["obs/object"][step][:3], atol=2e-3)
    env.close()


def test_collect_depends_on_the_seed_and_not_on_workers(path, tmp_path):
    again = demos.load(demos.collect("lift", EPISODES, 1, tmp_path / "again.hdf5", workers=2, progress=False))
    other = demos.load(demos.collect("lift", EPISODES, 2, tmp_path / "other.hdf5", progress=False))
    first = demos.load(path)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["obs"][0], other["obs"][0])
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith(".part")] == []


def die(job):
    os._exit(1)


@pytest.mark.parametrize("task", ["lift", "puzzle-3x3"])
def test_a_worker_that_dies_ends_it_with_a_word(tmp_path, monkeypatch, task):
    """Out of memory, for instance; multiprocessing's own pool would wait for it for ever."""
    from demos import ogbench
    monkeypatch.setattr(demos, "_attempt", die)
    monkeypatch.setattr(ogbench, "_trajectory", die)
    with pytest.raises(RuntimeError, match="died: out of memory. Try --workers 1"):
        demos.collect(task, 2, 0, tmp_path / "a.hdf5", workers=2, progress=False)
    assert not list(tmp_path.iterdir())


KILLED = """
import multiprocessing, os, signal, demos
if __name__ == "__main__":
    for _ in demos.spread(abs, range(-100, 0), 2):
        print(*(one.pid for one in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_their_parent(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(demos.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "killed.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as parent:
        workers, end = parent.stdout.readline().split(), time.monotonic() + 30
    while time.monotonic() < end and any(Path("/proc", pid).exists() for pid in workers):
        time.sleep(0.1)
    left = [pid for pid in workers if Path("/proc", pid).exists()]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert len(workers) == 2 and not left


def test_a_wrong_place_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "_attempts", lambda *_: pytest.fail("it worked in vain"))
    for path in (tmp_path, "/proc/none/a.hdf5"):
        with pytest.raises((ValueError, OSError), match=str(tmp_path) if path == tmp_path else "/proc/none"):
            demos.collect("lift", 1, 0, path, progress=False)


def test_only_successes_are_kept_in_the_order_of_the_attempts(path, tmp_path, monkeypatch):
    """With an expert whose first attempt fails, the file holds the attempts after it."""
    attempts = []

    class Expert(demos.LiftDemonstrator):
        def __init__(self, rng):
            super().__init__(rng)
            attempts.append(len(attempts))
            self.idle = len(attempts) == 1

        def __call__(self, obs):
            return np.zeros(7, np.float32) if self.idle else super().__call__(obs)

    monkeypatch.setitem(demos.EXPERTS, "lift", Expert)
    data = demos.load(demos.collect("lift", EPISODES - 1, 1, tmp_path / "some.hdf5", progress=False))
    every = demos.load(path)
    second = int(np.flatnonzero(every["terminated"])[0]) + 1
    assert attempts == [0, 1, 2] and np.array_equal(data["action"], every["action"][second:])


def test_the_first_episodes_of_a_file_can_be_taken(path):
    assert demos.load(path, episodes=2)["terminated"].sum() == 2
    with pytest.raises(ValueError, match="holds 3 demonstrations, 4 were asked for"):
        demos.load(path, episodes=4)


def test_the_expert_varies_and_recovers_from_misses():
    lengths, misses = [], 0
    for attempt in range(8):
        episode = demos._attempt((envs.get_task("lift"), 31, attempt))
        lengths.append(len(episode["action"]))
        grip = episode["action"][:, 6]
        misses += ((grip[:-1] > 0) & (grip[1:] < 0)).any()  # closed on nothing and opened again
        assert episode["success"][-1]
    assert misses >= 2 and max(lengths) > 1.5 * min(lengths)


@pytest.mark.parametrize("task", ["can", "square"])
def test_the_other_experts_succeed_unevenly(task):
    """At least 90 of 100 fresh seeds; here 5, of which 4 must do."""
    episodes = [demos._attempt((envs.get_task(task), 31, attempt)) for attempt in range(5)]
    lengths = [len(episode["action"]) for episode in episodes if episode["success"][-1]]
    assert len(lengths) >= 4 and max(lengths) > 1.2 * min(lengths)
    assert all(np.abs(episode["action"]).max() <= 1.0 for episode in episodes)


def test_tilt_is_the_turn_that_points_the_hand_straight_down():
    from scipy.spatial.transform import Rotation

    for hand in Rotation.random(50, random_state=0):
        axis = hand.apply([0, 0, 1])
        turn = np.append(motion.tilt(hand.as_quat()), 0.0)
        assert np.allclose(turn, np.cross(axis, [0, 0, -1]))
        turned = Rotation.from_rotvec(0.1 * turn) * hand
        assert turned.apply([0, 0, 1])[2] < axis[2]


def test_squares_expert_lifts_the_nut_by_its_handle_with_a_level_hand():
    """The first hand is tilted by 7 to 10 degrees, and shakes; what is cloned would tilt further."""
    for attempt in range(3):
        obs = demos._attempt((envs.get_task("square"), 31, attempt))["obs"][20:]     # the nut has settled
        lifted = obs[np.flatnonzero(obs[:, 18] > obs[0, 18] + 0.02)[0]]
        handle = lifted[16:19] + HANDLE * motion.x_axis(lifted[19:23])
        assert np.linalg.norm((lifted[:3] - handle)[:2]) < 0.012
        assert np.linalg.norm(motion.tilt(lifted[3:7])) < 0.06


@pytest.mark.parametrize("task", ["lift", "can", "square"])
def test_an_expert_sees_the_observation_and_its_own_stream_only(task):
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(30, envs.TASKS[task].obs_dim)).astype(np.float32)
    first, again, other = (demos.EXPERTS[task](np.random.default_rng(seed)) for seed in (1, 1, 2))
    actions = [[expert(obs) for obs in seen] for expert in (first, again, other)]
    assert np.array_equal(actions[0], actions[1]) and not np.array_equal(actions[0], actions[2])


def test_a_failed_replacement_leaves_the_old_file(path, copy, monkeypatch):
    before = open(copy, "rb").read()
    monkeypatch.setattr("demos.hdf5._save_episode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demos.save(copy, envs.get_task("lift"), {}, [{"action": [0]}])
    assert open(copy, "rb").read() == before


def test_robomimics_own_dataset_opens_the_file(path):
    pytest.importorskip("robomimic")
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    keys = list(envs.ROBOMIMIC_KEYS)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys}})
    dataset = SequenceDataset(
        str(path), obs_keys=keys, dataset_keys=("actions", "rewards", "dones"), seq_length=5, pad_seq_length=True,
        load_next_obs=True, hdf5_cache_mode=None, filter_by_attribute="train",
    )
    data = demos.load(path)
    assert dataset.n_demos == EPISODES and len(dataset) == len(data["obs"])
    item = dataset[0]
    assert np.array_equal(np.concatenate([item["obs"][key] for key in keys], axis=1), data["obs"][:5])
    assert np.array_equal(np.concatenate([item["next_obs"][key] for key in keys], axis=1), data["next_obs"][:5])
    assert np.array_equal(item["actions"], data["action"][:5])


# ------------------------------------------------------------------------------------ labels of foreign files
def write(path, rewards, reach=1.0):
    """A file as robomimic writes it, with demonstrations of the given rewards and actions of this reach."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = '{"env_name": "Lift", "type": 1, "env_kwargs": {"reward_shaping": false}}'
        for index, reward in enumerate(rewards):
            group, steps = data.create_group(f"demo_{index}"), len(reward)
            group["actions"], group["rewards"] = rng.uniform(-reach, reach, (steps, 7)), np.array(reward, np.float64)
            group["dones"] = np.zeros(steps, np.int64)
            for key, size in zip(envs.TASKS["lift"].obs_keys, envs.TASKS["lift"].obs_sizes):
                values = rng.normal(size=(steps + 1, size))
                group[f"obs/{key}"], group[f"next_obs/{key}"] = values[:-1], values[1:]
    return path


def test_the_first_success_ends_a_demonstration_and_a_failure_is_truncated(tmp_path):
    data = demos.load(write(tmp_path / "a.hdf5", [[0, 0, 2, 1, 1], [0, 0]]), "lift")
    assert data["reward"].tolist() == [0, 0, 1, 0, 0]
    assert data["terminated"].tolist() == [False, False, True, False, False]
    assert data["truncated"].tolist() == [False, False, False, False, True]


def test_actions_of_a_file_are_clipped(tmp_path):
    plain, wide = (demos.load(write(tmp_path / f"{reach}.hdf5", [[0] * 20], reach), "lift")["action"]
                   for reach in (1, 3))
    assert np.allclose(wide, np.clip(3 * plain, -1, 1)) and np.abs(plain).max() < 1 == np.abs(wide).max()


def test_a_saved_episode_says_how_it_ended(tmp_path):
    """By success, by failure, by time; robomimic's dones are set for the first two."""
    episodes = [{"obs": np.zeros((4, 19)), "action": np.zeros((3, 7)), "success": [False, False, won], "seed": 5,
                 "states": np.zeros((3, 2)), "failed": failed} for won, failed in ((True, False), (False, True),
                                                                                   (False, False))]
    path = demos.save(tmp_path / "x.hdf5", envs.TASKS["lift"], {"env_name": "Lift", "env_kwargs": {}}, episodes)
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == 9
        found = [file[f"data/demo_{i}"] for i in range(3)]
        assert [one["dones"][:].tolist() for one in found] == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
        assert [one.attrs["num_samples"] for one in found] == [3, 3, 3]
    data = demos.load(path)
    assert np.flatnonzero(data["terminated"]).tolist() == [2, 5] and np.flatnonzero(data["truncated"]).tolist() == [8]
    assert data["reward"].tolist() == [0, 0, 1] + [0] * 6


def test_demonstrations_are_read_in_numerical_order(tmp_path):
    data = demos.load(write(tmp_path / "a.hdf5", [[0] * (index + 1) for index in range(11)]), "lift")
    assert np.diff(np.flatnonzero(data["truncated"])).tolist() == list(range(2, 12))


# ------------------------------------------------------------------------------------- files to be refused
def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m demos --task lift"):
        demos.load(tmp_path / "none.hdf5", "lift")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_a_truncated_file_is_refused(copy, keep):
    content = open(copy, "rb").read()
    open(copy, "wb").write(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ValueError, match="copy.hdf5.*not a readable HDF5"):
        demos.load(copy)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.hdf5").write_text("not HDF5 at all")
    with pytest.raises(ValueError, match="notes.hdf5.*not a readable HDF5"):
        demos.load(tmp_path / "notes.hdf5")


def replace(group, key, value):
    del group[key]
    group[key] = value


SPOILERS = {
    "no data": (lambda f: f.pop("data"), "key 'data' is missing"),
    "no env_args": (lambda f: f["data"].attrs.pop("env_args"), "'env_args' of 'data' is missing"),
    "bad env_args": (lambda f: f["data"].attrs.modify("env_args", "{"), "'env_args' is not JSON"),
    "no JSON object": (lambda f: f["data"].attrs.modify("env_args", "[]"), "'env_args' is not a JSON object"),
    "another world": (lambda f: f["data"].attrs.modify("env_args", '{"env_name": "Door"}'), "'env_args' is for Door"),
    "a world without settings": (lambda f: f["data"].attrs.modify("env_args", '{"env_name": "Lift"}'),
                                 "'env_args' has no 'env_kwargs'"),
    "unknown task": (lambda f: f["data"].attrs.modify("task", "lfit"), "unknown task 'lfit'"),
    "shaped": (
        lambda f: f["data"].attrs.modify("env_args", '{"env_name": "Lift", "env_kwargs": {"reward_shaping": true}}'),
        "'rewards' are shaped",
    ),
    "no demo": (lambda f: [f["data"].pop(key) for key in list(f["data"])], "holds no demonstration"),
    "no actions": (lambda f: f["data/demo_1"].pop("actions"), "demo_1: key 'actions' is missing"),
    "no rewards": (lambda f: f["data/demo_1"].pop("rewards"), "demo_1: key 'rewards' is missing"),
    "no object": (lambda f: f["data/demo_1/obs"].pop("object"), "demo_1: key 'obs/object' is missing"),
    "no next": (lambda f: f["data/demo_1"].pop("next_obs"), "demo_1: key 'next_obs/robot0_eef_pos' is missing"),
    "wide": (lambda f: replace(f["data/demo_0"], "actions", np.zeros((9, 8))), r"'actions' must be \(T, 7\), found"),
    "can": (lambda f: replace(f["data/demo_0/obs"], "object", np.zeros((9, 14))), r"'obs/object' must be \(T, 10\)"),
    "text": (lambda f: replace(f["data/demo_0"], "actions", "hello"), "'actions' is not an array of numbers"),
    "nan": (lambda f: f["data/demo_2/actions"].__setitem__((3, 2), np.nan), "demo_2: key 'actions' has non-finite"),
    "inf": (lambda f: f["data/demo_2/obs/object"].__setitem__((3, 2), np.inf), "'obs/object' has non-finite"),
    "short": (lambda f: replace(f["data/demo_0"], "rewards", np.zeros(3)), "same positive length"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_bad_files_are_refused_by_file_and_key(copy, name):
    spoil, message = SPOILERS[name]
    with h5py.File(copy, "r+") as file:
        spoil(file)
    with pytest.raises(ValueError, match=message) as caught:
        demos.load(copy)
    assert "copy.hdf5" in str(caught.value)


def test_a_task_without_an_expert_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(demos.EXPERTS, "can")
    with pytest.raises(ValueError, match="no scripted expert for task 'can'; experts: lift, square"):
        demos.collect("can", 1, 0, tmp_path / "can.hdf5")


# ------------------------------------------------------------------------------------------ which file is taken
@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty home and working directory; demonstrations are made, and downloads answered, by writing a word."""
    def collect(task, episodes, seed, path, workers, **_):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"made {episodes} {seed}")

    def fetch(urls, target):
        target.parent.mkdir(parents=True)
        target.write_text("downloaded")
        return target

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demos, "collect", collect)
    monkeypatch.setattr(demos.download, "fetch", fetch)
    return tmp_path


def test_the_cpu_preset_makes_its_own_once(places, capsys):
    (places / "home/.robomimic/lift/mh").mkdir(parents=True)
    (places / "home/.robomimic/lift/mh/low_dim_v15.hdf5").write_text("public")  # not looked for: the same everywhere
    path = demos.obtain("lift", "cpu", None, 7, 3)
    assert path.read_text() == "made 7 3" and "made just now" in capsys.readouterr().out
    path.write_text("kept")
    assert demos.obtain("lift", "cpu", None, 7, 3).read_text() == "kept" and "made earlier" in capsys.readouterr().out


def test_the_paper_preset_looks_then_downloads_then_makes(places, capsys, monkeypatch):
    path = demos.obtain("can", "paper")
    assert path.read_text() == "downloaded" and "downloading" in capsys.readouterr().out
    path.write_text("mine")
    assert demos.obtain("can", "paper").read_text() == "mine" and "found" in capsys.readouterr().out

    def offline(*_):
        raise demos.download.DownloadError("no mirror delivered")

    monkeypatch.setattr(demos.download, "fetch", offline)
    assert demos.obtain("lift", "paper", None, 300).read_text() == "made 300 0"
    assert "no mirror delivered. Making 300 episodes instead" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_named_file_is_taken_and_never_made(places, preset, path):
    assert demos.obtain("lift", preset, "~/some.hdf5") == places / "home/some.hdf5"
    (places / "home").mkdir()
    shutil.copy(path, places / "home/some.hdf5")
    assert demos.env_args("~/some.hdf5") == demos.env_args(path)


def test_a_resumed_run_makes_its_own_missing_file_again(places):
    path = demos.obtain("lift", "cpu")
    path.unlink()
    assert demos.obtain("lift", "cpu", str(path)).read_text() == "made 20 0"


def test_play_that_serves_the_task_has_a_name_of_its_own(places, monkeypatch):
    """The presets' play data of equally many episodes differ, so one must never be taken for the other."""
    def offline(*_):
        raise demos.download.DownloadError("no mirror delivered")

    monkeypatch.setattr(demos.download, "fetch", offline)
    assert demos.obtain("scene", "cpu", None, 5) != demos.obtain("scene", "paper", None, 5)
