"""Turn the six percent scripts into notebooks that also run alone, for example in Colab.

    python -m course notebooks          # writes runs/course/notebooks/1_inference.ipynb ...

Each notebook carries the files it needs, packed into its first cell. Inside a clone of the project
it uses the clone. Notebooks are generated and not committed: only the scripts are edited.
"""

import base64
import io
import json
import zipfile
from pathlib import Path

from .toy import ROOT, RUNS, run_folder

SCRIPTS = tuple(sorted((ROOT / "course").glob("[1-6]_*.py")))
METHOD = ("poco.py", "flow_policy.py", "chunk_critic.py", "replay.py")
SETUP = """# Set-up: run me first. Finds the project, or unpacks what the course needs of it.
import base64, importlib.util, io, pathlib, subprocess, sys, zipfile

needed = ("torch", "numpy", "matplotlib", "scipy")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
here = pathlib.Path.cwd()
found = [one for one in (here, *here.parents) if (one / "course" / "toy.py").exists()]
project = found[0] if found else here / "poco_course"
if not found:
    packed = "{packed}"
    zipfile.ZipFile(io.BytesIO(base64.b64decode(packed))).extractall(project)
sys.path.insert(0, str(project / "course"))
print(f"exercises: edit {{project / 'course' / 'exercises.py'}}")
print(f"then run:  cd {{project}}; python -m course check")
"""


def split(text: str) -> list[tuple[str, str]]:
    """Split a percent script into cells: (kind, source), kind is "markdown" or "code"."""
    cells = []
    for block in ("\n" + text).split("\n# %%")[1:]:
        head, _, body = block.partition("\n")
        body = body.strip("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.split("\n")]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body))
    return cells


def bundle(runs: tuple[str, ...] = ()) -> str:
    """Pack the method files, the course and some committed runs, as base64 text."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in METHOD:
            archive.write(ROOT / name, name)
        for path in sorted((ROOT / "course").glob("*.py")):
            archive.write(path, f"course/{path.name}")
        for run in runs:
            for name in ("progress.csv", "args.json"):
                archive.write(run_folder(run) / name, f"benchmarks/results/{run}/{name}")
    return base64.b64encode(packed.getvalue()).decode()


def notebook(text: str, packed: str) -> dict:
    """Build a notebook, as the JSON of nbformat 4.5, from a percent script."""
    cells = [("code", SETUP.format(packed=packed)), *split(text)]
    out = []
    for number, (kind, source) in enumerate(cells):
        cell = {
            "id": f"cell-{number}",
            "cell_type": kind,
            "metadata": {"cellView": "form"} if number == 0 else {},  # Colab folds the set-up
            "source": source.splitlines(keepends=True),
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        out.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": out, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write(folder: Path) -> list[Path]:
    """Write all notebooks to a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for script in SCRIPTS:
        packed = bundle(RUNS if script.stem == "6_poco" else ())
        path = folder / f"{script.stem}.ipynb"
        path.write_text(json.dumps(notebook(script.read_text(), packed), indent=1))
        paths.append(path)
    return paths
