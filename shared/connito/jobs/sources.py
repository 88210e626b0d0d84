"""Documents of a customer's sources: plain text as passages, rows through a template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from connito.data.reading.reader import Reading
from connito.data.reading.rows import Account, Wanted
from connito.data.reading.template import unframed
from connito.data.reading.texts import documents_of
from connito.data.spool import Spool
from connito.jobs.spec import Source


@dataclass(frozen=True)
class Document:
    """One text and where it comes from: the source's number and `file:line`. `chat`: the conversation that it is, as JSON;
    `template`: what made a text of it."""

    text: str
    source: int
    where: str
    chat: str = ""
    template: str = ""

    @property
    def own(self) -> str:
        """Return what two documents are compared by: the text without the words of its template."""
        return unframed(self.text, self.template)


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
    characters: int = 0


def rows_of(source: Source, root: Path) -> Reading:
    """Return the rows of a source; paths are relative to `root`."""
    return Reading(source.path, root, Wanted(source.config, source.split))


def read_source(source: Source, number: int, reading: Reading, reach: Reach) -> Iterator[Document]:
    """Yield every document of a source, in the order of its files' names, and count in `reach`.

    Raises `NotFound` when no file is there, and `Invalid` naming file and line for what cannot be read and for a
    template that asks for a field the rows do not have.
    """
    for where, text, chat in documents_of(reading, source.text, source.label):
        reach.documents += 1
        reach.characters += len(text)
        template = source.text or "" if chat is None else ""
        yield Document(text, number, reading.shown(where), "" if chat is None else chat.to_json(), template)
