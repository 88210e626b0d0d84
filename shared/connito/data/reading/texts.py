"""Texts of people's data, where nothing but text is wanted: what selects experts, builds bases and measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from connito.data.conversations import Conversation, conversation_of
from connito.data.reading.kinds import COMPRESSED, JSON, TABLES, TEXT, encoded
from connito.data.reading.reader import Reading
from connito.data.reading.rows import unreadable
from connito.data.reading.template import Template
from connito.errors import Invalid


def documents_of(
    reading: Reading, template: str = "", label: str = ""
) -> Iterator[tuple[str, str, Conversation | None]]:
    """Yield (where, text, conversation) of the rows that hold text; empty ones, encoded bytes and conversations that cannot
    be used are counted. Without a template a row of messages, or of a question and its answer, is a conversation.

    Raises as `Reading`, and `Invalid` for a field that is asked for and not there.
    """
    label = label or str(reading.location)
    filled = Template(template, label, reading.account)
    for row in reading:
        try:
            chat = None if template or isinstance(row.value, str) else conversation_of(row.value)
        except Invalid as error:
            reading.account.dropped[f"rows with {error}"] += 1
            continue
        except RecursionError:
            reading.account.dropped["rows nested too deeply"] += 1
            continue
        text = (filled.fill(row) if chat is None else chat.text).strip()
        if chat is not None:
            reading.account.note(f"rows of {label} are conversations")
        if not text:
            reading.account.empty += 1
        elif why := encoded(text):
            reading.account.dropped[f"rows of {why}"] += 1
        else:
            yield row.where, text, chat
    filled.check()


def texts_of(reading: Reading, template: str = "", label: str = "") -> Iterator[tuple[str, str]]:
    """Yield (where, text) of `documents_of`."""
    for where, text, _ in documents_of(reading, template, label):
        yield where, text


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
