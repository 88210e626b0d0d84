"""Rows, and the account of where they came from: what was read, converted and left out, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Self

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons


@dataclass(frozen=True, slots=True)
class Row:
    """A row of somebody's data: a text, or fields by name whose values are as nested as they were.

    `where` names file and place: `file:line` of a row, `file#n` of the nth passage of a plain text (`plain`) or the nth
    row of a binary table.
    """

    value: str | Mapping[str, Any]
    where: str
    plain: bool = False


# Characters of one value. Without a limit, one stray quote would read a whole file into memory.
LONGEST = 1 << 28
# Of a folder with many files, the first say enough.
_NOTES = 20


@dataclass
class Account:
    """Numbers of one reading. `skipped` counts files, `dropped` rows and characters, each by reason; `notes` are sentences."""

    files: int = 0
    rows: int = 0
    empty: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Add a sentence, once."""
        if sentence not in self.notes and len(self.notes) < _NOTES:
            self.notes.append(sentence)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, numbers: Mapping[str, Any]) -> Self:
        """Return what `to_json` describes."""
        parts: dict[str, Any] = {name: Counter(v) if isinstance(v, dict) else v for name, v in numbers.items()}
        return cls(**parts)

    def __str__(self) -> str:
        empty = f", {self.empty} of them empty" if self.empty else ""
        parts = [f"{self.rows} row{_s(self.rows)} in {self.files} file{_s(self.files)}{empty}"]
        parts += [f"{count} as {name}" for name, count in sorted(self.formats.items())]
        parts += [f"{count} in {name}" for name, count in sorted(self.encodings.items()) if name != "utf-8"]
        parts += [f"{count} {reason}" for reason, count in sorted(self.dropped.most_common(_NOTES)) if count]
        if self.skipped:
            parts.append(
                "not read: " + ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            )
        return "; ".join([*parts, *self.notes])


@dataclass(frozen=True)
class Place:
    """A file to read: its name as people see it, and how to open it. `chosen`: it was named, not found in a folder."""

    name: str
    open: Callable[[], BinaryIO]
    chosen: bool = False


@dataclass(frozen=True)
class Wanted:
    """A configuration and a split of a published data set; "" for the usual ones."""

    config: str = ""
    split: str = ""


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def unreadable(message: str) -> Invalid:
    """Return the error for data that cannot be used as they are."""
    return Invalid(message, reason=reasons.REASON_BAD_SPEC)
