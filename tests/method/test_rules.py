"""The rules that keep the files readable and copyable: who imports whom, what each file needs,
tags, sizes, layout.

python -m pytest tests/test_rules.py
"""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD = ("poco", "flow_policy", "chunk_critic", "replay")
# Imports point downwards, or sideways above the ground floor; the ground floor imports no project
# file at all.
FLOORS = (
    {*METHOD, "logbook", "envs"},
    {"arms", "demos", "distributed", "vla_head", "robot"},
    {"train_offline", "train_online", "baselines", "benchmarks"},
)
PROJECT = set.union(*FLOORS)
SIMULATORS = {"robosuite", "robomimic", "mujoco", "ogbench", "dm_control"}
LAYOUT = [
    "poco.py",
    "flow_policy.py",
    "chunk_critic.py",
    "replay.py",
    "envs.py",
    "robot.py",
    "vla_head.py",
    "train_offline.py",
    "train_online.py",
    "tests",
    "demos",
    "logbook",
    "baselines",
    "arms",
    "distributed",
    "benchmarks",
    "README.md",
    "requirements.txt",
    "Makefile",
    "LICENSE",
    ".ci/run",
]
PENDING = set()  # skipped until they exist

TOP = sorted(ROOT.glob("*.py"))
SOURCES = TOP + sorted(path for name in PROJECT for path in (ROOT / name).rglob("*.py"))
ALL = SOURCES + sorted((ROOT / "tests").glob("*.py"))


def module(path):
    """The top-level name a source file belongs to: poco.py -> poco, demos/lift.py -> demos."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path, everywhere=True):
    """Top-level names imported by a file; with everywhere=False only those that importing the file
    itself imports."""
    nodes, names = [ast.parse(path.read_text(encoding="utf-8"))], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return names


def identifier(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_imports_point_downwards(path):
    floor = next(i for i, names in enumerate(FLOORS) if module(path) in names)
    used = imports(path) & PROJECT - {module(path)}
    allowed = set().union(*FLOORS[: floor + 1]) if floor else set()
    assert used <= allowed, f"{path.name} must not import {used - allowed}"
    assert "tests" not in imports(path) and "conftest" not in imports(path)


def test_no_two_modules_import_each_other():
    graph = {}
    for path in SOURCES:
        graph.setdefault(module(path), set()).update(
            imports(path, everywhere=False) & PROJECT - {module(path)}
        )
    assert len(tuple(TopologicalSorter(graph).static_order())) >= len(
        METHOD
    )  # CycleError otherwise


@pytest.mark.parametrize("name", METHOD)
def test_a_method_file_needs_torch_only(name):
    """The standard library and torch, numpy in the replay; the demo loads matplotlib when it
    draws."""
    path, extra = ROOT / f"{name}.py", {"numpy"} if name == "replay" else set()
    assert imports(path, everywhere=False) - sys.stdlib_module_names == {"torch"} | extra
    assert imports(path) - sys.stdlib_module_names <= {"torch"} | extra | (
        {"matplotlib"} if name == "poco" else set()
    )


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_simulators_are_imported_inside_functions_of_envs(path):
    """So that no other file needs one, and `import envs` needs none."""
    assert not imports(path, everywhere=False) & SIMULATORS
    assert (
        path.name == "envs.py"
        or module(path) in ("arms", "demos")
        or not imports(path) & SIMULATORS
    )


ALONE = {
    "poco": """
import torch, poco
class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(2, 3))
    def sample(self, context, n):
        return self.mean + torch.randn(len(context), n, 2, 3)
    def cfm_loss(self, context, actions, valid=None):
        return (actions - self.mean).square().mean((-2, -1))
policy, context = Policy(), torch.zeros(4, 1)
candidates, weights, stats = poco.e_step(policy, lambda _, a: a.sum((-2, -1)), context, 32, 0.1)
loss, _ = poco.m_step_loss(policy, context, torch.zeros(4, 2, 3), None, candidates, weights, 1.0, 10.0)
loss.backward()
assert policy.mean.grad.mean() < 0 and candidates.shape == (4, 32, 2, 3)        # descent raises Q
""",
    "flow_policy": """
