"""logbook: what it writes survives kills, full disks and resumes; what it reads is checked first.

    python -m pytest tests/training/test_logbook.py
"""
import contextlib
import csv
import dataclasses
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import logbook
from logbook import (
    VERSION,
    Logbook,
    UserError,
    check_numbers,
    cli,
    curve,
    load_checkpoint,
    save_checkpoint,
    wilson,
)

ARGS = {"task": "lift", "method": "poco", "seed": 0, "preset": "cpu", "clip": float("inf")}
COLUMNS = ["success", "q/mean", "time/env"]


@pytest.fixture
def book(tmp_path):
    return Logbook.create(tmp_path / "lift-poco-s0", ARGS, COLUMNS)


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes: the write that tries fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def episodes(successes):
    return [{"seed": 100 + i, "success": bool(success), "length": 40 + i, "return": float(success)}
            for i, success in enumerate(successes)]


# checkpoints

KILL = """
import os, signal, sys, time, torch
from pathlib import Path
from logbook import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path, cut = Path(sys.argv[1]), 0
temporary = path.with_name(".last.pt.tmp")
save_checkpoint(path, {"step": 0, "x": torch.zeros(500_000)})
for attempt in range(8):
    before, number, patience = load_checkpoint(path)["step"], path.stat().st_ino, time.monotonic() + 5
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
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "last.pt")], capture_output=True,
                          text=True, cwd=Path(logbook.__file__).parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    cut, files = map(int, done.stdout.split())
    assert cut > 0, "no kill fell into a save: the test shows nothing"
    assert files <= 2                                 # what interrupted saves leave does not pile up


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
    rng.integers(5, size=3, dtype=np.int32)           # leaves half a draw in the buffer
    state = {"rng": rng.bit_generator.state, "generator": generator.get_state(), "net": net.state_dict(),
             "optimizer": optimizer.state_dict(), "best": np.float32(0.5), "none": None,
             "array": np.arange(3)}
    save_checkpoint(tmp_path / "a.pt", state)
    state = load_checkpoint(tmp_path / "a.pt")
    again = np.random.default_rng()
    again.bit_generator.state = state["rng"]
    assert (again.integers(5, size=9, dtype=np.int32) == rng.integers(5, size=9, dtype=np.int32)).all()
    expected = torch.rand(4, generator=generator)
    assert torch.equal(torch.rand(4, generator=torch.Generator().set_state(state["generator"])), expected)
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
    with pytest.raises(UserError, match="there is no checkpoint .*last.pt"):      # of a run folder without one
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
    with pytest.raises((RuntimeError, AssertionError)):   # torch's own words, not "truncated"
        load_checkpoint(tmp_path / "a.pt", "cuda")


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("dump", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, dump):
    dump({"step": 1, "version": VERSION, "x": Code(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt"):
        load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


# the folder

def test_create_writes_arguments_versions_and_headers(book):
    assert logbook.read_args(book.folder) == ARGS
    assert f'"torch": "{torch.__version__.split("+")[0]}' in (book.folder / "args.json").read_text()
    assert rows(book.folder / "progress.csv") == [["step", *COLUMNS]]
    assert rows(book.folder / "eval.csv") == [["step", "acting", "seed", "success", "length", "return"]]


def test_a_resumed_run_keeps_what_its_arguments_were(book):
    book.amend(ARGS)
    assert "earlier" not in (book.folder / "args.json").read_text()                 # nothing new
    for clip in (0.3, float("inf")):
        book.amend(ARGS | {"clip": clip, "box": (1, 2)})
    stored = json.loads((book.folder / "args.json").read_text())
    assert stored["args"] == ARGS | {"clip": float("inf"), "box": [1, 2]} == logbook.read_args(book.folder) == book.args
    assert [one["args"] for one in stored["earlier"]] == [{"clip": ARGS.get("clip"), "box": None}, {"clip": 0.3}]
    stored["versions"]["commit"] = "older"
    (book.folder / "args.json").write_text(json.dumps(stored))
    book.amend(book.args)
    again = json.loads((book.folder / "args.json").read_text())
    assert again["earlier"][2] == {"args": {}, "versions": stored["versions"]} and len(again["earlier"]) == 3


@dataclass
class Numbers:
    count: int = 3
    rate: float = 0.1
    tau: float = 1.0
    clip: float = float("inf")
    reward_offset: float = -0.5
    demo_share: float | None = None
    quick: bool = False
    name: str = "-1"


@pytest.mark.parametrize("name, value, told", [
    ("count", 0, "--count must be a number greater than 0, got 0"), ("rate", float("inf"), "--rate must be a number"),
    ("rate", float("nan"), "--rate must be a number greater than 0, got nan"), ("tau", 1.1, "--tau is at most 1"),
    ("clip", -0.1, "--clip must be at least 0, got -0.1"), ("clip", float("nan"), "--clip must be at least 0"),
    ("reward_offset", float("inf"), "--reward-offset must be a finite number"),
    ("demo_share", 1.5, "--demo-share is between 0 and 1, got 1.5"), ("demo_share", float("nan"), "--demo-share")])
def test_numbers_that_could_only_fail_later_are_refused(name, value, told):
    check_numbers(Numbers(), {"clip": 0.0})
    with pytest.raises(UserError, match=told):
        check_numbers(dataclasses.replace(Numbers(), **{name: value}), {"clip": 0.0})


def test_create_refuses_an_existing_run_and_overwrite_replaces_only_its_files(book):
    book.log(1, success=0.5)
    book.save("best.pt", {"step": 1})
    (book.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as refusal:
        Logbook.create(book.folder, ARGS, COLUMNS)
    for word in (str(book.folder), "--resume", "--overwrite", "--run-dir"):
        assert word in str(refusal.value)
    assert len(rows(book.folder / "progress.csv")) == 2
    Logbook.create(book.folder, ARGS, COLUMNS, overwrite=True)
    names = sorted(path.name for path in book.folder.iterdir())
    assert names == [".lock", "args.json", "eval.csv", "notes.txt", "progress.csv"]
    assert len(rows(book.folder / "progress.csv")) == 1


@pytest.mark.parametrize("begin", ["create(folder, {}, ['success'], overwrite=True)", "resume(folder, ['success'])"])
def test_two_processes_do_not_write_to_one_folder(tmp_path, begin):
    folder = tmp_path / "run"
    book = Logbook.create(folder, ARGS, ["success"])
    book.save("last.pt", {"step": 1})
    script = f"import sys, logbook; folder = sys.argv[1]; logbook.cli(lambda: logbook.Logbook.{begin})"
    command = [sys.executable, "-c", script, str(folder)]
    other = subprocess.run(command, cwd=Path(logbook.__file__).parents[1], capture_output=True, text=True)
    assert other.returncode == 2 and "another process is writing to" in other.stderr and other.stderr.count("\n") == 1
    assert json.loads((folder / "args.json").read_text())["args"]["task"] == "lift"
    Logbook.resume(folder, ["success"])                       # the process itself may
    del book
    assert subprocess.run(command, cwd=Path(logbook.__file__).parents[1], capture_output=True).returncode == 0


def test_unwritable_folder_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        cli(lambda: Logbook.create(tmp_path / "file" / "run", ARGS, COLUMNS))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert str(tmp_path / "file" / "run") in message and "Not a directory" in message


@pytest.mark.parametrize("limit, failing", [(10, "args.json"), (10_000, "progress.csv")])
def test_create_on_a_full_disk_leaves_nothing_behind(tmp_path, limit, failing):
    folder = tmp_path / "run"
    columns = ["success" * 10_000] if failing == "progress.csv" else COLUMNS
    for is_new in (True, False):
        with full_disk(limit), pytest.raises(UserError, match=f"run folder {folder}: File too large"):
            Logbook.create(folder, ARGS, columns)
        assert folder.exists() != is_new
        folder.mkdir(exist_ok=True)
        assert not list(folder.iterdir())


def test_failed_overwrite_keeps_the_run_when_the_folder_cannot_be_written(book):
    book.save("last.pt", {"step": 1})
    with full_disk(10), pytest.raises(UserError):
        Logbook.create(book.folder, ARGS, COLUMNS, overwrite=True)
    assert Logbook.resume(book.folder, COLUMNS).load("last.pt")["step"] == 1


def test_log_fills_the_declared_columns_and_refuses_others(book):
    book.log(10, success=float("nan"), **{"q/mean": torch.tensor(2.0)})
    book.log(20, **{"time/env": np.float32(0.5), "success": None})
    assert rows(book.folder / "progress.csv")[1:] == [["10", "nan", "2.0", ""], ["20", "", "", "0.5"]]
    assert [step for step, _ in points(book)["success"]] == [10]        # nothing known is not a zero
    with pytest.raises(KeyError, match="sucess"):
        book.log(30, sucess=1.0)
    assert len(rows(book.folder / "progress.csv")) == 3


def test_evaluation_writes_one_row_per_episode_once(book):
    book.evaluation(50, "posterior", episodes([0, 0, 0]))
    book.evaluation(50, "posterior", episodes([1, 0]))        # done again after a resume
    assert rows(book.folder / "eval.csv")[1:] == [["50", "posterior", "100", "1", "40", "1.0"],
                                                  ["50", "posterior", "101", "0", "41", "0.0"]]
    assert points(book)["eval/success_posterior"][-1] == (50, 0.5)
    book.evaluation(50, "policy", episodes([1]))
    book.evaluation(60, "policy", episodes([1]))
    assert [row[:2] for row in rows(book.folder / "eval.csv")[1:]] == [["50", "posterior"]] * 2 + [
        ["50", "policy"], ["60", "policy"]]


def points(book):
    """What TensorBoard shows of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(book.folder)).Reload()
    return {tag: [(point.step, round(point.value, 4)) for point in board.Scalars(tag)]
            for tag in board.Tags()["scalars"]}


