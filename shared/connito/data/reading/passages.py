"""Passages of plain text, out of pieces of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from connito.data.reading.rows import Row

CHARACTERS = 2_000


def passages(pieces: Iterable[str]) -> Iterator[str]:
    """Yield paragraphs joined until a passage has enough of them; a paragraph that is too long by itself is cut."""
    current = ""
    for paragraph in _paragraphs(pieces):
        piece = paragraph.strip("\n")
        if current and len(current) + len(piece) > CHARACTERS:
            if current.strip():
                yield current
            current = ""
        current = f"{current}\n\n{piece}" if current else piece
    if current.strip():
        yield current


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    """Yield what is between blank lines, in parts of at most two passages."""
    held, at = "", 0
    for piece in pieces:
        held, at = held[at:] + piece.replace("\r\n", "\n"), 0
        while True:
            end = held.find("\n\n", at, at + 2 * CHARACTERS + 2)
            if end >= 0 and end - at <= 2 * CHARACTERS:
                yield held[at:end]
                at = end + 2
            elif len(held) - at > 2 * CHARACTERS + 2:
                yield held[at : at + 2 * CHARACTERS]
                at += 2 * CHARACTERS
            else:
                break
    for start in range(at, len(held), 2 * CHARACTERS):
        yield held[start : start + 2 * CHARACTERS]


def passage_rows(pieces: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the passages of a plain text as rows."""
    for number, text in enumerate(passages(pieces), start=1):
        yield Row(text, f"{name}#{number}", plain=True)
