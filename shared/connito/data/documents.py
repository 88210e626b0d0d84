"""Read a JSON document that somebody else has made."""

from __future__ import annotations

import json
import unicodedata
from typing import Any


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON document holds. Raises `ValueError` for anything else, one that is nested too deep included.

    The library raises `RecursionError` there, which no caller that expects a bad document looks for.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def is_shown(text: str) -> bool:
    """Return whether text can be shown: it holds no control characters, which a terminal obeys, and no halves of characters."""
    return not any(unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\r\t" for sign in text)
