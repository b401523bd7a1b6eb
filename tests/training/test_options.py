"""Limits of arguments: on the command line, and when a run's args.json is read back.

python -m pytest tests/training/test_options.py      # 3 s
"""

import ast
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from logbook import UserError
from logbook.options import (
    Count,
    Finite,
    Fraction,
    Positive,
    Share,
    Threshold,
    Width,
    check_limits,
    stored_values,
)

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Numbers:
    count: Count = 3
    layers: Width = 2
    rate: Positive = 0.1
    tau: Fraction = 1.0
    clip: Threshold = float("inf")
    reward_offset: Finite = -0.5
    demo_share: Share | None = None
    precision: Literal["auto", "float32"] = "auto"
    quick: bool = False
    name: str = "-1"
    overwrite: bool = False


INF = float("inf")
NAN = float("nan")
WRONG = [
    ("count", 0, "must be at least 1"),
    ("layers", 2**70, "must be at most 65536"),
    ("rate", INF, "must be a finite number"),
    ("rate", NAN, "must be a finite number"),
    ("rate", 0, "must be greater than 0"),
    ("tau", 1.1, "must be at most 1"),
    ("clip", -0.1, "must be at least 0"),
    ("clip", NAN, "must be a finite number"),
    ("reward_offset", INF, "must be a finite number"),
    ("demo_share", 1.5, "must be at most 1"),
    ("demo_share", NAN, "must be a finite number"),
]


@pytest.mark.parametrize("name, value, told", WRONG)
def test_numbers_that_could_only_fail_later_are_refused(name, value, told):
    check_limits(Numbers())
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{option} {told}, got {value}"):
        check_limits(dataclasses.replace(Numbers(), **{name: value}))


TYPES = [
    ("count", 3.5, "must be a whole number"),
    ("count", True, "must be a whole number"),
    ("count", "3", "must be a whole number"),
    ("count", None, "must be a whole number"),
    ("rate", [0.1], "must be a number"),
    ("quick", 1, "must be of type bool"),
    ("name", {"a": 1}, "must be of type str"),
    ("precision", "float16", "must be one of auto, float32"),
]


def stored(folder, **args):
    (folder / "args.json").write_text(json.dumps({"args": args}))
    return stored_values(Numbers, str(folder))


@pytest.mark.parametrize("name, value, told", [*WRONG[:1], *WRONG[2:], *TYPES])
def test_a_stored_value_that_cannot_be_is_refused_by_the_name_of_its_field(
    tmp_path, name, value, told
):
    with pytest.raises(UserError, match=f"args.json: {name} {told}"):
        stored(tmp_path, **{name: value})


def test_a_stored_number_that_no_machine_can_count_is_refused_too(tmp_path):
    with pytest.raises(UserError, match="layers is too large"):
        stored(tmp_path, layers=2**70)
    with pytest.raises(UserError, match="layers must be at most 65536, found 1099511627776"):
        stored(tmp_path, layers=2**40)


def test_what_was_stored_is_read_back(tmp_path):
    values = dataclasses.asdict(Numbers(count=7, demo_share=0.5))
    assert Numbers(**stored(tmp_path, **values)) == Numbers(count=7, demo_share=0.5)


def fields_of(path):
    """Yield the fields of a file's dataclasses of arguments: name, and its own source lines."""
    text = path.read_text()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Args"):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
                continue
            yield field.target.id, text.splitlines()[field.lineno - 1 : field.end_lineno]


SCRIPTS = (
    "train_offline",
    "train_online",
    "vla_head",
    "arms/settings",
    "demos/__main__",
    "baselines/qc",
    "baselines/fql",
    "baselines/rlpd",
    "baselines/dsrl",
    "baselines/ogpo",
    "baselines/ppo",
    "baselines/dppo",
    "baselines/reinflow",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_help_text_where_the_parser_finds_it(name):
    """It is the trailing comment: inside parentheses, where a formatter may move it, it is lost."""
    fields = dict(fields_of(ROOT / f"{name}.py"))
    assert fields
    for field, lines in fields.items():
        if field == "role":  # positional, explained by its choices
            continue
        assert len(lines) == 1 and re.search(r"  # \S", lines[0]), field
