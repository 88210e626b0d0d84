"""Rows of delimited text: any delimiter, cells of any size, quotes in the ways that programs write them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from connito.data.reading.rows import LONGEST, Account, Row, unreadable

_DELIMITERS = ",;\t|"
# No cell holds it: the delimiter of a table with one column.
_NONE = "\x1f"
_SAMPLE_LINES = 200
_LONGEST_NAME = 64
_NAME = re.compile(r"[^\W\d]\w{0,30}")


@dataclass(frozen=True)
class Dialect:
    """Marks that a table is written with. `escape` is the character in front of a quote inside quotes, "" where it is doubled."""

    delimiter: str
    quoted: bool = True
    escape: str = ""

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Return the rows of the lines as lists of cells."""
        csv.field_size_limit(LONGEST)
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            doublequote=not self.escape,
            escapechar=self.escape or None,
            strict=True,
        )


def lines_of(pieces: Iterable[str]) -> Iterator[str]:
    """Yield lines with their ends out of text in pieces."""
    parts: list[str] = []
    for piece in pieces:
        if "\n" not in piece:
            parts.append(piece)
            continue
        first, *whole = piece.splitlines(keepends=True) if _plain_ends(piece) else _split(piece)
        yield "".join([*parts, first])
        parts = [whole.pop()] if whole and not whole[-1].endswith("\n") else []
        yield from whole
    if parts and (rest := "".join(parts)):
        yield rest


def _plain_ends(piece: str) -> bool:
    return piece.isascii() and not any(mark in piece for mark in "\x0b\x0c\x1c\x1d\x1e")


def _split(piece: str) -> list[str]:
    found = [f"{line}\n" for line in piece.split("\n")]
    found[-1] = found[-1][:-1]
    return [line for line in found if line]


def sniff(lines: Sequence[str], prefer: str = "") -> tuple[Dialect, float]:
    """Return the dialect of a table from its first lines, with the share of rows that are as wide as its header.

    Without a delimiter that the rows agree on, it is one column (share 0).
    """
    best: tuple[float, int, Dialect] = (0.0, 1, Dialect(_NONE))
    for delimiter in dict.fromkeys(prefer + _DELIMITERS):
        for dialect in (Dialect(delimiter), Dialect(delimiter, escape="\\"), Dialect(delimiter, quoted=False)):
            widths = _widths(dialect, lines)
            if not widths:
                continue
            share = sum(width == widths[0] for width in widths) / len(widths)
            if widths[0] > 1 and (share, widths[0]) > best[:2] and (share > 0.5 or _names(dialect, lines)):
                best = share, widths[0], dialect
            break
    if best[2].delimiter == _NONE and _widths(best[2], lines) == []:
        return Dialect(_NONE, quoted=False), 0.0
    return best[2], best[0]


def _names(dialect: Dialect, lines: Sequence[str]) -> bool:
    """Tell whether the first row can be nothing but names of columns."""
    return all(_NAME.fullmatch(cell.strip()) for cell in next(dialect.reader(lines)))


def _widths(dialect: Dialect, lines: Sequence[str]) -> list[int]:
    """Return the cells of each row of a sample, whose last row may be cut off; none where quotes do not match."""
    widths = []
    try:
        for row in dialect.reader(lines):
            if row:
                widths.append(len(row))
    except csv.Error as error:
        if "unexpected end" not in str(error) or not widths:
            return []
    return widths


def table_rows(pieces: Iterable[str], name: str, account: Account, prefer: str = "") -> Iterator[Row]:
    """Yield the rows of a table under the names in its first line. Raises `Invalid` naming file and line."""
    lines = lines_of(pieces)
    sample: list[str] = []
    size = 0
    for line in lines:
        sample.append(line)
        size += len(line)
        if len(sample) >= _SAMPLE_LINES or size > 1 << 20:
            break
    start, delimiter = 1, prefer
    if sample and sample[0].lower().startswith("sep=") and len(sample[0].strip()) == 5:
        delimiter, start = sample[0][4], 2
        sample = sample[1:]
        dialect = Dialect(delimiter)
    else:
        dialect, _ = sniff(sample, prefer)
    yield from _rows(dialect, _Counted([*sample], lines, start), name, account)


class _Counted:
    """Lines with the number of the last one taken."""

    def __init__(self, sample: list[str], rest: Iterator[str], start: int) -> None:
        self.sample, self.rest, self.line = sample, rest, start - 1

    def __iter__(self) -> Iterator[str]:
        for line in self.sample:
            self.line += 1
            yield line
        self.sample = []
        for line in self.rest:
            self.line += 1
            yield line


def _rows(dialect: Dialect, lines: _Counted, name: str, account: Account) -> Iterator[Row]:
    header: list[str] = []
    start = 1
    try:
        for cells in dialect.reader(lines):
            start, line = lines.line + 1, start
            if not cells:
                continue
            if not header:
                header = _header(cells, name, line)
                continue
            if len(cells) > len(header):
                account.dropped["rows with more cells than the header"] += 1
                continue
            yield Row(dict(zip(header, [*cells, *[None] * (len(header) - len(cells))], strict=True)), f"{name}:{line}")
    except csv.Error as error:
        raise unreadable(
            f"{name}:{start} is not a row of a table with {dialect.delimiter!r} between cells: {error}; "
            "put quotes around the cell and double those inside it"
        ) from error


def _header(cells: list[str], name: str, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    # Surveys have whole questions as names; the one column of a file without a header would lose its first text.
    alone = len(names) == 1 and (len(names[0]) > _LONGEST_NAME or names[0].endswith((".", "!", "?")))
    if alone or _number(names[0]):
        raise unreadable(
            f"{name}:{line} is no header: {names[0][:40]!r} is not the name of a column; write the columns' names into the "
            "first line, for example `text`"
        )
    twice = sorted({cell for cell in names if cell and names.count(cell) > 1})
    if twice:
        raise unreadable(f"{name}:{line} names the column {twice[0]!r} twice; give each its own name")
    return [cell or f"column {place}" for place, cell in enumerate(names, start=1)]


def _number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return cell.lower() not in ("nan", "inf", "infinity")
