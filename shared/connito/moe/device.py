"""The device that a model runs on: resolved here, and nowhere else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from connito.errors import Fatal

if TYPE_CHECKING:
    import torch
    from torch import nn


# The variable that names it, for services and commands alike.
DEVICE = "CONNITO_DEVICE"


class NoDevice(Fatal):
    """The device that was asked for is not on this machine."""

    exit_code = 3


def device_of(name: str = "") -> torch.device:
    """Return the device `name`, else the first that CONNITO_DEVICE names, else the first GPU, else the CPU.

    Raises `NoDevice`.
    """
    return devices_of(name)[0]


def devices_of(names: str = "") -> list[torch.device]:
    """Return the devices `names`, separated by commas; without them as `device_of`. Raises `NoDevice`."""
    import torch

    asked = names or os.environ.get(DEVICE, "")
    if asked.strip() in ("", "auto"):
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    return [_checked(name.strip()) for name in asked.split(",")]


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """Put a full model on `device`, in place: its experts in grouped products where those are one kernel, else in the
    family's own loop.
    """
    model.to(device)
    if has_grouped(device):
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    return model


def has_grouped(device: torch.device) -> bool:
    """Return whether grouped products are one kernel there: bfloat16 on a GPU of compute capability 8.0 or more."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _checked(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        raise NoDevice(
            f"there is no device {name!r} here: this machine has the CPU and {count} CUDA device{'s' * (count != 1)}; use cpu, "
            "cuda or cuda:N, or leave --device and CONNITO_DEVICE out"
        ) from error
    return device
