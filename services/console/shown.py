"""One page, before it is text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shown:
    """A template and what goes into it. `live` is False where nothing will change any more."""

    template: str
    title: str
    values: Mapping[str, Any] = field(default_factory=dict)
    live: bool = True
