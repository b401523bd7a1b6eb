"""Adam's state from a checkpoint: checked before it is loaded, learning rate kept.

    from logbook import keep_rate

    optimizer = keep_rate(torch.optim.Adam(policy.parameters(), lr=3e-4))
    optimizer.load_state_dict(state["optimizer"])        # checked, and goes on with 3e-4

torch checks neither shapes nor types here, and its kernels read beyond a tensor that is too small.
Not here: Adam itself (torch.optim).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

SETTINGS = ("betas", "eps", "weight_decay")  # of a checkpoint; all others are this optimiser's
MOMENTS = ("exp_avg", "exp_avg_sq")


def keep_rate(optimizer: Adam) -> Adam:
    """Let load_state_dict check what it is given and keep this optimiser's learning rate.

    What its device needs (fused, capturable) is kept as well. Returns the optimiser, whose
    load_state_dict raises ValueError where a state does not belong to its parameters.
    """
    optimizer.register_load_state_dict_pre_hook(_checked)
    return optimizer


def _checked(optimizer: Adam, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with this optimiser's own settings. Raises ValueError if it does not fit."""
    if not isinstance(state, dict) or set(state) != {"state", "param_groups"}:
        raise ValueError("the state of an optimiser is expected")
    moments = state["state"]
    groups = state["param_groups"]
    if not isinstance(moments, dict) or not isinstance(groups, list):
        raise ValueError("the state of an optimiser is expected")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"{len(optimizer.param_groups)} groups are expected, found {len(groups)}")
    parameters = []
    merged = []
    for own, saved in zip(optimizer.param_groups, groups):
        numbers = list(range(len(parameters), len(parameters) + len(own["params"])))
        _check_group(saved, numbers)
        parameters += own["params"]
        merged.append(own | {name: saved[name] for name in ("params", *SETTINGS)})
    for index, entry in moments.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"the optimiser has no parameter {index!r:.80}")
        _check_moments(f"parameter {index}", entry, parameters[index])
    return {"state": moments, "param_groups": merged}


def _check_group(saved: Any, numbers: list[int]) -> None:
    """Check the settings of a group of parameters, which have these numbers in the optimiser."""
    if not isinstance(saved, dict) or not {"params", *SETTINGS} <= set(saved):
        raise ValueError("the settings of the optimiser are incomplete")
    if saved["params"] != numbers:
        raise ValueError(f"the optimiser has {len(numbers)} parameters, others were saved")
    betas = saved["betas"]
    if not isinstance(betas, tuple) or len(betas) != 2 or not all(map(_is_number, betas)):
        raise ValueError(f"the optimiser's betas are {betas!r:.80}")
    if max(betas) >= 1:
        raise ValueError(f"the optimiser's betas are {betas!r:.80}")
    for name in ("eps", "weight_decay"):
        if not _is_number(saved[name]):
            raise ValueError(f"the optimiser's {name} is {saved[name]!r:.80}")


def _is_number(value: Any) -> bool:
    """Say whether value is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


def _check_moments(where: str, entry: Any, parameter: Tensor) -> None:
    """Compare the moments of one parameter with its shape."""
    if not isinstance(entry, dict) or set(entry) != {"step", *MOMENTS}:
        raise ValueError(f"{where}: step and the moments {' and '.join(MOMENTS)} are expected")
    for name, shape in (("step", ()), *((name, parameter.shape) for name in MOMENTS)):
        value = entry[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{where}: {name} is no tensor of floating-point numbers")
        if value.shape != shape:
            found = tuple(value.shape)
            raise ValueError(f"{where}: {name} has shape {found}, expected {tuple(shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{where}: {name} is not finite")
        if not value.is_contiguous():  # an expanded number: Adam could not write to it
            raise ValueError(f"{where}: {name} has other strides than its parameter")
    if (entry["exp_avg_sq"] < 0).any() or entry["step"] < 0:
        raise ValueError(f"{where}: a mean of squares is negative")
