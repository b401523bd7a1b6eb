"""Checkpoints survive kills and full disks; what is read is verified first.

python -m pytest tests/training/test_checkpoints.py      # 20 s
"""

import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from logbooks import ROOT, full_disk

from logbook import (
    VERSION,
    UserError,
    keep_rate,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)

KILL = """
import os, signal, sys, time, torch
from pathlib import Path
from logbook import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path, cut = Path(sys.argv[1]), 0
temporary = path.with_name(".last.pt.tmp")
save_checkpoint(path, {"step": 0, "x": torch.zeros(500_000)})
for attempt in range(8):
    before = load_checkpoint(path)["step"]
    number = path.stat().st_ino
    patience = time.monotonic() + 5
    temporary.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        for step in range(before + 1, 10 ** 9):
            save_checkpoint(path, {"step": step, "x": torch.full((500_000,), float(step))})
    # one save is complete and another has begun: now, or a little later
    while (path.stat().st_ino == number or not temporary.exists()) and time.monotonic() < patience:
        pass
    time.sleep(0.0005 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += temporary.exists()
    state = load_checkpoint(path)
    assert state["step"] > before and bool((state["x"] == state["step"]).all()), state
print(cut, len(os.listdir(path.parent)))
"""


def test_kill_during_a_save_leaves_a_loadable_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "last.pt")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    cut, files = map(int, done.stdout.split())
    assert cut > 0, "no kill fell into a save: the test shows nothing"
    assert files <= 2  # what interrupted saves leave does not pile up


def test_file_reaches_the_disk_before_it_takes_the_name_and_the_folder_after(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    assert calls == ["fsync", "replace", "fsync"]


def test_full_disk_keeps_the_previous_checkpoint(book):
    book.save("last.pt", {"step": 1, "x": torch.zeros(1000)})
    with full_disk(100_000), pytest.raises(UserError) as refusal:
        book.save("last.pt", {"step": 2, "x": torch.zeros(1_000_000)})
    assert "last.pt" in str(refusal.value) and "File too large" in str(refusal.value)
    assert "previous checkpoint is intact" in str(refusal.value) and "\n" not in str(refusal.value)
    assert book.load("last.pt")["step"] == 1
    assert not list(book.folder.glob(".*.tmp"))
    with full_disk(100_000), pytest.raises(UserError, match="no checkpoint was written"):
        book.save("best.pt", {"step": 2, "x": torch.zeros(1_000_000)})


def test_interrupted_save_leaves_the_old_checkpoint_and_no_temporary_file(book, monkeypatch):
    def interrupted(_, file):
        file.write(b"half")
        raise KeyboardInterrupt

    book.save("last.pt", {"step": 1})
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        book.save("last.pt", {"step": 2})
    assert book.load("last.pt")["step"] == 1 and not list(book.folder.glob(".*.tmp"))


def test_checkpoint_brings_back_generators_and_optimizers_exactly(tmp_path):
    rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    rng.integers(5, size=3, dtype=np.int32)  # leaves half a draw in the buffer
    state = {
        "rng": rng.bit_generator.state,
        "generator": generator.get_state(),
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": np.float32(0.5),
        "none": None,
        "array": np.arange(3),
    }
    save_checkpoint(tmp_path / "a.pt", state)
    state = load_checkpoint(tmp_path / "a.pt")
    again = np.random.default_rng()
    again.bit_generator.state = state["rng"]
    assert (
        again.integers(5, size=9, dtype=np.int32) == rng.integers(5, size=9, dtype=np.int32)
    ).all()
    expected = torch.rand(4, generator=generator)
    assert torch.equal(
        torch.rand(4, generator=torch.Generator().set_state(state["generator"])), expected
    )
    assert type(state["best"]) is float and state["best"] == 0.5 and state["none"] is None
    assert state["version"] == VERSION and torch.equal(state["array"], torch.arange(3))
    assert torch.equal(state["net"]["weight"], net.weight)
    other = torch.optim.Adam(net.parameters())
    other.load_state_dict(state["optimizer"])
    assert other.param_groups[0]["betas"] == (0.9, 0.99) and other.state[net.weight]["step"] == 1


def test_slice_of_a_big_buffer_costs_only_the_slice(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_what_could_not_be_loaded_is_refused_when_saved_and_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\['agent'\]\[1\] is a PosixPath"):
        save_checkpoint(tmp_path / "a.pt", {"agent": [1, tmp_path]})
    assert not list(tmp_path.iterdir())


def test_truncated_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1, "x": torch.zeros(1000)})
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="last.pt"):
            load_checkpoint(path)


def test_missing_and_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint .*none.pt"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(
        UserError, match="there is no checkpoint .*last.pt"
    ):  # of a run folder without one
        load_checkpoint(tmp_path)
    (tmp_path / "text.pt").write_text("step,success\n1,0.5\n")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "bare.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("text.pt", "bare.pt", "tensor.pt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)


