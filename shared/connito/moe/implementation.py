"""Giving one experts module another implementation through the transformers experts interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Implementation:
    """A module's configuration, with another experts implementation."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._experts_implementation = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def register(name: str, forward: Callable[..., torch.Tensor]) -> None:
    """Make `forward` known under `name`, once."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, forward)
