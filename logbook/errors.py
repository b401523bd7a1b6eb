"""Mistakes the user can repair: one sentence on stderr, exit code 2, no traceback.

    from logbook import UserError, check_end, check_kept, check_numbers, cli, must_fit, usable_device, user_errors

Not here: what a particular script refuses besides.
"""
import contextlib
import math
import sys

import torch


class UserError(Exception):
    """A mistake the user can repair: the message says what is wrong and what to do; no traceback is shown."""


def check_numbers(args, least, free=("reward_offset",)):
    """Refuse what could only fail later. Numbers of the dataclass `args` are finite and greater than 0, but for those
    in `least`, {name: minimum, and infinity is allowed}, and `free`, which only have to be finite.
    """
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        option = f"--{name.replace('_', '-')}"
        if name == "demo_share" and not 0 <= value <= 1:
            raise UserError(f"{option} is between 0 and 1, got {value}")
        if name in least and not value >= least[name]:
            raise UserError(f"{option} must be at least {least[name]:g}, got {value}")
        if name == "seed" and value >= 2 ** 32:
            raise UserError(f"{option} must be below 2**32, got {value}")
        if name in free and not math.isfinite(value):
            raise UserError(f"{option} must be a finite number, got {value}")
        if name not in ("demo_share", *least, *free) and not 0 < value < math.inf:
            raise UserError(f"{option} must be a number greater than 0, got {value}")
        if name in ("discount", "tau", "policy_tau", "chi2_tau", "gae_lambda", "denoising_discount") and value > 1:
            raise UserError(f"{option} is at most 1, got {value}")


def usable_device(name, mps=True):
    """The torch device of this name, auto for the best one (mps: Apple's too); UserError where it cannot be used."""
    best = "cuda" if torch.cuda.is_available() else "mps" if mps and torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)             # its streams, captures and random numbers are the current GPU's
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); --device auto takes "
                        f"{best}") from error
    return device


@contextlib.contextmanager
def user_errors():
    """Around files and simulators, whose errors say themselves what is wrong and what to do."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def must_fit(path, advice="leave out the flags that change its networks or its replay"):
    """Around load_state_dict: what a checkpoint does not fit is the user's to repair."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this run ({str(error).splitlines()[-1].strip()}): {advice}") from error


def check_kept(folder, args, begun, names):
    """Refuse to go on with the run in `folder` with other arguments than it was begun with."""
    for name in names:
        if getattr(args, name, None) != getattr(begun, name, None):
            raise UserError(f"{folder} was begun with {name} {getattr(begun, name)}: it cannot go on with "
                            f"{getattr(args, name)}")


def check_end(folder, step, args, name="online_steps"):
    """Refuse an end before the step where the run is: args.json would then claim a shorter run than the rows show."""
    if step > getattr(args, name):
        raise UserError(f"{folder} has {step} steps already: --{name.replace('_', '-')} must be at least that")


def cli(main):
    """Run a script's main(); a UserError becomes one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:                         # the second Ctrl-C: the user knows
        raise SystemExit(130) from None


def reason(error):
    """The operating system's own words, also when torch wrapped them in an error of its own."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0] or type(error).__name__
