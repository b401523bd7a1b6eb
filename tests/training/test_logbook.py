"""A run's folder: what is written survives kills, full disks and resumes; rows are read strictly.

python -m pytest tests/training/test_logbook.py      # 20 s
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from logbooks import ARGS, COLUMNS, ROOT, episodes, full_disk, next_second, points, rows

import logbook
from logbook import Logbook, UserError, cli
from logbook.figure import draw


def test_create_writes_arguments_versions_and_headers(book):
    assert logbook.read_args(book.folder) == ARGS
    assert f'"torch": "{torch.__version__.split("+")[0]}' in (book.folder / "args.json").read_text()
    assert rows(book.folder / "progress.csv") == [["step", *COLUMNS]]
    assert rows(book.folder / "eval.csv") == [
        ["step", "acting", "seed", "success", "length", "return"]
    ]


def test_a_resumed_run_keeps_what_its_arguments_were(book):
    book.amend(ARGS)
    assert "earlier" not in (book.folder / "args.json").read_text()  # nothing new
    for clip in (0.3, float("inf")):
        book.amend(ARGS | {"clip": clip, "box": (1, 2)})
    stored = json.loads((book.folder / "args.json").read_text())
    assert stored["args"] == ARGS | {"clip": float("inf"), "box": [1, 2]}
    assert stored["args"] == logbook.read_args(book.folder) == book.args
    replaced = [one["args"] for one in stored["earlier"]]
    assert replaced == [{"clip": ARGS["clip"], "box": None}, {"clip": 0.3}]
    stored["versions"]["commit"] = "older"
    (book.folder / "args.json").write_text(json.dumps(stored))
    book.amend(book.args)
    again = json.loads((book.folder / "args.json").read_text())
    assert len(again["earlier"]) == 3
    assert again["earlier"][2] == {"args": {}, "versions": stored["versions"]}


def test_create_refuses_an_existing_run_and_overwrite_replaces_only_its_files(book):
    book.log(1, success=0.5)
    book.save("best.pt", {"step": 1})
    (book.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as refusal:
        Logbook.create(book.folder, ARGS, COLUMNS)
    for word in (str(book.folder), "--resume", "--overwrite", "--run-dir"):
        assert word in str(refusal.value)
    assert len(rows(book.folder / "progress.csv")) == 2
    (book.folder / "policy.mp4").write_bytes(b"of the run before")
    Logbook.create(book.folder, ARGS, COLUMNS, overwrite=True)
    assert not (book.folder / "policy.mp4").exists()
    names = sorted(path.name for path in book.folder.iterdir())
    assert names == [".lock", "args.json", "eval.csv", "notes.txt", "progress.csv"]
    assert len(rows(book.folder / "progress.csv")) == 1


@pytest.mark.parametrize(
    "begin", ["create(folder, {}, ['success'], overwrite=True)", "resume(folder, ['success'])"]
)
def test_two_processes_do_not_write_to_one_folder(tmp_path, begin):
    folder = tmp_path / "run"
    book = Logbook.create(folder, ARGS, ["success"])
    book.save("last.pt", {"step": 1})
    script = (
        f"import sys, logbook; folder = sys.argv[1]; logbook.cli(lambda: logbook.Logbook.{begin})"
    )
    command = [sys.executable, "-c", script, str(folder)]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "another process is writing to" in other.stderr
    assert json.loads((folder / "args.json").read_text())["args"]["task"] == "lift"
    Logbook.resume(folder, ["success"])  # the process itself may
    del book
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


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
        with (
            full_disk(limit),
            pytest.raises(UserError, match=f"run folder {folder}: File too large"),
        ):
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
    assert rows(book.folder / "progress.csv")[1:] == [
        ["10", "nan", "2.0", ""],
        ["20", "", "", "0.5"],
    ]
    assert [step for step, _ in points(book)["success"]] == [10]  # nothing known is not a zero
    with pytest.raises(KeyError, match="sucess"):
        book.log(30, sucess=1.0)
    assert len(rows(book.folder / "progress.csv")) == 3


def test_evaluation_writes_one_row_per_episode_once(book):
    book.evaluation(50, "posterior", episodes([0, 0, 0]))
    book.evaluation(50, "posterior", episodes([1, 0]))  # done again after a resume
    assert rows(book.folder / "eval.csv")[1:] == [
        ["50", "posterior", "100", "1", "40", "1.0"],
        ["50", "posterior", "101", "0", "41", "0.0"],
    ]
    assert points(book)["eval/success_posterior"][-1] == (50, 0.5)
    book.evaluation(50, "policy", episodes([1]))
    book.evaluation(60, "policy", episodes([1]))
    kept = [row[:2] for row in rows(book.folder / "eval.csv")[1:]]
    assert kept == [["50", "posterior"]] * 2 + [["50", "policy"], ["60", "policy"]]


def test_resumed_run_has_no_row_twice(book):
    for step in (10, 20, 30, 40):
        book.log(step, success=step / 100)
        book.evaluation(step, "policy", episodes([1]))
        if step == 20:
            book.save("last.pt", {"step": step})
    with open(book.folder / "progress.csv", "a") as file:
        file.write("4")  # the kill came in the middle of a row
    next_second()
    again = Logbook.resume(book.folder, COLUMNS, task="lift", method="poco")
    assert again.args == ARGS
    again.rewind(again.load("last.pt")["step"])
    assert [row[0] for row in rows(book.folder / "progress.csv")] == ["step", "10", "20"]
    assert [row[0] for row in rows(book.folder / "eval.csv")] == ["step", "10", "20"]
    again.log(30, success=0.9)
    assert rows(book.folder / "progress.csv")[-1] == ["30", "0.9", "", ""]
    again.close()  # stage I does, and logs its evaluation afterwards
    next_second()
    again.log(40, success=1.0)
    assert points(again)["success"] == [(10, 0.1), (20, 0.2), (30, 0.9), (40, 1.0)]


def test_tensorboard_forgets_what_was_rewound_also_where_no_row_came_meanwhile(book):
    for step in (10, 20, 30, 40):
        book.log(step, success=step / 100)
    book.save("last.pt", {})
    for step in (20, 35):  # killed, saved again between two rows of a longer --log-every
        next_second()
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
    with pytest.raises(UserError, match=r"other columns \(their order\)"):  # rows would mix
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


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("progress.csv", "0.1", "O.1"),
        ("eval.csv", "10,policy", "1o,policy"),
        ("eval.csv", "acting", "act"),
    ],
)
def test_a_curve_of_damaged_rows_is_refused_by_name(book, name, old, new):
    book.log(10, success=0.1)
    book.evaluation(10, "policy", episodes([1]))
    path = book.folder / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{book.folder}/{name} is damaged"):
        draw([book.folder])


def test_full_disk_while_logging_is_the_users_error(book):
    with full_disk(30), pytest.raises(UserError, match="progress.csv: File too large"):
        book.log(0, success=0.5)
    with full_disk(200), pytest.raises(UserError, match="TensorBoard events: File too large"):
        for step in range(10):  # events take more room than rows
            book.log(step, success=0.5)


FULL = """
import resource, signal, sys
from logbook import Logbook, cli

