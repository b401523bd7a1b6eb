"""npz files: how their rows become steps, in the layouts of OGBench and D4RL; files to be refused.

    python -m pytest tests/data/test_npz.py

Not here: how play is made (test_play.py), hostile files (test_hostile.py).
"""

import io
import pickle
import zipfile

import numpy as np
import pytest
from recordings import write_npz, write_play

import demos
import envs
from demos import npz
from simulators.ogbench_env import met

TASK = envs.TASKS["cube-double"]


def solved_qpos(rows, at):
    qpos = np.zeros((rows, 14 + 7 * len(TASK.goal.cubes)), np.float32)
    for index, cube in enumerate(TASK.goal.cubes):
        qpos[at, 14 + 7 * index : 17 + 7 * index] = cube
    return qpos


# ---- OGBench's layout


def test_a_step_is_labelled_by_the_state_it_leads_to(tmp_path):
    """Of 7 states 3 and 4 are solved: step 2 ends an episode, steps 3 and 4 are left out."""
    qpos = solved_qpos(14, slice(3, 5))
    qpos[9, 14:17] = TASK.goal.cubes[0]  # one cube of two
    path = write_play(tmp_path / "x.npz", qpos=qpos, actions=np.full((14, 5), 1.0005, np.float32))
    data = npz.load(path, TASK)
    assert list(data["obs"][:, 0]) == [0, 1, 2, 5, 7, 8, 9, 10, 11, 12]
    assert (data["action"] == 1).all()
    assert list(data["next_obs"][:, 0]) == [1, 2, 3, 6, 8, 9, 10, 11, 12, 13]
    assert list(np.flatnonzero(data["terminated"])) == [2]
    assert list(np.flatnonzero(data["truncated"])) == [3, 9]
    assert list(data["reward"]) == [-2, -2, 0, -2, -2, -1, -2, -2, -2, -2]
    first = npz.load(path, TASK, episodes=1)
    assert {key: len(value) for key, value in first.items()} == dict.fromkeys(data, 4)
    assert all(first[key].dtype == np.float32 for key in ("obs", "action", "reward", "next_obs"))


def test_a_success_in_the_last_state_is_terminal_not_truncated(tmp_path):
    data = npz.load(write_play(tmp_path / "x.npz", qpos=solved_qpos(14, 6)), TASK)
    assert (data["terminated"][5], data["truncated"][5]) == (True, False)
    assert data["truncated"][-1]


def test_without_terminals_the_recording_simply_stops(tmp_path):
    data = npz.load(write_play(tmp_path / "x.npz", terminals=np.zeros(14, bool)), TASK)
    assert len(data["obs"]) == 13 and list(np.flatnonzero(data["truncated"])) == [12]


@pytest.mark.sim
@pytest.mark.parametrize("name", ["scene", "puzzle-3x3", "cube-double", "cube-triple"])
def test_conditions_are_those_of_ogbenchs_own_relabelling(name):
    """`relabel_dataset` labels the state a step begins in: reward and mask are our conditions."""
    pytest.importorskip("ogbench")
    from ogbench.relabel_utils import relabel_dataset

    env = envs.make_env(name)
    env.reset(seed=0)
    goal = env.task.goal
    solved = env.simulator._data.qpos.copy()
    for index, cube in enumerate(goal.cubes):
        solved[14 + 7 * index : 17 + 7 * index] = cube
    if goal.slides:
        solved[-2:] = goal.slides
    rng = np.random.default_rng(0)
    qpos = solved + rng.normal(0, 0.02, (400, len(solved)))
    dataset = {"qpos": qpos.astype(np.float32)}
    if goal.buttons:
        flipped = rng.random((400, len(goal.buttons))) < 0.05
        dataset["button_states"] = np.array(goal.buttons) ^ flipped
    relabel_dataset(env.task.env_name, env.simulator, dataset)
    held = met(goal, dataset["qpos"], dataset.get("button_states"))
    assert np.array_equal(dataset["rewards"], held.sum(-1) - env.task.conditions)
    assert np.array_equal(dataset["masks"], 1.0 - held.all(-1))
    assert 20 < held.all(-1).sum() < 380
    env.close()


# ---- D4RL's layout


