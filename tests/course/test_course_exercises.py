"""The checker: answers are right, every wrong variant gets its own message, nothing crashes it."""

import json
import subprocess
import sys
from pathlib import Path

import answers
import pytest
import torch

from course import checker
from course.__main__ import main
from course.problems import PROBLEMS

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = Path(answers.__file__)
VARIANTS = [(problem, *mistake) for problem in PROBLEMS for mistake in problem.mistakes]
FIRST = PROBLEMS[0]


def hand_in(tmp_path, text):
    path = tmp_path / "hand_in.py"
    path.write_text(text)
    return path


def only(path, name="posterior"):
    return next(one for one in checker.check_file(path) if one.name == name)


def test_untouched_exercises_are_not_attempted():
    done = subprocess.run(
        [sys.executable, "-m", "course", "check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout.count("not attempted") == len(PROBLEMS) == 23
    assert "This runs the code" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.key)
def test_the_answer_is_right_for_twenty_seeds(problem):
    for seed in range(20):
        verdict = checker.check(problem, getattr(answers, problem.name), seed)
        assert (verdict.status, verdict.message) == ("right", problem.lesson)


@pytest.mark.parametrize(
    ("problem", "message", "mistake"), VARIANTS, ids=[f"{p.key}-{m[:30]}" for p, m, _ in VARIANTS]
)
def test_a_wrong_variant_is_told_its_own_mistake(problem, message, mistake):
    for seed in range(3):
        verdict = checker.check(problem, mistake, seed)
        assert (verdict.status, verdict.message) == ("wrong", message)


def test_each_exercise_knows_three_mistakes_or_more_and_no_two_alike():
    for problem in PROBLEMS:
        messages = [message for message, _ in problem.mistakes]
        assert len(messages) == len(set(messages)) >= 3


def test_every_blank_is_checked_and_documented():
    import course.exercises as blanks

    for problem in PROBLEMS:
        function = getattr(blanks, problem.name)
        assert function.__doc__.startswith(f"{problem.key}. ")
        assert hasattr(answers, problem.name)


def test_the_command_judges_one_unit_and_speaks_json(capsys):
    assert main(["check", "4", "--file", str(ANSWERS), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["right"], out["of"]) == (4, 4)
    assert [one["exercise"] for one in out["exercises"]] == ["4a", "4b", "4c", "4d"]
    assert {one["status"] for one in out["exercises"]} == {"right"}
    assert set(out["exercises"][0]) == {"exercise", "name", "unit", "status", "message"}


def test_a_file_that_cannot_be_loaded_is_reported(tmp_path, capsys):
    path = hand_in(tmp_path, "def posterior(:\n")
    assert main(["check", "--file", str(path)]) == 2
    assert "line 1" in capsys.readouterr().out
    assert main(["check", "--file", str(tmp_path / "none.py"), "--json"]) == 2
    assert "no Python file" in json.loads(capsys.readouterr().out)["error"]
    path = hand_in(tmp_path, "import sys\nsys.exit(3)\n")
    assert main(["check", "--file", str(path)]) == 2
    assert "SystemExit in line 2" in capsys.readouterr().out


BROKEN = (
    ("return prior[:2]", "shape (2,), expected (6,)"),
    ("return prior.unknown", "AttributeError in line 4"),
    ("prior * 2", "your function returned nothing"),
    ("return 'softmax'", "got str"),
    ("return prior, q", "expected 1 values, got 2"),
    ("return torch.softmax(prior.log() + q / eta, -1) * 3", "every number is 3 times"),
    ("return torch.rand(len(q))", "rows must sum to 1"),
    ("return torch.softmax(q.flip(0), -1)", "largest error"),
    ("return q / 0", "not finite"),
    ("raise SystemExit", "SystemExit"),
)


@pytest.mark.parametrize(("body", "message"), BROKEN, ids=[one[1] for one in BROKEN])
def test_an_unknown_mistake_is_described(tmp_path, body, message):
    path = hand_in(tmp_path, f"import torch\n\ndef posterior(prior, q, eta):\n    {body}\n")
    verdict = only(path)
    assert verdict.status == "wrong"
    assert message in verdict.message
    assert "there is no function gap" in only(path, "gap").message


def test_a_softmax_is_a_right_answer_to_4a():
    problem = next(one for one in PROBLEMS if one.key == "4a")
    for seed in range(20):
        found = checker.check(problem, lambda q, eta: torch.softmax(q / eta, -1), seed)
        assert found.status == "right", found.message


def test_of_two_mistakes_at_once_the_first_is_named():
    def twice_wrong(weights):
        return 1 / weights.square().sum(-1), (weights * weights.log()).sum(-1)

    problem = next(one for one in PROBLEMS if one.key == "4b")
    found = checker.check(problem, twice_wrong)
    assert found.status == "wrong"
    assert found.message == f"more than one mistake. Value 1: {problem.mistakes[0][0]}"


def test_an_endless_loop_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(checker, "SECONDS", 0.2)
    path = hand_in(tmp_path, "def posterior(prior, q, eta):\n    while True:\n        pass\n")
    assert "does a loop never end?" in only(path).message


def test_a_hand_in_may_print_and_change_its_inputs(tmp_path, capsys):
    text = ANSWERS.read_text().replace(
        "    w = prior * torch.exp((q - q.max()) / eta)\n    return w / w.sum()",
        "    print('noise')\n    q -= q.max()\n    prior *= torch.exp(q / eta)\n"
        "    return prior / prior.sum()",
    )
    assert "noise" in text
    assert only(hand_in(tmp_path, text)).status == "right"
    assert capsys.readouterr().out == ""


def test_the_right_values_are_those_of_the_closed_forms():
    """The numbers of the plan: dual 2.2361 and 0.4472, alive 0.795, 0.401 and 0.498, mass 0.583."""
    assert answers.dual_minimum(0.5, 2, 0.1) == pytest.approx((2.2361, 0.4472), abs=1e-4)
    found = [answers.alive(0.15, s, d) for s, d in ((0.1, 2), (0.3, 2), (0.2, 35))]
    assert found == pytest.approx([0.795, 0.401, 0.498], abs=1e-3)
    mass = [answers.best_mass(f, 1 / 6, 1) for f in (1, 0.5, 0.25, 0)]
    assert mass == pytest.approx([0.583, 0.722, 0.833, 1], abs=2e-3)
    claim = torch.tensor([2.50], dtype=torch.float64)
    assert float(answers.true_gain(claim, 1, 1)) == pytest.approx(1.25)
