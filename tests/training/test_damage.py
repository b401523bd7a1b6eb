"""Files that something has changed: read as they are, or refused in a sentence with their name.

    python -m pytest tests/training/test_damage.py                  # 20 s: 300 files of each kind
    FUZZ=10000 python -m pytest tests/training/test_damage.py       # by hand: 10 minutes

No traceback, no hang, no memory beyond a gigabyte. The same seed makes the same files.
Not here: demonstrations and an arm's episodes (tests/data, tests/robot).
"""

import copy
import dataclasses
import json
import os
import random
import resource
import time

import numpy as np
import pytest
import torch
from logbooks import COLUMNS, episodes, small_run

import train_online
from logbook import (
    Clock,
    Logbook,
    Report,
    UserError,
    keep_rate,
    load_checkpoint,
    load_tensors,
    must_fit,
    noise_state,
    read_args,
    read_run,
    restore_noise,
    save_checkpoint,
)
from logbook.options import check_limits, stored_values

COUNT = int(os.environ.get("FUZZ", 300))
SLOW = 5.0  # seconds for one small file: beyond, something hangs
TOKENS = [
    b'"',
    b",",
    b",,",
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff\xfe",
    b"-1",
    b"nan",
    b"Infinity",
    b"1e999",
    b"9" * 400,
    b"[" * 2000,
    b"{}",
    b"null",
    b"true",
    b'"\\ud800"',
    b"a" * 200_000,
]


def mutated(content, rng):
    """Return content with one to four changes: flipped, cut, doubled, moved or foreign bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        where = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 8, 64, 1024))
        part = content[where : where + length]
        kind = rng.randrange(7)
        if kind == 0 and part:
            content[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[where:]
        elif kind == 2:
            del content[where : where + length]
        elif kind == 3:
            content[where:where] = part
        elif kind == 4:
            there = rng.randrange(len(content) + 1)
            content[there:there] = part
        elif kind == 5:
            content[where:where] = rng.choice(TOKENS)
        else:
            content[where : where + length] = rng.randbytes(length)
    return bytes(content)


ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**70,
    -(2**63),
    0.5,
    float("nan"),
    float("inf"),
    1e300,
    "",
    "x",
    "li\0ft",
    "\ud800",
    "x" * 10_000,
    [],
    {},
    [[[]]],
    {"a": {"b": 1}},
    [1, 2],
    (1, 2),
]
ODD_TENSORS = [
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(1),
    torch.zeros(3, 3),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.full((2, 3), float("nan")),
    torch.zeros(1).expand(2, 3),
    torch.zeros(2, 3, dtype=torch.complex64),
    torch.zeros(5056, dtype=torch.uint8),
    torch.arange(12.0),
]


def places(value, path=()):
    """Yield the paths to all that a nested value holds."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from places(inner, (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield (*path, i)
            yield from places(inner, (*path, i))


def altered(state, rng, values):
    """Return a copy of nested dicts and lists with one to three places replaced, gone or new."""
    state = copy.deepcopy(state)
    for _ in range(rng.randint(1, 3)):
        found = list(places(state))
        if not found:
            break
        *outer, last = rng.choice(found)
        holder = state
        for name in outer:
            holder = holder[name]
        kind = rng.randrange(5)
        if kind == 0 and isinstance(holder, dict):
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("new", 7, "state"))] = copy.deepcopy(rng.choice(values))
        elif kind == 2:
            holder[last] = copy.deepcopy(holder[rng.choice(list(sibling_names(holder)))])
        else:
            holder[last] = copy.deepcopy(rng.choice(values))
    return state


def sibling_names(holder):
    return holder if isinstance(holder, dict) else range(len(holder))


def survives(change, read, name):
    """Change a file COUNT times and read it: it is refused by name or read, soon and cheaply."""
    rng = random.Random(0)
    refused = 0
    for number in range(COUNT):
        change(rng)
        began = time.monotonic()
        try:
            read()
        except UserError as error:
            assert str(name) in str(error), f"file {number}: {error}"
            assert "\n" not in str(error) and len(str(error)) < 1000, f"file {number}: {error}"
            refused += 1
        assert time.monotonic() - began < SLOW, f"file {number} took too long"
    assert refused > COUNT / 4, f"{refused} of {COUNT} were refused: the changes are too mild"