def test_other_version_is_refused_and_both_are_named(tmp_path):
    torch.save({"step": 1, "version": VERSION + 6}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"version {VERSION + 6}, .* version {VERSION}"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
def test_missing_gpu_is_not_blamed_on_the_file(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(3)})
    with pytest.raises((RuntimeError, AssertionError)):  # torch's own words, not "truncated"
        load_checkpoint(tmp_path / "a.pt", "cuda")


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "dump", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))]
)
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, dump):
    dump({"step": 1, "version": VERSION, "x": Code(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


# damage


def same(a, b):
    """Say whether two checkpoints hold the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("load, state", [(load_checkpoint, {"step": 7}), (load_tensors, {})])
def test_of_a_thousand_flipped_bits_none_changes_what_is_loaded(tmp_path, load, state):
    torch.manual_seed(0)
    path = tmp_path / "a.pt"
    state |= {"weight": torch.randn(40, 10), "bias": torch.randn(10)}
    if load is load_checkpoint:
        save_checkpoint(path, state)
    else:
        torch.save(state, path)
    original = load(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(load(path), original), "a damaged file was loaded"
        except UserError as error:
            assert "a.pt" in str(error)
            refused += 1
    assert refused > 300  # the rest fell on padding and on fields that nobody reads


def test_a_version_of_true_is_no_version(tmp_path):
    for version in (True, 2.0, "2", None):
        torch.save({"step": 1, "version": version}, tmp_path / "a.pt")
        with pytest.raises(UserError, match="no version field"):
            load_checkpoint(tmp_path / "a.pt")


def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path):
    """A small compressed file must not claim a large one's memory."""
    save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(1_000_000)})
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 20_000
    with pytest.raises(UserError, match="b.pt is damaged"):
        load_checkpoint(tmp_path / "b.pt")


def test_weights_are_a_plain_state_dict_of_finite_tensors(tmp_path):
    net = torch.nn.Linear(3, 2)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert same(load_tensors(tmp_path / "a.pt"), dict(net.state_dict()))
    with pytest.raises(UserError, match="there is no file of weights .*none.pt"):
        load_tensors(tmp_path / "none.pt")
    for wrong in (
        [torch.zeros(2)],
        {},
        {"a": 1},
        {1: torch.zeros(2)},
        {"a": {"b": torch.zeros(1)}},
    ):
        torch.save(wrong, tmp_path / "b.pt")
        with pytest.raises(UserError, match="b.pt holds no state_dict of tensors"):
            load_tensors(tmp_path / "b.pt")
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="c.pt holds a non-finite number in a"):
        load_tensors(tmp_path / "c.pt")


def test_a_folder_that_cannot_be_read_is_no_traceback(tmp_path):
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(UserError, match="cannot read .*last.pt: Is a directory"):
        load_checkpoint(tmp_path)


# optimisers


def trained(rate=0.1):
    """Return a small network and its Adam after one step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.6), fused=True)
    optimizer = keep_rate(adam)
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    return net, optimizer


def test_an_optimiser_keeps_its_rate_and_takes_the_moments():
    _, saved = trained()
    net = torch.nn.Linear(3, 2)
    optimizer = keep_rate(torch.optim.Adam(net.parameters(), lr=0.2))
    optimizer.load_state_dict(saved.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fused"], group["betas"]) == (0.2, None, (0.5, 0.6))
    for mine, other in zip(net.parameters(), saved.param_groups[0]["params"]):
        assert same(optimizer.state[mine], saved.state[other])


def alter(state, path, value):
    """Replace one place of a nested state; a callable is given the old value."""
    *outer, last = path
    for name in outer:
        state = state[name]
    state[last] = value(state[last]) if callable(value) else value


ALTERED = [
    (("state", 0, "exp_avg"), torch.zeros(1)),
    (("state", 0, "exp_avg"), torch.zeros(2, 4)),
    (("state", 0, "exp_avg"), torch.zeros(1).expand(2, 3)),
    (("state", 0, "exp_avg_sq"), torch.zeros(2, 3, dtype=torch.int64)),
    (("state", 0, "exp_avg_sq"), lambda moments: -moments - 1),
    (("state", 0, "exp_avg_sq"), lambda moments: moments / 0),
    (("state", 0, "exp_avg_sq"), [1.0]),
    (("state", 0, "step"), torch.zeros(2)),
    (("state", 0, "step"), 1),
    (("state", 1), None),
    (("state", 1), {}),
    (("state",), []),
    (("state",), lambda moments: moments | {2: moments[0]}),
    (("state",), lambda moments: {str(key): value for key, value in moments.items()}),
    (("param_groups",), []),
    (("param_groups",), lambda groups: groups * 2),
    (("param_groups",), "groups"),
    (("param_groups", 0), None),
    (("param_groups", 0), {}),
    (("param_groups", 0, "params"), [0]),
    (("param_groups", 0, "params"), [0, 0]),
    (("param_groups", 0, "params"), [1, 0]),
    (("param_groups", 0, "betas"), (0.9, 1.5)),
    (("param_groups", 0, "betas"), 0.9),
    (("param_groups", 0, "betas"), (0.9, 0.9, 0.9)),
    (("param_groups", 0, "betas"), ("a", "b")),
    (("param_groups", 0, "eps"), float("nan")),
    (("param_groups", 0, "weight_decay"), "0"),
]


@pytest.mark.parametrize("path, value", ALTERED)
def test_an_altered_optimiser_state_is_refused_before_it_is_loaded(path, value):
    net, optimizer = trained()
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    alter(state, path, value)
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert pickle.dumps(optimizer.state_dict()) == before
    optimizer.step()  # and nothing crashes


def test_what_else_stands_in_an_optimiser_state_is_ignored():
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"amsgrad": True, "maximize": "no", "lr": None, "capturable": 3}
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.param_groups[0]["amsgrad"] is False