def test_resumed_run_has_no_row_twice(book):
    for step in (10, 20, 30, 40):
        book.log(step, success=step / 100)
        book.evaluation(step, "policy", episodes([1]))
        if step == 20:
            book.save("last.pt", {"step": step})
    with open(book.folder / "progress.csv", "a") as file:
        file.write("4")                               # the kill came in the middle of a row
    again = Logbook.resume(book.folder, COLUMNS, task="lift", method="poco")
    assert again.args == ARGS
    again.rewind(again.load("last.pt")["step"])
    assert [row[0] for row in rows(book.folder / "progress.csv")] == ["step", "10", "20"]
    assert [row[0] for row in rows(book.folder / "eval.csv")] == ["step", "10", "20"]
    again.log(30, success=0.9)
    assert rows(book.folder / "progress.csv")[-1] == ["30", "0.9", "", ""]
    again.close()                                     # stage I does, and logs its evaluation afterwards
    again.log(40, success=1.0)
    assert points(again)["success"] == [(10, 0.1), (20, 0.2), (30, 0.9), (40, 1.0)]


def test_tensorboard_forgets_what_was_rewound_also_where_no_row_came_before_the_next_interruption(book):
    for step in (10, 20, 30, 40):
        book.log(step, success=step / 100)
    book.save("last.pt", {})
    for step in (20, 35):                             # killed, saved again between two rows of a longer --log-every
        again = Logbook.resume(book.folder, COLUMNS)
        again.rewind(step)
        again.close()
    again.log(50, success=0.9)
    assert [row[0] for row in rows(book.folder / "progress.csv")] == ["step", "10", "20", "50"]
    assert points(again)["success"] == [(10, 0.1), (20, 0.2), (50, 0.9)]


