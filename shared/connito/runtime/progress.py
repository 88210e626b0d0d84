"""Tell whoever waits how far a long piece of work is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is, 0 to 1."""

Notify = Callable[[str], None]
"""Called with one line for whoever waits."""


def silent(*_: object) -> None:
    """Tell nobody."""
