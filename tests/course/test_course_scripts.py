"""The six scripts: they run alone, draw their figure, and every number is as predicted."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from course import notebooks, toy

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "course" / "README.md"
NAMES = [path.stem for path in notebooks.SCRIPTS]
LONG = ("2_gaussian", "5_flow", "6_poco")
RUN_CELLS = """
import json, sys
scope = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), "cell", "exec"), scope)
"""


def run(folder, *command):
    """Run Python in a folder, with nothing of the project on its path. Return its CPU seconds."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=kept, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def results(folder, name):
    """Return the numbers that a script left in a folder, and insist on its figure."""
    assert (folder / f"{name}.png").stat().st_size > 20_000
    numbers = json.loads((folder / f"{name}.json").read_text())
    assert len(numbers) >= 6
    return numbers


def wrong(numbers):
    return [one for one in numbers if not one["right"]]


@pytest.fixture(scope="module")
def all_numbers():
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_a_script_runs_headless_and_its_numbers_are_as_predicted(name, all_numbers):
    """Each number carries its tolerance and its sample. The bar is 60 s of CPU per script."""
    for suffix in (".png", ".json"):
        (toy.FIGURES / name).with_suffix(suffix).unlink(missing_ok=True)
    seconds = run(ROOT, f"course/{name}.py")
    assert seconds < 60
    all_numbers[name] = results(toy.FIGURES, name)
    assert not wrong(all_numbers[name])


def test_the_guide_quotes_the_numbers_of_the_scripts(all_numbers):
    """Each row `| unit | name | number |` of the guide is a number that a script asserts."""
    rows = re.findall(r"^\| ([1-6]) \| (.+?) \| (-?[\d.]+) \|$", GUIDE.read_text(), re.M)
    assert len(rows) >= 25
    if len(all_numbers) < len(NAMES):
        pytest.skip("the scripts have not all run")
    expected = {
        (name[0], one["name"].strip()): one["expected"]
        for name, numbers in all_numbers.items()
        for one in numbers
    }
    for unit, name, number in rows:
        assert abs(expected[unit, name] - float(number)) < 1e-9, (unit, name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES]
)
def test_a_notebook_runs_in_an_empty_folder(name, tmp_path_factory):
    """As in Colab: only the .ipynb is there; its first cell brings the files it needs."""
    folder = tmp_path_factory.mktemp("colab")
    written = notebooks.write(tmp_path_factory.mktemp("written"))
    path = next(one for one in written if one.stem == name)
    (folder / path.name).write_text(path.read_text())
    run(folder, "-c", RUN_CELLS, path.name)
    assert not wrong(results(folder / "poco_course" / "runs" / "course", name))


def test_a_notebook_alternates_prose_and_code():
    for script in notebooks.SCRIPTS:
        text = script.read_text()
        cells = notebooks.notebook(text, "")["cells"]
        kinds = [cell["cell_type"] for cell in cells]
        assert kinds[:3] == ["code", "markdown", "code"]
        assert kinds[-1] == "markdown"
        assert "Exercises" in "".join(cells[-1]["source"])
        code = [line for kind, body in notebooks.split(text) if kind == "code" for line in [body]]
        assert all(compile(body, script.name, "exec") for body in code)
        assert text.count("**Predict") >= 1


def test_a_wrong_method_file_shows_in_the_numbers(tmp_path):
    """With eta doubled in poco.py the first script must report numbers that miss."""
    (tmp_path / "course").mkdir()
    for name in notebooks.METHOD:
        text = (ROOT / name).read_text()
        if name == "poco.py":
            old = "(q - q.amax(-1, keepdim=True)) / eta, "
            assert text.count(old) == 1
            text = text.replace(old, old.replace("/ eta", "/ (2 * eta)"))
        (tmp_path / name).write_text(text)
    for name in ("toy.py", "1_inference.py"):
        (tmp_path / "course" / name).write_text((ROOT / "course" / name).read_text())
    run(tmp_path, "course/1_inference.py")
    assert wrong(results(tmp_path / "runs" / "course", "1_inference"))