def rows(count=10, **changes):
    """Rows of cube-double whose observations count, each row's next being the one after it."""
    numbers = np.arange(count, dtype=np.float32)
    columns = {
        "observations": np.repeat(numbers[:, None], TASK.obs_dim, 1),
        "next_observations": np.repeat(numbers[:, None] + 1, TASK.obs_dim, 1),
        "actions": np.full((count, 5), 0.5),
        "rewards": -numbers,
        "terminals": numbers == 3,
        "timeouts": numbers == 7,
    }
    return columns | changes


def flags(data):
    return [list(np.flatnonzero(data[name])) for name in ("terminated", "truncated")]


def test_every_row_with_a_next_observation_is_a_step(tmp_path):
    data = npz.load(write_npz(tmp_path / "x.npz", rows()), TASK)
    assert flags(data) == [[3], [7, 9]]
    assert list(data["reward"]) == list(-np.arange(10.0))
    assert list(data["next_obs"][:, 0]) == list(range(1, 11))
    assert data["action"].dtype == data["next_obs"].dtype == np.float32
    assert flags(npz.load(tmp_path / "x.npz", TASK, episodes=2)) == [[3], [7]]


def test_without_next_observations_a_row_whose_next_state_is_unknown_is_dropped(tmp_path):
    data = npz.load(write_npz(tmp_path / "x.npz", rows(next_observations=None)), TASK)
    assert list(data["obs"][:, 0]) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert list(data["next_obs"][:, 0]) == [1, 2, 3, 3, 5, 6, 7, 9]  # a terminal's is not used
    assert flags(data) == [[3], [6, 7]]


def test_without_timeouts_an_episode_ends_where_the_next_row_does_not_go_on(tmp_path):
    columns = rows(timeouts=None)
    columns["observations"][6:] += 100
    columns["next_observations"][6:] += 100
    data = npz.load(write_npz(tmp_path / "x.npz", columns), TASK)
    assert flags(data) == [[3], [5, 9]]
    columns["next_observations"] += 50
    with pytest.raises(ValueError, match="x.npz: 'next_observations' seldom equal.*'timeouts'"):
        npz.load(write_npz(tmp_path / "x.npz", columns), TASK)


def test_where_success_is_paid_the_first_one_ends_the_demonstration(tmp_path):
    """Lift, whose files may also be npz: one rule for every format."""
    columns = rows()
    for name in ("observations", "next_observations"):
        columns[name] = columns[name][:, :19]
    columns |= {"actions": np.full((10, 7), 0.5), "terminals": np.zeros(10)}
    columns["rewards"] = np.isin(np.arange(10), (2, 3, 4)) * 2.0
    data = demos.load(write_npz(tmp_path / "x.npz", columns), "lift")
    assert list(data["obs"][:, 0]) == [0, 1, 2, 8, 9]
    assert list(data["reward"]) == [0, 0, 1, 0, 0] and flags(data) == [[2], [4]]


def test_what_an_npz_file_cannot_say_is_refused(tmp_path):
    path = write_npz(tmp_path / "x.npz", rows())
    with pytest.raises(ValueError, match="x.npz: an npz file does not name its task"):
        demos.load(path)
    with pytest.raises(ValueError, match="filters are for HDF5"):
        demos.load(path, TASK, filter_key="train")


# ---- files to be refused

