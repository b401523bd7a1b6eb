"""Mistakes the user can repair: one sentence on stderr, exit code 2, no traceback.

    from logbook import UserError, check_end, cli, must_fit, user_errors

    with user_errors():
        task = get_task(name)              # its ValueError is the sentence that the user reads
    if __name__ == "__main__":
        cli(main)

Not here: limits of arguments (options.py), what a particular script refuses besides.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .console import outlive_console

NETWORK_ADVICE = "leave out the flags that change its networks or its replay"


class UserError(Exception):
    """A mistake the user can repair. The message says what is wrong and what to do."""


def cli(main: Callable[[], Any]) -> Any:
    """Run a script's main. A UserError becomes one line on stderr and exit code 2.

    Printing cannot end the run: where the terminal or the pipe has gone, what is printed is lost.
    """
    outlive_console()
    try:
        return main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # the second Ctrl-C: the user knows
        raise SystemExit(130) from None


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors of files and simulators, which say what to do, into a UserError."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def must_fit(path: str | Path, advice: str = NETWORK_ADVICE) -> Iterator[None]:
    """Turn whatever load_state_dict raises into a UserError: the file does not fit this run.

    A file that was altered by hand makes it fail in almost any way, hence the long list.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} does not fit this run ({error} is missing): {advice}") from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{path} does not fit this run ({last_line(error)}): {advice}") from error


def check_end(folder: str | Path, step: int, args: Any, name: str = "online_steps") -> None:
    """Refuse an end before the step that the run has reached.

    args.json would otherwise claim a shorter run than the rows show.
    """
    if step > vars(args)[name]:
        flag = name.replace("_", "-")
        raise UserError(f"{folder} has {step} steps already: --{flag} must be at least that")


def reason(error: BaseException) -> str:
    """Return the operating system's own words, also where torch wrapped them in its error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0] or type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message: torch puts the cause there."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
