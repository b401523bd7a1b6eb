"""The rules that keep the files readable and copyable: imports, the layout, tags, one update.

    python -m pytest tests/method/test_rules.py

Not here: style (ruff, `make lint`).
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

ROOT = Path(__file__).parent.parent.parent
METHOD = ("poco", "flow_policy", "chunk_critic", "replay")
# Imports point downwards, or sideways above the ground floor, whose files import no project file.
FLOORS = (
    {*METHOD, "logbook", "simulators"},
    {"envs"},
    {"demos"},
    {"train_offline"},
    {"train_online"},
    {"vla_head", "arms", "distributed"},
    {"robot", "baselines"},
    {"benchmarks", "course", "examples"},
)
PROJECT = set.union(*FLOORS)
# Options that load something from above, inside a function: --rollouts, --ray and --graph.
UPWARDS = {"train_online": {"distributed"}}
SIMULATORS = {"robosuite", "robomimic", "mujoco", "ogbench", "dm_control"}
TOP_LEVEL = {f"{name}.py" for name in METHOD} | {
    "envs.py",
    "robot.py",
    "vla_head.py",
    "train_offline.py",
    "train_online.py",
}
PACKAGES = {"tests", "runs", "data"} | {name for name in PROJECT if (ROOT / name).is_dir()}

TOP = sorted(ROOT.glob("*.py"))
SOURCES = TOP + sorted(path for name in PROJECT for path in (ROOT / name).rglob("*.py"))
ALL = SOURCES + sorted((ROOT / "tests").rglob("*.py"))


def module(path):
    """The top-level name a source file belongs to: poco.py -> poco, demos/lift.py -> demos."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path, everywhere=True):
    """Return the top-level names a file imports; everywhere=False: when it is imported itself."""
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
    allowed = set().union(*FLOORS[: floor + 1]) if floor else set()
    used = imports(path) & PROJECT - {module(path)}
    late = UPWARDS.get(module(path), set())
    assert used <= allowed | late, f"{path.name} must not import {used - allowed}"
    assert imports(path, everywhere=False) & PROJECT - {module(path)} <= allowed
    assert not {"tests", "conftest"} & imports(path)


def test_no_two_modules_import_each_other():
    graph = {}
    for path in SOURCES:
        used = imports(path, everywhere=False) & PROJECT - {module(path)}
        graph.setdefault(module(path), set()).update(used)
    order = tuple(TopologicalSorter(graph).static_order())  # CycleError otherwise
    assert len(order) >= len(METHOD)


@pytest.mark.parametrize("name", METHOD)
def test_a_method_file_needs_torch_only(name):
    """The standard library and torch, numpy in the replay, matplotlib when the demo draws."""
    path = ROOT / f"{name}.py"
    needed = {"torch", "numpy"} if name == "replay" else {"torch"}
    late = {"matplotlib"} if name == "poco" else set()
    assert imports(path, everywhere=False) - sys.stdlib_module_names == needed
    assert imports(path) - sys.stdlib_module_names <= needed | late


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_simulators_are_imported_when_an_environment_is_built(path):
    """So `import envs` needs no simulator, and a method file never does."""
    assert not imports(path, everywhere=False) & SIMULATORS
    if module(path) not in ("simulators", "arms", "demos", "benchmarks"):
        assert not imports(path) & SIMULATORS


def calls(path, name):
    """Count the calls of a function of this name in a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node.func for node in nodes if isinstance(node, ast.Call)]
    return sum(
        (isinstance(one, ast.Name) and one.id == name)
        or (isinstance(one, ast.Attribute) and one.attr == name)
        for one in functions
    )


@pytest.mark.parametrize("name", ["e_step", "m_step_loss"])
def test_the_update_is_written_once(name):
    """The E-step and the M-step are called in train_online.POCO.update and nowhere else."""
    elsewhere = ("poco", "baselines", "course", "examples", "benchmarks")
    files = [path for path in SOURCES if module(path) not in elsewhere]
    assert {path.name: calls(path, name) for path in files if calls(path, name)} == {
        "train_online.py": 1
    }


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
chunk = torch.zeros(4, 2, 3)
loss, _ = poco.m_step_loss(policy, context, chunk, None, candidates, weights, 1.0, 10.0)
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
states = dict(obs=np.zeros((9, 19)), next_obs=np.zeros((9, 19)))
replay.extend(dict(action=np.zeros((9, 7)), **states, **flags))
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
    """Return the equations of trailing comments: `# Eq. 22 and 23, second term`: {22, 23}."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type != tokenize.COMMENT or token.line.strip() == token.string:
            continue  # only where there is code before it
        tag = re.match(r"# Eq\. (\d+(?:(?:, | and |-)\d+)*)", token.string)
        if tag:
            numbers |= {int(number) for number in re.findall(r"\d+", tag.group(1))}
    return numbers


@pytest.mark.parametrize("equation", [6, 7, 8, 13, 14, 16, 17, 22, 23, 24])
def test_each_equation_is_tagged_in_exactly_one_file(equation):
    assert len([path.name for path in SOURCES if equation in tagged(path)]) == 1


def test_the_top_level_layout():
    assert {path.name for path in TOP} == TOP_LEVEL
    assert {path.parent.name for path in ROOT.glob("*/*.py")} <= PACKAGES
    for name in ("README.md", "Makefile", "LICENSE", "requirements.txt", "pyproject.toml"):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("path", ALL, ids=identifier)
def test_files_are_plain_ascii(path):
    text = path.read_bytes()
    assert text.isascii() and b"\t" not in text and b"\r" not in text


@pytest.mark.parametrize("path", TOP, ids=identifier)
def test_a_file_says_what_it_is(path):
    """A docstring opens every top-level file: what it is, how to run it, what is not here."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"^    (python|from|import) ", text, re.MULTILINE) and "ot here" in text


@pytest.mark.slow
def test_the_tests_notice_every_mutant():
    """Every wrong version of a method file fails its tests, and the right ones pass."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("mutants.py")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    assert len(out.stdout.splitlines()) > 110
