"""The device a run computes on, and the random numbers that torch draws there.

    from logbook import noise_state, restore_noise, usable_device

Not here: the generators that a script owns (it saves and restores each itself).
"""

import torch

from .errors import UserError


def usable_device(name: str, mps: bool = True) -> torch.device:
    """Return the device of this name, "auto" for the best one (mps: Apple's too).

    Raises UserError where it cannot be used.
    """
    if torch.cuda.is_available():
        best = "cuda"
    elif mps and torch.backends.mps.is_available():
        best = "mps"
    else:
        best = "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index:
            # streams, captured graphs and random numbers belong to the current GPU
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({why}); --device auto takes {best}"
        ) from error
    return device


def noise_state(device: torch.device) -> list[torch.Tensor]:
    """Return the state of torch's global generators: the CPU's, then the device's if it differs."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def restore_noise(states: list[torch.Tensor], device: torch.device) -> None:
    """Continue with the random numbers of a checkpoint.

    What another kind of device drew cannot be continued: this device's numbers then start anew.
    """
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
