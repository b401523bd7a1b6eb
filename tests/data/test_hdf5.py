"""robomimic's HDF5: what is written and read, how a demonstration ends, files to be refused.

    python -m pytest tests/data/test_hdf5.py

Not here: npz (test_npz.py), hostile files (test_hostile.py).
"""

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzz import peak_memory
from recordings import WORLD, write_hdf5

import demos
import envs
from demos import hdf5

h5py = pytest.importorskip("h5py")
pytestmark = pytest.mark.sim
EPISODES = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    return demos.collect("lift", EPISODES, 1, folder / "lift.hdf5", progress=False)


@pytest.fixture
def copy(path, tmp_path):
    return shutil.copy(path, tmp_path / "copy.hdf5")


def test_a_failed_replacement_leaves_the_old_file(path, copy, monkeypatch):
    before = Path(copy).read_bytes()
    monkeypatch.setattr("demos.hdf5.save_episode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demos.save(copy, envs.get_task("lift"), {}, [{"action": [0]}])
    assert Path(copy).read_bytes() == before


def test_robomimics_own_dataset_opens_the_file(path):
    pytest.importorskip("robomimic")
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    keys = list(envs.ROBOMIMIC_KEYS)
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys}})
    dataset = SequenceDataset(
        str(path),
        obs_keys=keys,
        dataset_keys=("actions", "rewards", "dones"),
        seq_length=5,
        pad_seq_length=True,
        load_next_obs=True,
        hdf5_cache_mode=None,
        filter_by_attribute="train",
    )
    data = demos.load(path)
    assert dataset.n_demos == EPISODES and len(dataset) == len(data["obs"])
    item = dataset[0]
    assert np.array_equal(
        np.concatenate([item["obs"][key] for key in keys], axis=1), data["obs"][:5]
    )
    assert np.array_equal(
        np.concatenate([item["next_obs"][key] for key in keys], axis=1), data["next_obs"][:5]
    )
    assert np.array_equal(item["actions"], data["action"][:5])


# ---- labels


def test_the_first_success_ends_a_demonstration_and_a_failure_is_truncated(tmp_path):
    data = demos.load(write_hdf5(tmp_path / "a.hdf5", [[0, 0, 2, 1, 1], [0, 0]]), "lift")
    assert data["reward"].tolist() == [0, 0, 1, 0, 0]
    assert data["terminated"].tolist() == [False, False, True, False, False]
    assert data["truncated"].tolist() == [False, False, False, False, True]


def test_actions_beyond_the_limits_are_refused_or_cut_where_that_is_asked_for(tmp_path):
    plain = demos.load(write_hdf5(tmp_path / "1.hdf5", [[0] * 20]), "lift")["action"]
    far = write_hdf5(tmp_path / "3.hdf5", [[0] * 20], reach=3)
    with pytest.raises(ValueError, match=r"3.hdf5: data/demo_0: .*67 % .* outside \[-1, 1\]"):
        demos.load(far, "lift")
    wide = demos.load(far, "lift", clip_actions=True)["action"]
    assert np.allclose(wide, np.clip(3 * plain, -1, 1))
    assert np.abs(plain).max() < 1 == np.abs(wide).max()
    rounded = write_hdf5(tmp_path / "r.hdf5", [[0] * 200], reach=1.0005)
    assert np.abs(demos.load(rounded, "lift")["action"]).max() == 1


def test_a_saved_episode_says_how_it_ended(tmp_path):
    """By success, by failure, by time; robomimic's dones are set for the first two."""
    episodes = [
        {
            "obs": np.zeros((4, 19)),
            "action": np.zeros((3, 7)),
            "success": [False, False, won],
            "seed": 5,
            "states": np.zeros((3, 2)),
            "failed": failed,
        }
        for won, failed in ((True, False), (False, True), (False, False))
    ]
    path = demos.save(
        tmp_path / "x.hdf5", envs.TASKS["lift"], {"env_name": "Lift", "env_kwargs": {}}, episodes
    )
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == 9
        found = [file[f"data/demo_{i}"] for i in range(3)]
        assert [one["dones"][:].tolist() for one in found] == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
        assert [one.attrs["num_samples"] for one in found] == [3, 3, 3]
    data = demos.load(path)
    assert np.flatnonzero(data["terminated"]).tolist() == [2, 5] and np.flatnonzero(
        data["truncated"]
    ).tolist() == [8]
    assert data["reward"].tolist() == [0, 0, 1] + [0] * 6


def test_demonstrations_are_read_in_numerical_order(tmp_path):
    data = demos.load(
        write_hdf5(tmp_path / "a.hdf5", [[0] * (index + 1) for index in range(11)]), "lift"
    )
    assert np.diff(np.flatnonzero(data["truncated"])).tolist() == list(range(2, 12))


