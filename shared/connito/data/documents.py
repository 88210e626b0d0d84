"""Read a JSON document that somebody else has made."""

from __future__ import annotations

import json
from typing import Any


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON document holds. Raises `ValueError` for anything else, one that is nested too deep included.

    The library raises `RecursionError` there, which no caller that expects a bad document looks for.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