def main():
    book = Logbook.create(sys.argv[1], {}, ["success"])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
    for step in range(10):
        book.log(step, success=0.5)

cli(main)
"""


def test_a_full_disk_is_one_sentence_and_no_threads_traceback(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith("error: cannot write ")
    assert "TensorBoard events: File too large" in out.stderr and out.stderr.count("\n") == 1


def test_a_row_holds_numbers(book):
    book.log(10, success=True, **{"q/mean": np.float64(0.5)})
    assert rows(book.folder / "progress.csv")[1] == ["10", "1", "0.5", ""]
    with pytest.raises(TypeError, match="success is 'often'"):
        book.log(20, success="often")
    assert len(rows(book.folder / "progress.csv")) == 2


# tables that somebody or something has changed


def begun(book):
    """Write 40 rows and episodes and a checkpoint."""
    for step in range(10, 410, 10):
        book.log(step, success=step / 1000)
    for step in (100, 200):
        book.evaluation(step, "policy", episodes([1, 0, 1]))
    book.save("last.pt", {"step": 400})
    return book.folder / "progress.csv", book.folder / "eval.csv"


def rewound(book):
    """Resume the run as it was, and return its rows."""
    again = Logbook.resume(book.folder, COLUMNS)
    again.rewind(400)
    again.close()
    return rows(book.folder / "progress.csv"), rows(book.folder / "eval.csv")


def test_what_is_whole_is_kept_to_the_letter(book):
    before = [path.read_bytes() for path in begun(book)]
    rewound(book)
    after = [(book.folder / name).read_bytes() for name in ("progress.csv", "eval.csv")]
    assert after == before


TORN = [b"410", b"410,0.5,", b"410,0.5,1.0,2.0", b"\0" * 30, b'410,"', b"\xff"]


@pytest.mark.parametrize("tail", TORN)
def test_only_the_last_row_may_be_torn(book, tail):
    for path, count in zip(begun(book), (41, 7)):
        with open(path, "ab") as file:
            file.write(tail)
        tables = rewound(book)
        assert count in map(len, tables)


CHANGES = [
    ("success", "success" * 100, "line 1 .*these are no columns"),
    ("q/mean", "success", "line 1 .*these are no columns"),
    ("10,", '"10,', "line 2 .*'\"10' is no whole number"),
    ("0.05,", '"0.05,', "line 6 .* is no number"),
    ("0.05,", "O.05,", "line 6 .*'O.05' is no number"),
    ("0.05,", "0.05,,", "line 6 .*5 cells under 4 columns"),
    ("50,0.05,,\n", "\n", "line 6 .*1 cells under 4 columns"),
    ("50,0.05,,\n", "50,0.05,,", "line 6 .*7 cells under 4 columns"),
    ("50,", "-50,", "line 6 .*'-50' is no whole number"),
    ("50,", "\u06650,", "line 6 .* is no whole number"),
    ("50,", "nan,", "line 6 .*'nan' is no whole number"),
    ("0.05,", "0." + "0" * 200_000 + "5,", "line 6 .*a cell of 200003 characters"),
    ("60,0.06", "50,0.06", "line 7 .*another row of 50 precedes it"),
    ("0.05,", "0.05\0,", "line 6 .* is no number"),
    ("0.05,", "0.05\r,", "line 6 .* is no number"),
]


@pytest.mark.parametrize("old, new, told", CHANGES)
def test_any_other_change_is_refused_by_name_and_line(book, old, new, told):
    path, _ = begun(book)
    changed = path.read_text().replace(old, new, 1)
    path.write_text(changed, newline="")
    with pytest.raises(UserError, match=f"{path} is damaged in {told}.*: put it right"):
        rewound(book)
    assert path.read_bytes() == changed.encode()  # nothing is dropped meanwhile
    with pytest.raises(UserError, match=f"{path} is damaged in {told}"):
        draw([book.folder])


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("102,1", "102,2", "line 4 .*'2' is neither 0 nor 1"),
        ("102,1", "101,1", "line 4 .*another row of 100, policy, 101 precedes it"),
        ("policy", '"policy', "is no name"),
        ("policy", "", "is no name"),
        ("1.0", "", "'' is no number"),
        ("42", "4.2", "line 4 .*'4.2' is no whole number"),
    ],
)
def test_an_episode_that_cannot_be_is_refused(book, old, new, told):
    _, path = begun(book)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=f"{path} is damaged .*{told}"):
        rewound(book)


def test_a_row_that_stands_there_twice_counts_once(book):
    before = [path.read_bytes() for path in begun(book)]
    for path in (book.folder / "progress.csv", book.folder / "eval.csv"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines, *lines[3:5]]))
    assert logbook.read_run(book.folder)[1] == {"policy": {100.0: (2, 3), 200.0: (2, 3)}}
    rewound(book)
    after = [(book.folder / name).read_bytes() for name in ("progress.csv", "eval.csv")]
    assert after == before


def test_windows_line_ends_are_no_damage(book):
    paths = begun(book)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert [len(table) for table in rewound(book)] == [41, 7]


# args.json that somebody has changed


def write_args(book, text):
    (book.folder / "args.json").write_text(text)


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"args": {"layers": 1180591620717411303424}}', "layers is too large"),
        ('{"args": {"box": {"size": [1, 1180591620717411303424]}}}', "box.size is too large"),
        ('{"args": {"task": "li\\u0000ft"}}', "task is no text"),
        ('{"args": {"task": "\\ud800"}}', "task is no text"),
        ('{"args": {"a": ' + "[" * 20 + "]" * 20 + "}}", "a is nested too deeply"),
        ('{"args": {"seed": 0, "seed": 1}}', "a name stands there twice"),
        ('{"args": []}', "it holds no args"),
        ("[]", "it holds no args"),
        ("{", "args.json is damaged"),
        ("[" * 100_000, "args.json is damaged"),
        ('{"args": {"layers": ' + "9" * 10_000 + "}}", "args.json is damaged"),
        ('{"args": {"a": "' + "x" * 2_000_000 + '"}}', "it has more than"),
    ],
)
def test_arguments_that_no_run_can_have_stored_are_refused(book, text, told):
    book.save("last.pt", {"step": 1})
    write_args(book, text)
    with pytest.raises(UserError, match=f"{book.folder} is not a run folder: .*{told}"):
        Logbook.resume(book.folder, COLUMNS)
    with pytest.raises(UserError, match=told):
        book.amend(ARGS)