@pytest.fixture(autouse=True)
def within_a_gigabyte():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 1 << 20, "kilobytes"


@pytest.fixture
def run(tmp_path):
    """A finished run of the real program's arguments, 20 rows and a small checkpoint."""
    args = dataclasses.asdict(train_online.Args())
    book = small_run(tmp_path / "lift-poco-s0", **args)
    for step in range(10, 210, 10):
        book.log(step, success=step / 1000, **{"time/env": 0.1})
    for step in (100, 200):
        book.evaluation(step, "policy", episodes([1, 0, 1]))
    book.save("last.pt", {"step": 200, "x": torch.arange(10.0)})
    book.close()
    return book


@pytest.mark.parametrize("name", ["progress.csv", "eval.csv"])
def test_changed_tables(run, name, monkeypatch):
    monkeypatch.setattr("logbook.events.Board.hide_after", lambda self, step: None)
    path = run.folder / name
    whole = path.read_bytes()

    def read():
        read_run(run.folder)
        book = Logbook.resume(run.folder, COLUMNS)
        book.rewind(150)
        book.evaluation(150, "policy", episodes([1, 0]))

    survives(lambda rng: path.write_bytes(mutated(whole, rng)), read, path)


def read_back(folder):
    values = stored_values(train_online.Args, folder)
    check_limits(train_online.Args(**values))


def test_changed_arguments(run):
    path = run.folder / "args.json"
    whole = path.read_bytes()
    survives(
        lambda rng: path.write_bytes(mutated(whole, rng)), lambda: read_back(run.folder), run.folder
    )


def test_arguments_of_other_types_and_sizes(run):
    path = run.folder / "args.json"
    content = json.loads(path.read_text())

    def change(rng):
        path.write_text(json.dumps(altered(content, rng, ODD)))

    survives(change, lambda: (read_back(run.folder), read_args(run.folder)), run.folder)


@pytest.mark.parametrize("load", [load_checkpoint, load_tensors])
def test_changed_bytes_of_tensors(tmp_path, load):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.randn(20, 10), "bias": torch.randn(10)}, path)
    if load is load_checkpoint:
        save_checkpoint(path, {"step": 3, "weight": torch.randn(20, 10)})
    whole = path.read_bytes()
    survives(lambda rng: path.write_bytes(mutated(whole, rng)), lambda: load(path), path)


def test_checkpoints_of_other_types_and_shapes(run, monkeypatch):
    """What a run holds is altered and saved anew, so that every checksum is right."""
    monkeypatch.setattr("logbook.events.Board.add", lambda self, step, scalars: None)
    path = run.folder / "last.pt"
    device = torch.device("cpu")
    net = torch.nn.Linear(3, 2)
    optimizer = keep_rate(torch.optim.Adam(net.parameters(), fused=True))
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    names = ["updates", "env_steps_per_s", "updates_per_s", "loss", "time/env", "time/eval"]
    book = Logbook.create(run.folder.with_name("rows"), {}, names)
    report = Report(book, Clock(), ("env", "eval"))
    report.add({"loss": torch.tensor(0.5)})
    rng = np.random.default_rng(0)
    generator = torch.Generator()
    whole = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "report": report.state_dict(),
        "noise": noise_state(device),
        "generator": generator.get_state(),
        "rng": rng.bit_generator.state,
    }

    def change(random_numbers):
        torch.save(altered(whole, random_numbers, ODD + ODD_TENSORS) | {"version": 2}, path)

    def read():
        with must_fit(run.folder):
            state = run.load("last.pt")
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            report.load_state_dict(state["report"])
            restore_noise(state["noise"], device)
            generator.set_state(state["generator"])
            rng.bit_generator.state = state["rng"]
        net(torch.ones(3)).sum().backward()
        optimizer.step()  # what was loaded works
        report.add({"loss": torch.tensor(0.5)})
        report.write(300)
        rng.integers(5)

    survives(change, read, run.folder)
