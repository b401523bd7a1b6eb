"""The planted bugs: each shows its symptoms in seconds, and a named test kills it."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from course.__main__ import main
from course.bugs import BUGS, plant, statistics

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = range(1, len(BUGS) + 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_bug_shows_its_symptoms_in_fifteen_seconds(number):
    """One prior, 128 states with 64 candidates each, 20,000 actions; 50,000 chunks for cloning."""
    bug = BUGS[number - 1]
    start = time.process_time()
    healthy, sick = statistics(bug)
    assert time.process_time() - start < 15
    for name, (right, wrong, tolerance) in bug.symptoms.items():
        assert healthy[name] == pytest.approx(right, abs=tolerance), name
        assert sick[name] == pytest.approx(wrong, abs=tolerance), name
    assert any(abs(a - b) > 2 * t for a, b, t in bug.symptoms.values())


def test_the_command_hides_the_name_until_it_is_asked(capsys):
    assert main(["bug", "6"]) == 0
    shown = capsys.readouterr().out
    assert "healthy" in shown and "2.532" in shown
    assert "terminal" not in shown and "replay.py" not in shown
    assert main(["bug", "6", "--tell"]) == 0
    told = capsys.readouterr().out
    assert BUGS[5].name in told and BUGS[5].killer in told and "replay.py" in told


def test_an_outdated_bug_breaks_loudly():
    outdated = replace(BUGS[0], old="a line that was rewritten")
    with pytest.raises(ValueError, match="please update course/bugs.py"):
        plant(outdated, outdated.file)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_the_named_test_kills_the_bug(number, tmp_path):
    bug = BUGS[number - 1]
    text = (ROOT / bug.file).read_text()
    assert text.count(bug.old) == 1
    (tmp_path / "tests").mkdir()
    (tmp_path / bug.file).write_text(text.replace(bug.old, bug.new))
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "tests" / "method" / f"test_{bug.file}", tmp_path / "tests")
    options = ("-q", "--tb=no", "-p", "no:cacheprovider", "-k", bug.killer)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout  # 0: nothing failed, 5: there is no such test
