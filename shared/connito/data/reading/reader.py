"""The one reader of people's data: rows out of whatever a location names, in bounded memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from connito.data.reading import containers, decode, kinds
from connito.data.reading.arrow_rows import arrow_rows
from connito.data.reading.datasets import about, choose, hidden, suffix_of
from connito.data.reading.json_rows import json_rows
from connito.data.reading.kinds import COMPRESSED, TABLES, TEXT, NotText
from connito.data.reading.passages import passage_rows
from connito.data.reading.places import find, reachable
from connito.data.reading.rows import Account, Place, Row, Wanted, unreadable
from connito.data.reading.table_rows import table_rows
from connito.errors import NotFound

# A path keeps one slash of those in an address.
_ADDRESS = re.compile(r"^([a-z][a-z0-9]+):/(?!/)")
# A file in a file in a file: deeper packing is a mistake, or meant to exhaust whoever unpacks it.
_DEEPEST = 3


@dataclass
class Reading:
    """Rows of a location, once, in the order of its files' names; `account` is complete when they are read.

    Iterating raises `NotFound` when nothing is there, `Retry` when an address cannot be reached, and `Invalid` with
    file, line and remedy for what cannot be read. Files of a folder that are no text are counted and passed over.
    """

    location: str | Path
    root: Path = field(default_factory=Path)
    wanted: Wanted = field(default_factory=Wanted)
    account: Account = field(default_factory=Account)

    def __iter__(self) -> Iterator[Row]:
        unread: list[NotText] = []
        for place in find(_ADDRESS.sub(r"\1://", str(self.location)), self.root, self.wanted, self.account):
            try:
                yield from self._file(place)
            except NotText as error:
                if place.chosen:
                    raise
                unread.append(error)
                self.account.skipped[error.why] += 1
        if unread and not self.account.files:
            raise NotFound(f"{self.location} holds no text: {unread[0]}, and so are all {len(unread)} files of it")

    def shown(self, words: str) -> str:
        """Return words in which files are named as whoever wrote down the location names them: from `root` on."""
        return words.replace(f"{self.root}/", "") if self.root.is_absolute() and self.root != Path("/") else words

    def _file(self, place: Place) -> Iterator[Row]:
        with ExitStack() as stack, reachable(place.name), containers.damage(place.name):
            stream = stack.enter_context(place.open())
            before = _stamp(stream)
            for row in self._stream(stream, place.name, place.chosen, stack):
                self.account.rows += 1
                yield row
            if _stamp(stream) != before:
                raise unreadable(f"{place.name} changed while it was read; run this again when it is complete")

    def _stream(self, stream: BinaryIO, name: str, chosen: bool, stack: ExitStack, depth: int = 0) -> Iterator[Row]:
        head, stream = containers.beginning(stream, kinds.HEAD)
        kind = kinds.container(head, name)
        if depth > _DEEPEST and kind:
            raise unreadable(f"{name} is packed more than {_DEEPEST} times; unpack it first")
        if kind in COMPRESSED.values():
            yield from self._stream(containers.unpacked(stream, kind, name), name, chosen, stack, depth + 1)
        elif kind in ("zip", "tar"):
            yield from self._archive(stream, kind, name, stack, depth)
        elif kind:
            seekable = stream if kind == "arrow stream" else containers.seekable(stream, stack)
            self._count(kind, len(head))
            yield from arrow_rows(seekable, kind, name, self.account)
        else:
            yield from self._text(stream, head, name, chosen)

    def _text(self, stream: BinaryIO, head: bytes, name: str, chosen: bool) -> Iterator[Row]:
        suffix = suffix_of(name)
        form = kinds.form(kinds.text_of(head, name), suffix, name, len(head) < kinds.HEAD)
        if form == "text" and not chosen and suffix not in TEXT:
            raise NotText(name, f"plain text under the name {suffix or 'of no kind'}")
        self._count(form, 0)
        pieces = decode.texts(stream, name, head, self.account)
        if form == "json":
            yield from json_rows(pieces, name, self.account)
        elif form == "table":
            yield from table_rows(pieces, name, self.account, TABLES.get(suffix, ""))
        else:
            yield from passage_rows(pieces, name)

    def _archive(self, stream: BinaryIO, kind: str, name: str, stack: ExitStack, depth: int) -> Iterator[Row]:
        for inner, opened in self._members(stream, kind, name, stack):
            try:
                yield from self._stream(opened, f"{name}/{inner}", False, stack, depth + 1)
            except NotText as error:
                self.account.skipped[error.why] += 1

    def _members(self, stream: BinaryIO, kind: str, name: str, stack: ExitStack) -> Iterator[tuple[str, BinaryIO]]:
        if kind == "zip":
            config, split = self.wanted.config, self.wanted.split
            yield from containers.zip_members(
                stream, name, stack, lambda names, read: choose(names, read, name, self.account, config, split)
            )
            return
        for inner, opened in containers.tar_members(stream):
            if hidden(inner) or about(inner):
                self.account.skipped["hidden or about other files"] += 1
            else:
                yield inner, opened

    def _count(self, form: str, size: int) -> None:
        self.account.files += 1
        self.account.formats[form] += 1
        self.account.bytes += size


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    """Return size and time of change of a local file; nothing for others."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, AttributeError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns
