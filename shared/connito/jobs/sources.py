"""Documents of a customer's sources: plain text as passages, rows through a template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.data.reading.kinds import encoded
from connito.data.reading.reader import Reading
from connito.data.reading.rows import Account, Row, Wanted, unreadable
from connito.data.spool import Spool
from connito.jobs.spec import Source

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_STEP = re.compile(r"[^.\[\]]+")
# A field that no row so far has is a mistake in the template; rows after the first ones may lack it.
_FIRST_ROWS = 100


@dataclass(frozen=True)
class Document:
    """One text and where it comes from: the source's number and `file:line`."""

    text: str
    source: int
    where: str


def document_spool() -> Spool[Document]:
    """Return an empty spool of documents."""
    return Spool(
        lambda document: json.dumps([*vars(document).values()]).encode(), lambda raw: Document(*json.loads(raw))
    )


@dataclass
class Reach:
    """Account of what was read from one source."""

    label: str
    account: Account
    documents: int = 0
    empty: int = 0
    characters: int = 0


def rows_of(source: Source, root: Path) -> Reading:
    """Return the rows of a source; paths are relative to `root`."""
    return Reading(source.path, root, Wanted(source.config, source.split))


def read_source(source: Source, number: int, reading: Reading, reach: Reach) -> Iterator[Document]:
    """Yield every document of a source, in the order of its files' names, and count in `reach`.

    Raises `NotFound` when no file is there, and `Invalid` naming file and line for what cannot be read and for a
    template that asks for a field the rows do not have.
    """
    template = Template(source, reading.account)
    for row in reading:
        text = template.fill(row).strip()
        if not text:
            reach.empty += 1
        elif why := encoded(text):
            reading.account.dropped[f"rows of {why}"] += 1
        else:
            reach.documents += 1
            reach.characters += len(text)
            yield Document(text, number, row.where)
    template.check()


@dataclass
class Template:
    """The text that a source makes of a row: its template, or the row's `text`."""

    source: Source
    account: Account
    known: set[str] = field(default_factory=set)
    lacking: dict[str, Row] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        if self.source.text and not any(match[1] for match in _PLACE.finditer(self.source.text)):
            label = self.source.label
            raise unreadable(f"the template of {label} names no field in braces: every row would give the same text")

    def fill(self, row: Row) -> str:
        """Return the text of a row. Raises `Invalid` for a field that no row has or that is no text."""
        self.rows += 1
        if not self.source.text:
            return row.value if isinstance(row.value, str) else self._field("text", row)
        if row.plain:
            raise unreadable(f"{row.where} is plain text and has no fields for a template; drop `text`, or give rows")
        return _PLACE.sub(
            lambda match: match[0][0] if match[1] is None else self._field(match[1], row), self.source.text
        )

    def check(self) -> None:
        """Raise `Invalid` for a field that no row had."""
        for path, row in self.lacking.items():
            if path not in self.known:
                raise _missing(path, row, self.source)

    def _field(self, path: str, row: Row) -> str:
        value: Any = row.value
        for step in _STEP.findall(path):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                self.lacking.setdefault(path, row)
                self.account.dropped[f"rows without {path}"] += 1
                if self.rows >= _FIRST_ROWS:
                    self.check()
                return ""
        self.known.add(path)
        return _cell(value, path, row.where)


def _missing(path: str, row: Row, source: Source) -> Exception:
    if isinstance(row.value, str):
        return unreadable(f"{row.where} is text by itself, not an object with fields for the template; drop `text`")
    fields = ", ".join(sorted(map(str, row.value)))
    if source.text:
        return unreadable(f"{row.where} has no field {path!r} that the template asks for; it has {fields}")
    example = '`text: "{title}\\n{body}"`'
    return unreadable(f"{row.where} has no `text`; its fields are {fields}; say what to take, for example {example}")


def _cell(value: Any, path: str, where: str) -> str:
    """Return a value as text: a list of texts line by line. Raises `Invalid` for objects, whose syntax is no text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and not any(isinstance(inner, (dict, list)) for inner in value):
        return "\n".join(_cell(inner, path, where) for inner in value)
    if isinstance(value, (dict, list)):
        inside = ", ".join(f"{{{path}.{step}}}" for step in (list(value)[:3] if isinstance(value, dict) else (0, 1)))
        raise unreadable(f"{where}: the field {path!r} is an object, not text; take what is in it: {inside}")
    return json.dumps(value, default=str).strip('"')
