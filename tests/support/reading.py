"""Read files in tests as the product does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connito.data.reading.reader import Reading
from connito.data.reading.rows import Account, Wanted
from connito.data.reading.texts import texts_of


def rows(location: Path | str, **wanted: str) -> list[Any]:
    """Values of the rows behind a location."""
    return [row.value for row in Reading(location, wanted=Wanted(**wanted))]


def account(location: Path | str, **wanted: str) -> Account:
    """Numbers of a reading."""
    reading = Reading(location, wanted=Wanted(**wanted))
    for _ in reading:
        pass
    return reading.account


def texts(location: Path | str, template: str = "") -> list[str]:
    """Texts behind a location."""
    return [text for _, text in texts_of(Reading(location), template)]


def tree(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files by relative name below a new folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root