# ---- files to be refused


def test_a_missing_file_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m demos --task lift"):
        demos.load(tmp_path / "none.hdf5", "lift")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_a_truncated_file_is_refused(copy, keep):
    content = Path(copy).read_bytes()
    length = keep if keep >= 1 else keep * len(content)
    Path(copy).write_bytes(content[: int(length)])
    with pytest.raises(ValueError, match="copy.hdf5.*not a readable HDF5"):
        demos.load(copy)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.hdf5").write_text("not HDF5 at all")
    with pytest.raises(ValueError, match="notes.hdf5.*not a readable HDF5"):
        demos.load(tmp_path / "notes.hdf5")


def replace(group, key, value):
    del group[key]
    group[key] = value


def set_controller(file, controller):
    arguments = json.loads(file["data"].attrs["env_args"])
    arguments["env_kwargs"]["controller_configs"] = controller
    file["data"].attrs["env_args"] = json.dumps(arguments)


def replace_by_group(group, key):
    del group[key]
    group.create_group(key)


def other_file(file):
    path = Path(file.filename).with_name("other.hdf5")
    with h5py.File(path, "w") as other:
        other["secret"] = np.zeros((300, 7))
    return path.name


def store_elsewhere(file, group, key):
    steps = len(group[key])
    secret = Path(file.filename).with_name("secret.bin")
    secret.write_bytes(bytes(steps * 56))
    del group[key]
    where = [(str(secret), 0, steps * 56)]
    group.create_dataset(key, (steps, 7), "f8", external=where)


def claim(group, key, shape):
    """Declare an array of which nothing is stored."""
    del group[key]
    group.create_dataset(key, shape, "f8", chunks=(1000, 7))


SPOILERS = {
    "no data": (lambda f: f.pop("data"), "key 'data' is missing"),
    "no env_args": (lambda f: f["data"].attrs.pop("env_args"), "'env_args' of 'data' is missing"),
    "bad env_args": (lambda f: f["data"].attrs.modify("env_args", "{"), "'env_args' is not JSON"),
    "no JSON object": (
        lambda f: f["data"].attrs.modify("env_args", "[]"),
        "'env_args' is not a JSON object",
    ),
    "another world": (
        lambda f: f["data"].attrs.modify("env_args", '{"env_name": "Door"}'),
        "'env_args' is for Door",
    ),
    "a world without settings": (
        lambda f: f["data"].attrs.modify("env_args", '{"env_name": "Lift"}'),
        "'env_args' has no 'env_kwargs'",
    ),
    "unknown task": (lambda f: f["data"].attrs.modify("task", "lfit"), "unknown task 'lfit'"),
    "shaped": (
        lambda f: f["data"].attrs.modify(
            "env_args", '{"env_name": "Lift", "env_kwargs": {"reward_shaping": true}}'
        ),
        "'rewards' are shaped",
    ),
    "no demo": (
        lambda f: [f["data"].pop(key) for key in list(f["data"])],
        "holds no demonstration",
    ),
    "no actions": (lambda f: f["data/demo_1"].pop("actions"), "demo_1: key 'actions' is missing"),
    "no rewards": (lambda f: f["data/demo_1"].pop("rewards"), "demo_1: key 'rewards' is missing"),
    "no object": (
        lambda f: f["data/demo_1/obs"].pop("object"),
        "demo_1: key 'obs/object' is missing",
    ),
    "no next": (
        lambda f: f["data/demo_1/next_obs"].pop("robot0_eef_pos"),
        "demo_1: key 'next_obs/robot0_eef_pos' is missing",
    ),
    "env_args a number": (
        lambda f: f["data"].attrs.create("env_args", 7),
        "attribute 'env_args' is not JSON text",
    ),
    "env_args an array": (
        lambda f: f["data"].attrs.create("env_args", np.zeros(3)),
        "attribute 'env_args' is not a single value",
    ),
    "env_args without a bottom": (
        lambda f: f["data"].attrs.create("env_args", "[" * 60_000),
        "not a readable HDF5 file",
    ),
    "absolute": (
        lambda f: set_controller(f, {"body_parts": {"right": {"input_type": "absolute"}}}),
        "actions are absolute poses",
    ),
    "absolute, as robosuite 1.4 has it": (
        lambda f: set_controller(f, {"type": "OSC_POSE", "control_delta": False}),
        "actions are absolute poses",
    ),
    "a demonstration that is an array": (
        lambda f: replace(f["data"], "demo_1", np.zeros(3)),
        "data/demo_1 is not a demonstration",
    ),
    "a group for an array": (
        lambda f: replace_by_group(f["data/demo_1"], "actions"),
        "'actions' is not an array of numbers",
    ),
    "a dangling link": (
        lambda f: replace(f["data/demo_1"], "actions", h5py.SoftLink("/nowhere")),
        "demo_1: key 'actions' is missing",
    ),
    "a link to itself": (
        lambda f: replace(f["data/demo_1"], "actions", h5py.SoftLink("/data/demo_1/actions")),
        "copy.hdf5: ",
    ),
    "a link to another file": (
        lambda f: replace(f["data/demo_1"], "actions", h5py.ExternalLink(other_file(f), "/secret")),
        "'actions' lies in another file",
    ),
    "a link to a file that is gone": (
        lambda f: replace(f["data/demo_1"], "actions", h5py.ExternalLink("gone.hdf5", "/x")),
        "'actions' lies in another file",
    ),
    "a link to a demonstration elsewhere": (
        lambda f: replace(f["data"], "demo_1", h5py.ExternalLink(other_file(f), "/")),
        "'demo_1' lies in another file",
    ),
    "storage in another file": (
        lambda f: store_elsewhere(f, f["data/demo_1"], "actions"),
        "'actions' lies in another file",
    ),
    "a claim": (
        lambda f: claim(f["data/demo_1"], "actions", (160_000_000, 7)),
        r"claims \(160000000, 7\).* than a file of .* kB can hold",
    ),
    "wide": (
        lambda f: replace(f["data/demo_0"], "actions", np.zeros((9, 8))),
        r"'actions' must be \(T, 7\), found",
    ),
    "can": (
        lambda f: replace(f["data/demo_0/obs"], "object", np.zeros((9, 14))),
        r"'obs/object' must be \(T, 10\)",
    ),
    "text": (
        lambda f: replace(f["data/demo_0"], "actions", "hello"),
        "'actions' is not an array of numbers",
    ),
    "nan": (
        lambda f: f["data/demo_2/actions"].__setitem__((3, 2), np.nan),
        "demo_2: key 'actions' has non-finite",
    ),
    "inf": (
        lambda f: f["data/demo_2/obs/object"].__setitem__((3, 2), np.inf),
        "'obs/object' has non-finite",
    ),
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


def test_a_claim_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "finite", lambda *_: pytest.fail("it was read"))
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    with h5py.File(path, "r+") as file:
        claim(file["data/demo_0"], "actions", (160_000_000, 7))
    with pytest.raises(ValueError, match="claims"):
        demos.load(path)


