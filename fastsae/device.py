"""Which device to compute on."""

import torch

from fastsae.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises ConfigError if it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device must be auto, cpu or one that torch can use here, got {name!r}: {reason}") from None
    return device