def test_resume_refuses_what_is_not_the_run_asked_for(book, tmp_path):
    with pytest.raises(UserError, match="no run folder .*nowhere"):
        Logbook.resume(tmp_path / "nowhere", COLUMNS)
    with pytest.raises(UserError, match=f"{book.folder} has no checkpoint"):
        Logbook.resume(book.folder, COLUMNS)
    book.save("last.pt", {"step": 1})
    with pytest.raises(UserError, match="task lift, not of task can"):
        Logbook.resume(book.folder, COLUMNS, task="can")
    with pytest.raises(UserError, match="method poco, not of method qc"):
        Logbook.resume(book.folder, COLUMNS, task="lift", method="qc")
    with pytest.raises(UserError, match=r"other columns \(q/max, time/env\)"):
        Logbook.resume(book.folder, ["success", "q/mean", "q/max"])
    with pytest.raises(UserError, match=r"other columns \(their order\)"):       # rows would mix
        Logbook.resume(book.folder, COLUMNS[::-1])
    (book.folder / "args.json").write_text("{")
    with pytest.raises(UserError, match="args.json"):
        Logbook.resume(book.folder, COLUMNS)


def test_a_damaged_row_is_refused_by_the_name_of_its_file(book):
    path = book.folder / "progress.csv"
    book.log(10, success=0.1)
    path.write_text(path.read_text().replace("10,", "1o,"))
    with pytest.raises(UserError, match="progress.csv .*line 2 .*'1o'.* put it right"):
        book.rewind(10)