@pytest.mark.parametrize("number, name", [(11, "EAGAIN"), (37, "ENOLCK")])
def test_a_lock_is_not_called_damage(tmp_path, monkeypatch, number, name):
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])

    def refuse(*_):
        raise OSError(
            f"Unable to synchronously open file (unable to lock file, errno = {number}, {name})"
        )

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(ValueError, match="in use.*HDF5_USE_FILE_LOCKING=FALSE") as caught:
        demos.load(path)
    assert "fetch" not in str(caught.value) and "again" not in str(caught.value)


def test_a_file_that_another_program_writes_is_in_use(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="a.hdf5 is in use by another program"):
            demos.load(path)


def test_a_folder_and_an_address_are_named_as_such(tmp_path):
    write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    with pytest.raises(ValueError, match="is a folder: name a file in it, for instance .*a.hdf5"):
        demos.load(tmp_path, "lift")
    with pytest.raises(ValueError, match="is an address: download the file"):
        demos.load("https://example.org/low_dim.hdf5", "lift")
    with pytest.raises(FileNotFoundError, match="--out '.*with space.hdf5'"):
        demos.load(tmp_path / "with space.hdf5", "lift")


def test_a_heap_in_which_the_library_would_loop_for_ever_is_refused(tmp_path):
    """Its free space has no size. Not loaded here: without the check that would never end."""
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    content = bytearray(path.read_bytes())
    place = content.index(hdf5.HEAP) + 16
    hdf5.check_heaps(path)
    while int.from_bytes(content[place : place + 2], "little"):  # the text, then the free space
        place += 16 + (int.from_bytes(content[place + 8 : place + 16], "little") + 7) // 8 * 8
    for size in (0, 2**64 - 16):
        content[place + 8 : place + 16] = size.to_bytes(8, "little")
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.hdf5: its text heap is damaged"):
            hdf5.check_heaps(path)
    (tmp_path / "empty.hdf5").touch()
    hdf5.check_heaps(tmp_path / "empty.hdf5")


def test_a_text_that_claims_much_takes_no_memory(tmp_path):
    """4 GB: HDF5 allocates what a text claims before it looks for it."""
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    content = bytearray(path.read_bytes())
    text = json.dumps(WORLD).encode()
    heap = content.index(hdf5.HEAP).to_bytes(8, "little")
    record = content.index(len(text).to_bytes(4, "little") + heap)
    content[record : record + 12] = b"\xff" * 12
    path.write_bytes(content)
    before = peak_memory()
    with pytest.raises(ValueError, match="a.hdf5: not a readable HDF5 file"):
        demos.load(path, "lift")
    assert peak_memory() - before < 300