EMPTY = {"terminals": (), "observations": (37,), "actions": (5,), "qpos": (28,)}
BAD = {
    "missing": ({"qpos": None}, "key 'qpos' is missing"),
    "of another task": (
        {"task": "cube-triple"},
        r"key 'observations' must be \(T, 37\), found \(14, 46\)",
    ),
    "without buttons": ({"task": "scene", "button_states": None}, "key 'button_states' is missing"),
    "text": ({"actions": np.full((14, 5), "a")}, "key 'actions' is not an array of numbers"),
    "nan": ({"observations": np.full((14, 37), np.nan)}, "key 'observations' has non-finite"),
    "beyond float32": ({"observations": np.full((14, 37), 1e39)}, "'observations' has non-finite"),
    "flat": ({"actions": np.zeros(14)}, r"key 'actions' must be \(T, 5\), found \(14,\)"),
    "scalar": ({"terminals": np.array(True)}, r"key 'terminals' must be \(T,\), found \(\)"),
    "ragged": ({"actions": np.zeros((13, 5))}, "same positive length"),
    "no rows": ({key: np.zeros((0, *shape)) for key, shape in EMPTY.items()}, "at least 2"),
    "nothing but ends": ({"terminals": np.ones(14, bool)}, "no step to learn from"),
    "pickled": ({"actions": np.array([{}] * 14)}, "'actions' is not an array of numbers"),
    "wide actions": (
        {"actions": np.tile([0.5, 0.5, 0.5, 0.5, 1.4], (14, 1))},
        r"20 % of the action values lie outside \[-1, 1\], up to 1.4",
    ),
    "neither goal nor reward": ({"task": "cube-double", "qpos": None}, "'qpos' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(tmp_path, case):
    changes, message = BAD[case]
    path = write_play(tmp_path / "bad.npz", **changes)
    task = "scene" if case == "without buttons" else "cube-double"
    with pytest.raises(ValueError, match=message) as caught:
        npz.load(path, task)
    assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)


def test_actions_beyond_the_limits_are_cut_where_that_is_asked_for(tmp_path):
    path = write_play(tmp_path / "x.npz", actions=np.full((14, 5), 1.5))
    assert (npz.load(path, TASK, clip_actions=True)["action"] == 1).all()


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "npy", "pickle", "flipped"])
def test_files_that_are_no_npz_are_refused_by_name(tmp_path, kind):
    path = write_play(tmp_path / "x.npz")
    whole = path.read_bytes()
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        flipped = whole[:700] + bytes([whole[700] ^ 255]) + whole[701:]
        contents = {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"Not found",
            "pickle": pickle.dumps(1),
            "flipped": flipped,
        }
        path.write_bytes(contents[kind])
    with pytest.raises(ValueError, match="not readable as npz") as caught:
        demos.load(path, "cube-double")
    assert str(caught.value).startswith(f"{path}: ")


def array_bytes(header_shape, values):
    """An npy member whose header claims this shape."""
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": header_shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + values.tobytes()


def replace_member(path, name, content, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path) as archive:
        members = {one: archive.read(one) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for one, old in members.items():
            archive.writestr(one, content if one == f"{name}.npy" else old)
    return path


def test_a_small_file_that_claims_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "member", lambda *_: pytest.fail("it was read"))
    path = write_play(tmp_path / "x.npz")
    claim = array_bytes((160_000_000, 5), np.zeros(70, np.float32))
    with pytest.raises(ValueError, match=r"'actions' claims \(160000000, 5\), 3,200 MB in all"):
        npz.load(replace_member(path, "actions", claim), TASK)
    claim = array_bytes((20, 5), np.zeros(70, np.float32))
    with pytest.raises(ValueError, match="does not hold as much"):
        npz.load(replace_member(path, "actions", claim), TASK)
    bomb = array_bytes((14_000_000, 5), np.zeros((14_000_000, 5), np.float32))
    assert replace_member(path, "actions", bomb).stat().st_size < 1e6
    with pytest.raises(ValueError, match="280 MB in all, more than a file of .* kB can hold"):
        npz.load(path, TASK)


def test_a_file_larger_than_the_free_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("demos.columns.free_memory", lambda: 1000.0)
    with pytest.raises(ValueError, match="x.npz needs more than 0.0 GB of memory.*fewer demonstr"):
        npz.load(write_play(tmp_path / "x.npz"), TASK)


@pytest.mark.parametrize("content", [b"", b"no magic at all", b"\x93NUMPY\x09\x00", b"((((" * 2000])
def test_members_that_are_no_arrays_are_refused(tmp_path, content):
    path = replace_member(write_play(tmp_path / "x.npz"), "qpos", content)
    with pytest.raises(ValueError, match="x.npz: not readable as npz"):
        npz.load(path, TASK)


def test_more_trajectories_than_there_are_and_no_file_are_refused(tmp_path):
    path = write_play(tmp_path / "x.npz")
    for episodes in (0, 3):
        message = f"holds 2 trajectories, {episodes} were asked for"
        with pytest.raises(ValueError, match=message):
            npz.load(path, "cube-double", episodes)
    with pytest.raises(FileNotFoundError, match="python -m demos --task scene --out"):
        npz.load(tmp_path / "none.npz", "scene")


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_play(tmp_path / "x.npz")
    old = path.read_bytes()

    def fail(file, **columns):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(KeyboardInterrupt):
        npz.save(path, {})
    assert path.read_bytes() == old and [one.name for one in tmp_path.iterdir()] == ["x.npz"]