@pytest.mark.parametrize("name, old, new", [("progress.csv", "0.1", "O.1"), ("eval.csv", "10,policy", "1o,policy"),
                                            ("eval.csv", "acting", "act")])
def test_a_curve_of_damaged_rows_is_refused_by_name(book, name, old, new):
    book.log(10, success=0.1)
    book.evaluation(10, "policy", episodes([1]))
    path = book.folder / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{book.folder}/{name} is damaged"):
        curve(book.folder)


def test_full_disk_while_logging_is_the_users_error(book):
    with full_disk(30), pytest.raises(UserError, match="progress.csv: File too large"):
        book.log(0, success=0.5)
    with full_disk(200), pytest.raises(UserError, match="TensorBoard events: File too large"):
        for step in range(10):                        # events take more room than rows
            book.log(step, success=0.5)


# the picture

def fill(book, top):
    for step in range(0, 1001, 50):
        book.log(step, success=float("nan") if step == 0 else 0.5 * step / 1000)
    for step, success in ((0, 3), (500, 6), (1000, top)):
        book.evaluation(step, "policy", episodes([1] * success + [0] * (10 - success)))
        book.evaluation(step, "posterior", episodes([1] * 10))


def colors(path):
    from matplotlib.image import imread
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found, count = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(color): n for color, n in zip(found.tolist(), count.tolist())}


def test_curve_is_drawn_from_the_csv_files_alone(book):
    fill(book, 8)
    for events in book.folder.glob("events*"):
        events.unlink()
    assert curve(book.folder) == book.folder / "curve.png"
    found = colors(book.folder / "curve.png")
    blue, orange, grey, dashed = (0, 114, 178), (213, 94, 0), (153, 153, 153), (77, 77, 77)
    assert all(found.get(color, 0) > 50 for color in (blue, orange, grey, dashed)), found
    before = (book.folder / "curve.png").read_bytes()
    book.evaluation(2000, "policy", episodes([1]))
    curve(book.folder)
    assert (book.folder / "curve.png").read_bytes() != before


def test_curve_plots_success_in_percent_with_wilson_intervals(book):
    from matplotlib.figure import Figure

    from logbook.figure import _draw_run
    fill(book, 10)
    axes = Figure().add_subplot()
    _draw_run(axes, book.folder)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["behaviour cloning, 30 %"].get_ydata()[0] == 30
    assert list(lines["collecting, last 20 episodes"].get_ydata()[:2]) == [2.5, 5.0]   # nan at 0 is left out
    policy = axes.containers[0]
    assert list(policy.lines[0].get_xdata()) == [0, 500, 1000]
    assert list(policy.lines[0].get_ydata()) == [30, 60, 100]
    bars = [(segment[0, 1], segment[1, 1]) for segment in policy.lines[2][0].get_segments()]
    assert bars == [pytest.approx(100 * np.array(wilson(successes, 10))) for successes in (3, 6, 10)]
    assert axes.get_title() == "lift, poco, seed 0, preset cpu"


