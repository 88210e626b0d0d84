"""Texts of people's data, where nothing but text is wanted: what selects experts, builds bases and measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from connito.data.reading.kinds import COMPRESSED, JSON, TABLES, TEXT, encoded
from connito.data.reading.reader import Reading
from connito.data.reading.rows import unreadable
from connito.data.reading.template import Template


def texts_of(reading: Reading, template: str = "", label: str = "") -> Iterator[tuple[str, str]]:
    """Yield (where, text) of the rows that hold text; empty ones and encoded bytes are counted. Raises as `Reading`, and
    `Invalid` for a field that is asked for and not there."""
    filled = Template(template, label or str(reading.location), reading.account)
    for row in reading:
        text = filled.fill(row).strip()
        if not text:
            reading.account.empty += 1
        elif why := encoded(text):
            reading.account.dropped[f"rows of {why}"] += 1
        else:
            yield row.where, text
    filled.check()


def read_texts(locations: Iterable[Path | str]) -> Iterator[str]:
    """Yield the texts behind locations, one after the other. Raises `Invalid` for a location without any."""
    for location in locations:
        reading = Reading(location)
        found = 0
        for _, text in texts_of(reading):
            found += 1
            yield text
        if not found:
            raise unreadable(f"{location} holds no text ({reading.account}); remove it or fill it")


def name_of(location: Path | str) -> str:
    """Return a name for the text behind a location: that of the file or folder, without suffixes of format and compression."""
    path = PurePath(location)
    if path.suffix.lower() in COMPRESSED and PurePath(path.stem).suffix.lower() in {*JSON, *TABLES, *TEXT}:
        path = PurePath(path.stem)
    return path.stem