import torch
from flow_policy import FlowPolicy
policy = FlowPolicy(obs_dim=19, action_dim=7, horizon=5, hidden=32)
context = policy.encode(torch.randn(3, 19))
policy.cfm_loss(context, torch.zeros(3, 1, 5, 7)).mean().backward()
assert policy.sample(context, n=32).shape == (3, 32, 5, 7)
""",
    "chunk_critic": """
import copy, torch
from chunk_critic import ChunkCritic, critic_loss, ema_update, td_target
critic = ChunkCritic(obs_dim=19, action_dim=7, horizon=5, hidden=32)
target, obs, chunk = copy.deepcopy(critic), torch.randn(3, 19), torch.zeros(3, 5, 7)
y = td_target(torch.ones(3), torch.ones(3), target(obs, chunk[:, None]).mean((0, 2)))
critic_loss(critic, obs, chunk, y)[0].backward()
ema_update(target, critic, 0.005)
assert y.shape == (3,)
""",
    "replay": """
import numpy as np
from replay import ChunkReplay
replay = ChunkReplay(capacity=100, obs_dim=19, action_dim=7, horizon=5, discount=0.99)
flags = dict(reward=np.zeros(9), terminated=np.zeros(9), truncated=np.zeros(9))
replay.extend(dict(obs=np.zeros((9, 19)), action=np.zeros((9, 7)), next_obs=np.zeros((9, 19)), **flags))
replay.add(np.zeros(19), np.zeros(7), 1.0, np.zeros(19), True, False)
assert replay.sample(256).chunk.shape == (256, 5, 7)
""",
}


@pytest.mark.parametrize("name", METHOD)
def test_a_method_file_works_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    here = f"import {name}\nassert {name}.__file__ == {str(tmp_path / name) + '.py'!r}\n"
    (tmp_path / "use.py").write_text(ALONE[name] + here)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    out = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr


def tagged(path):
    """Equation numbers in trailing comments, `# Eq. 16`, `# Eq. 22 and 23, second term`: {16, 22,
    23}."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        tag = (
            re.match(r"# Eq\. (\d+(?:(?:, | and |-)\d+)*)", token.string)
            if token.type == tokenize.COMMENT
            else None
        )
        if tag and token.line.strip() != token.string:  # trailing: there is code before it
            numbers |= {int(number) for number in re.findall(r"\d+", tag.group(1))}
    return numbers


@pytest.mark.parametrize("equation", [6, 7, 8, 13, 14, 16, 17, 22, 23, 24])
def test_each_equation_is_tagged_in_exactly_one_file(equation):
    assert len([path.name for path in SOURCES if equation in tagged(path)]) == 1


@pytest.mark.parametrize("name", LAYOUT)
def test_the_top_level_layout(name):
    if name in PENDING and not (ROOT / name).exists():
        pytest.skip(f"{name} is not written yet")
    assert (ROOT / name).exists()


def test_nothing_else_lives_at_the_top_level():
    assert {path.name for path in TOP} <= set(LAYOUT)
    packages = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert packages <= set(LAYOUT) | {"runs", "data"}


@pytest.mark.parametrize("path", ALL, ids=identifier)
def test_files_are_short_plain_and_narrow(path):
    """ASCII, at most 400 lines (550: tests, arm and VLA, 600: environments), the method files at
    most 120 columns."""
    text = path.read_bytes()
    assert text.isascii() and b"\t" not in text and b"\r" not in text
    lines = text.decode().splitlines()
    longer = path.parent.name == "tests" or path.name in ("robot.py", "vla_head.py")
    assert len(lines) <= (600 if path.name == "envs.py" else 550 if longer else 400)
    assert module(path) not in METHOD or not [
        i for i, line in enumerate(lines, 1) if len(line) > 120
    ]


@pytest.mark.parametrize("path", TOP, ids=identifier)
def test_a_file_says_what_it_is(path):
    """A docstring opens every top-level file: what it is, how to run or import it, what is not
    here."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"^    (python|from|import) ", text, re.MULTILINE) and "ot here" in text


@pytest.mark.slow
def test_the_tests_notice_every_mutant():
    """Every wrong version of a method file in tests/mutants.py fails its tests, and the right ones
    pass."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, Path(__file__).with_name("mutants.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert len(out.stdout.splitlines()) > 100
