"""Judge a hand-in: load the file, call each blank with fresh numbers, name the mistake.

    from checker import check_file
    verdicts = check_file(path, unit=None, seed=0)      # 5 seconds for all 23 exercises

A verdict is "right", "wrong" or "not attempted", with a message. The hand-in is ordinary Python and
runs with your rights: check other people's files where they can do no harm.
Not here: the right values and the mistakes (problems.py), the command line (__main__.py).
"""

import contextlib
import copy
import importlib.util
import io
import math
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from .problems import PROBLEMS, Problem, call

SECONDS = 20  # for one exercise; the answers need far less than one


@dataclass
class Verdict:
    """What the checker says about one exercise."""

    exercise: str
    name: str
    unit: int
    status: str  # "right", "wrong" or "not attempted"
    message: str


class Refused(Exception):
    """A hand-in whose answer cannot be compared: the message says why."""


class TooSlow(Exception):
    """An exercise ran past its time."""


def load(path: Path):
    """Run a hand-in and return its module. Raises Refused where the file itself fails."""
    spec = importlib.util.spec_from_file_location("hand_in", path)
    if spec is None or not Path(path).is_file():
        raise Refused(f"there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        with quiet(), deadline():
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Refused(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise Refused(f"{path} stops before it is loaded: {describe(error, path)}") from None
    return module


def check_file(path: Path, unit: int | None = None, seed: int = 0) -> list[Verdict]:
    """Check all exercises of a hand-in, or those of one unit."""
    module = load(Path(path))
    return [
        check(problem, getattr(module, problem.name, None), seed, path)
        for problem in PROBLEMS
        if unit in (None, problem.unit)
    ]


def check(problem: Problem, function, seed: int = 0, path: Path | str = "") -> Verdict:
    """Judge one function against one exercise."""
    status, message = "wrong", f"there is no function {problem.name}: do not rename it"
    if function is not None:
        try:
            status, message = _judge(problem, function, seed)
        except NotImplementedError:
            status, message = "not attempted", ""
        except Refused as refusal:
            message = str(refusal)
        except TooSlow:
            message = f"still running after {SECONDS} s: does a loop never end?"
        except (Exception, SystemExit) as error:
            message = f"your code raised {describe(error, path)}"
    return Verdict(problem.key, problem.name, problem.unit, status, message)


def _judge(problem: Problem, function, seed: int) -> tuple[str, str]:
    cases = problem.cases(torch.Generator().manual_seed(seed))
    right = [_tensors(problem.truth(*inputs)) for inputs in cases]
    with quiet(), deadline():
        found = [_observe(problem, function, inputs) for inputs in cases]
    for number, (mine, wanted) in enumerate(zip(found, right), 1):
        _compare_shapes(mine, wanted, number)
    if _agree(found, right, right, problem.tolerance):
        return "right", problem.lesson
    for message, mistake in problem.mistakes:
        wrong = [_observe(problem, mistake, inputs) for inputs in cases]
        if _agree(found, wrong, right, problem.tolerance):
            return "wrong", message
    return "wrong", _partial(problem, cases, found, right) or _numbers(problem, found, right)


def _partial(problem: Problem, cases, found, right) -> str:
    """Name the mistake in the first wrong one of several values, where more than one is wrong."""
    values = len(right[0])
    if values == 1 or problem.observe is not call:  # a gradient is no value that was returned
        return ""
    for k in range(values):
        mine, wanted = _part(found, k), _part(right, k)
        if _agree(mine, wanted, wanted, problem.tolerance):
            continue
        for message, mistake in problem.mistakes:
            wrong = _part([_observe(problem, mistake, inputs) for inputs in cases], k)
            if _agree(mine, wrong, wanted, problem.tolerance):
                return f"more than one mistake. Value {k + 1}: {message}"
    return ""


def _part(answers, k: int) -> list[tuple[torch.Tensor, ...]]:
    """Keep the k-th value of each answer; a mistake may return fewer."""
    return [answer[k : k + 1] for answer in answers]


def _observe(problem: Problem, function, inputs) -> tuple[torch.Tensor, ...]:
    inputs = copy.deepcopy(inputs)  # a hand-in may change what it gets
    return _tensors(problem.observe(function, inputs))


def _tensors(values) -> tuple[torch.Tensor, ...]:
    """Turn an answer into a tuple of float64 tensors."""
    if values is None:
        raise Refused("your function returned nothing: is the return missing?")
    parts = values if isinstance(values, tuple | list) else (values,)
    out = []
    for part in parts:
        if part is None:
            raise Refused("your function returned nothing: is the return missing?")
        try:
            out.append(torch.as_tensor(part, dtype=torch.float64).detach())
        except (TypeError, ValueError, RuntimeError):
            kind = type(part).__name__
            raise Refused(f"expected numbers or tensors, got {kind}") from None
    return tuple(out)


def _compare_shapes(mine, wanted, number: int) -> None:
    if len(mine) != len(wanted) and len(mine) != 1:
        raise Refused(f"expected {len(wanted)} values, got {len(mine)}")
    for one, other in zip(mine, wanted):
        if one.shape != other.shape and (one.numel() > 1 or other.numel() > 1):
            shapes = f"{tuple(one.shape)}, expected {tuple(other.shape)}"
            raise Refused(f"input {number}: shape {shapes}")
    if len(mine) != len(wanted):
        raise Refused(f"expected {len(wanted)} values, got 1")


def _agree(found, other, right, tolerance: float) -> bool:
    """Say whether two lists of answers are the same, within the tolerance."""
    for mine, theirs, scale in zip(found, other, right):
        if not len(mine) == len(theirs) == len(scale):
            return False
        for one, two, size in zip(mine, theirs, scale):
            if one.numel() != two.numel():
                return False
            largest = float(size.abs().max())
            limit = tolerance * max(1.0, largest if math.isfinite(largest) else 1.0)
            if not torch.allclose(one.flatten(), two.flatten(), rtol=0, atol=limit, equal_nan=True):
                return False
    return True


def _numbers(problem: Problem, found, right) -> str:
    """Describe an answer that matches no known mistake."""
    mine = torch.cat([part.flatten() for answer in found for part in answer])
    wanted = torch.cat([part.flatten() for answer in right for part in answer])
    if not torch.isfinite(mine).all():
        return f"{int((~torch.isfinite(mine)).sum())} of {len(mine)} numbers are not finite"
    ratio = float((mine @ wanted) / (wanted @ wanted))
    if (
        abs(ratio) > 1e-9
        and abs(ratio - 1) > 1e-3
        and torch.allclose(mine, ratio * wanted, rtol=1e-6, atol=1e-9)
    ):
        return f"every number is {ratio:.4g} times the right one"
    if problem.rows_sum_to_one:
        sums = torch.cat([answer[0].sum(-1).reshape(-1) for answer in found])
        if (sums - 1).abs().max() > 1e-6:
            low, high = float(sums.min()), float(sums.max())
            return f"rows must sum to 1; yours sum to {low:.4g} ... {high:.4g}"
    worst = int((mine - wanted).abs().argmax())
    return (
        f"largest error {float((mine - wanted).abs().max()):.3g}: "
        f"{float(mine[worst]):.4g} where {float(wanted[worst]):.4g} is right"
    )


def describe(error: BaseException, path: Path | str) -> str:
    """Return the error's kind, its message and its line in the hand-in."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).name == Path(path).name
    ]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


@contextlib.contextmanager
def quiet():
    """Swallow what a hand-in prints: the verdicts must stay readable, also as JSON."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def deadline():
    """Interrupt a hand-in that does not return. Where there are no alarms (Windows), wait."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
