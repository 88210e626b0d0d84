"""The result of one check of `connito doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `remedy` is what to do when it is not `ok`; a `warning` does not fail."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    warning: bool = False
