"""For benchmarks/, until they use options.py."""

import math

from .errors import UserError


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
        if name == "seed" and value >= 2**32:
            raise UserError(f"{option} must be below 2**32, got {value}")
        if name in free and not math.isfinite(value):
            raise UserError(f"{option} must be a finite number, got {value}")
        if name not in ("demo_share", *least, *free) and not 0 < value < math.inf:
            raise UserError(f"{option} must be a number greater than 0, got {value}")
        if (
            name
            in ("discount", "tau", "policy_tau", "chi2_tau", "gae_lambda", "denoising_discount")
            and value > 1
        ):
            raise UserError(f"{option} is at most 1, got {value}")