# ---- files as others write them


def test_without_next_observations_they_are_those_of_the_next_step(tmp_path):
    rewards = [[0, 0, 0, 1], [0, 0, 0]]
    full = demos.load(write_hdf5(tmp_path / "full.hdf5", rewards), "lift")
    data = demos.load(write_hdf5(tmp_path / "old.hdf5", rewards, next_obs=False), "lift")
    keep = [0, 1, 2, 3, 4, 5]  # the last step of a failure has no next observation
    for name in ("obs", "action", "reward", "terminated"):
        assert np.array_equal(data[name], full[name][keep])
    inside = [0, 1, 2, 4, 5]
    assert np.array_equal(data["next_obs"][inside], full["next_obs"][inside])
    assert np.flatnonzero(data["truncated"]).tolist() == [5]
    one = write_hdf5(tmp_path / "one.hdf5", [[0]], next_obs=False)
    with pytest.raises(ValueError, match="a single step without 'next_obs'"):
        demos.load(one, "lift")


def test_a_filter_chooses_demonstrations(tmp_path, capsys):
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * (index + 1) for index in range(4)])
    with h5py.File(path, "r+") as file:
        file.create_dataset("mask/train", data=np.array(["demo_3", "demo_1"], dtype="S"))
        file.create_dataset("mask/bad", data=np.array(["demo_9"], dtype="S"))
    data = demos.load(path, "lift", filter_key="train")
    assert "filter 'train': 2 of 4 demonstrations" in capsys.readouterr().out
    assert np.flatnonzero(data["truncated"]).tolist() == [1, 5]
    assert len(demos.load(path, "lift", 1, filter_key="train")["obs"]) == 2
    capsys.readouterr()
    assert len(demos.load(path, "lift")["obs"]) == 10
    told = capsys.readouterr().out
    assert "all 4 demonstrations; --filter-key takes those of bad (1), train (2)" in told
    with pytest.raises(ValueError, match="a.hdf5: has no filter 'valid'; its filters: bad, train"):
        demos.load(path, "lift", filter_key="valid")
    with pytest.raises(ValueError, match="mask/bad lists demo_9, which is not there"):
        demos.load(path, "lift", filter_key="bad")


def test_observations_are_taken_in_the_order_asked_for(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    keys = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
    data = demos.load(path, "lift", obs_keys=keys)
    assert np.array_equal(data["obs"][:, :10], demos.load(path, "lift")["obs"][:, 9:])
    with pytest.raises(ValueError, match="have 13 numbers, task 'lift' has 19"):
        demos.load(path, "lift", obs_keys=keys[:2])
    with pytest.raises(ValueError, match="key 'obs/wrist' is missing"):
        demos.load(path, "lift", obs_keys=["wrist"])
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs/image"] = np.zeros((5, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"'obs/image' holds images or tables of \(8, 8, 3\)"):
        demos.load(path, "lift", obs_keys=["image"])


def test_a_file_without_env_args_is_told_what_converts_it(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [[0] * 5])
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_args"]
    with pytest.raises(ValueError, match="'env_args' of 'data' is missing.*scripts/conversion"):
        demos.load(path, "lift")
    with h5py.File(path, "r+") as file:  # as robosuite's own collector writes
        file["data"].attrs["env"] = "Lift"
        file["data"].attrs["env_info"] = "{}"
    with pytest.raises(ValueError, match="convert_robosuite --dataset .*dataset_states_to_obs"):
        demos.load(path, "lift")


def test_where_nothing_succeeds_that_is_said(tmp_path, capsys):
    demos.load(write_hdf5(tmp_path / "a.hdf5", [[0] * 5, [0, 0]]), "lift")
    told = capsys.readouterr().out
    assert "no demonstration" in told and "succeeds: every reward is 0" in told
    assert f"python -m demos --check --task lift --data {tmp_path / 'a.hdf5'}" in told
    demos.load(write_hdf5(tmp_path / "b.hdf5", [[0] * 5, [0, 1]]), "lift")
    assert capsys.readouterr().out == ""


def test_a_fingerprint_tells_other_data_of_the_same_size(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [[0, 0, 1], [0, 0]])
    data = demos.load(path, "lift")
    first = demos.fingerprint(data)
    assert (first["steps"], first["episodes"]) == (5, 2)
    assert demos.fingerprint(demos.load(path, "lift")) == first
    for name in ("obs", "action", "reward", "next_obs"):
        changed = data | {name: data[name] + np.float32(1e-3)}
        assert demos.fingerprint(changed)["checksum"] != first["checksum"]
