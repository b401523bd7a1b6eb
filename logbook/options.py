"""One command line for every script: a dataclass, its task's defaults, limits beside the fields.

    from logbook.options import Count, NonNegative, Positive, parse

    @dataclass
    class Args:
        task: str = "lift"                 # the help text of --task
        learning_rate: Positive = 3e-4     # Adam; the limit stands in the type

        kept: ClassVar[tuple[str, ...]] = ("task",)      # what a resumed run may not change

        @classmethod
        def defaults(cls, known: dict) -> dict:          # known: --task, --preset, --setting ...
            return {"learning_rate": 1e-3} if known["task"] == "square" else {}

    args = parse(Args)                     # the user's flags win over a task's defaults

Not here: what the values mean (each script), what a task's defaults are (envs.py).
"""

import argparse
import dataclasses
import math
import sys
import typing
from typing import Annotated, Any, NamedTuple

from .errors import UserError


class Limit(NamedTuple):
    """What a number may be. Infinity is refused unless `infinite` says otherwise; NaN always is."""

    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    infinite: bool = False

    def violation(self, value: float) -> str | None:
        """Say what is wrong with value, or return None."""
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return "must be a finite number"
        if value <= self.above:
            return f"must be greater than {self.above:g}"
        if value < self.least:
            return f"must be at least {self.least:g}"
        if value > self.most:
            return f"must be at most {self.most:g}"
        return None


Finite = Annotated[float, Limit()]
Positive = Annotated[float, Limit(above=0)]
NonNegative = Annotated[float, Limit(least=0)]
Threshold = Annotated[float, Limit(least=0, infinite=True)]  # inf switches it off
Temperature = Annotated[float, Limit(least=1e-6)]
Share = Annotated[float, Limit(least=0, most=1)]
Fraction = Annotated[float, Limit(above=0, most=1)]
Count = Annotated[int, Limit(least=1, most=10**12)]
CountOrZero = Annotated[int, Limit(least=0, most=10**12)]
Width = Annotated[int, Limit(least=1, most=2**16)]  # of a network: beyond, memory runs out
Seed = Annotated[int, Limit(least=0, most=2**32 - 1)]

FIRST = ("task", "preset", "setting", "seed", "resume", "eval", "run_dir")  # read before the rest


def parse(
    cls: type,
    argv: list[str] | None = None,
    description: str | None = None,
    method: str | None = None,
) -> Any:
    """Read the command line into an instance of the dataclass `cls`.

    --task and --preset are read first, so that --help shows the values under them. With --resume or
    --eval the run's own arguments are the defaults. Raises UserError for a value outside its limit,
    and for a resumed run that would go on with another value of a field in `cls.kept`.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else list(argv)
    known = first_look(argv)
    folder = known["resume"] or known["eval"]
    if known["resume"] and known["eval"]:
        raise UserError("--resume continues a run, --eval tests one: give one of them")
    if folder:
        values = stored_values(cls, folder, method)
        if known["task"] not in (None, values.get("task")):
            raise UserError(f"{folder} is a run of task {values['task']}, not of {known['task']}")
    else:
        values = cls.defaults(known)
    default = cls(**values)
    if description is None:
        description = sys.modules[cls.__module__].__doc__
    args = tyro.cli(cls, args=argv, default=default, description=description)
    if known["resume"]:
        refuse_changes(folder, args, default, cls.kept)
    check_limits(args)
    return args


def first_look(argv: list[str]) -> dict[str, str | None]:
    """Return what the command line says of the fields in FIRST, None where it says nothing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in FIRST:
        parser.add_argument(*dict.fromkeys((option(name), f"--{name}")), dest=name)
    return vars(parser.parse_known_args(argv)[0])


def stored_values(cls: type, folder: str, method: str | None = None) -> dict[str, Any]:
    """Return the run's arguments that are fields of cls, each checked for type and limit."""
    from . import read_args

    stored = read_args(folder, method=method)
    stored["overwrite"] = False
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in stored:
            continue
        value = stored[field.name]
        if isinstance(value, list):
            value = tuple(value)
        problem = type_violation(hints[field.name], value)
        if problem:
            raise UserError(f"{folder}/args.json: {field.name} {problem}, found {value!r:.80}")
        values[field.name] = value
    return values


def type_violation(hint: Any, value: Any) -> str | None:
    """Say what is wrong with a stored value of a field of this type, or return None."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *limits = typing.get_args(hint)
        problem = type_violation(base, value)
        for limit in limits:
            if problem is None and isinstance(limit, Limit):
                problem = limit.violation(value)
        return problem
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        return None if value in choices else f"must be one of {', '.join(map(str, choices))}"
    if origin is tuple:
        return None if isinstance(value, tuple) else "must be a list"
    if origin is not None:  # a union such as float | None
        problems = [type_violation(one, value) for one in typing.get_args(hint)]
        return problems[0] if all(problems) else None
    if hint is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return None if good else "must be a number"
    if hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
        return None if good else "must be a whole number"
    return None if isinstance(value, hint) else f"must be of type {hint.__name__}"


def check_limits(args: Any) -> None:
    """Refuse numbers outside the limits in the types of args' fields. Raises UserError."""
    hints = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        value = vars(args)[field.name]
        problem = type_violation(hints[field.name], value)
        if problem:
            raise UserError(f"{option(field.name)} {problem}, got {value}")


def refuse_changes(folder: str, args: Any, begun: Any, names: tuple[str, ...]) -> None:
    """Refuse to continue a run with other values of these fields than it began with."""
    for name in names:
        before = vars(begun)[name]
        now = vars(args)[name]
        if now != before:
            raise UserError(
                f"{folder} began with {option(name)} {before}: it cannot go on with {now}"
            )


def option(name: str) -> str:
    """Return a field's flag: online_steps -> --online-steps."""
    return f"--{name.replace('_', '-')}"