@pytest.mark.parametrize("args", [{"method": "poco", "setting": "online"}, {"method": "rlpd-ac"}])
def test_curve_calls_what_was_not_cloned_untrained(tmp_path, args):
    from matplotlib.figure import Figure

    from logbook.figure import _draw_run
    book = Logbook.create(tmp_path / "run", ARGS | args, ["success"])
    fill(book, 10)
    axes = Figure().add_subplot()
    _draw_run(axes, book.folder)
    names = [line.get_label() for line in axes.get_lines()]
    assert "untrained, 30 %" in names and not any("cloning" in name for name in names)


def test_wilson_interval_matches_published_values():
    """Newcombe (1998), Table I: 81/263, 15/148, 0/20, 1/29."""
    for counts, expected in (((81, 263), (0.2553, 0.3662)), ((15, 148), (0.0624, 0.1605)),
                             ((0, 20), (0.0, 0.1611)), ((1, 29), (0.0061, 0.1718))):
        assert wilson(*counts) == pytest.approx(expected, abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_several_runs_become_a_mean_and_a_band_over_seeds(tmp_path, monkeypatch, capsys):
    from matplotlib.figure import Figure

    from logbook.__main__ import main
    from logbook.figure import _draw_runs
    folders = []
    for seed, top in ((0, 8), (1, 10)):
        book = Logbook.create(tmp_path / f"lift-poco-s{seed}", {**ARGS, "seed": seed}, COLUMNS)
        fill(book, top)
        folders.append(book.folder)
    axes = Figure().add_subplot()
    _draw_runs(axes, folders)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["lift-poco, policy (seeds: 2)"].get_ydata()) == [30, 60, 90]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 30 and band[band[:, 0] == 1000][:, 1].min() == 80 and band[:, 1].max() == 100
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["logbook", *map(str, folders)])
    main()
    assert capsys.readouterr().out == "curves.png\n" and len(colors(tmp_path / "curves.png")) > 20
    late = Logbook.create(tmp_path / "lift-poco-s2", ARGS, COLUMNS)
    late.evaluation(1000, "policy", episodes([1]))                    # says nothing of the steps before
    axes = Figure().add_subplot()
    _draw_runs(axes, [*folders, late.folder])
    assert [list(line.get_xdata()) for line in axes.get_lines() if "policy (seeds: 3)" in line.get_label()] == [[1000]]
    can = Logbook.create(tmp_path / "elsewhere/lift-poco-s0", ARGS | {"task": "can"}, COLUMNS)
    fill(can, 5)
    axes = Figure().add_subplot()
    _draw_runs(axes, [*folders, can.folder])
    assert axes.get_title().startswith("can and lift:") and axes.get_xlabel() == "environment steps"
    assert {"can, lift-poco, policy (seeds: 1)", "lift, lift-poco, policy (seeds: 2)"} <= {
        line.get_label() for line in axes.get_lines()}


def test_curve_of_a_run_without_rows_is_an_empty_picture_and_of_no_run_an_error(book, tmp_path):
    assert len(colors(curve(book.folder))) > 1
    with pytest.raises(UserError, match="not a run folder"):
        curve(tmp_path)


@pytest.mark.parametrize("module", ["logbook", "benchmarks.summary"])
def test_help_is_the_docstring_and_no_error(module):
    out = subprocess.run([sys.executable, "-m", module, "--help"], cwd=Path(logbook.__file__).parents[1],
                         capture_output=True, text=True)
    assert out.returncode == 0 and f"python -m {module}" in out.stdout and not out.stderr
