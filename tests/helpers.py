"""What tests of several folders share."""

import csv
from pathlib import Path
from typing import Any

import torch


def same(a: Any, b: Any, path: str = "") -> None:
    """Assert bitwise equality of two checkpoints, but for wall time and the best evaluation."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for name in a:
            if name not in ("seconds", "row_seconds", "best"):
                same(a[name], b[name], f"{path}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
