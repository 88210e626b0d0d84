"""Rows of JSON in whatever shape programs write it, one value in memory at a time.

One value a line, values one after the other over many lines, an array of rows, an object with the rows in one of its
fields, or columns by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from connito.data.reading.rows import LONGEST, Account, Row, unreadable

# A list of these is a conversation, which is one row.
_TURN = ({"role", "content"}, {"from", "value"})
# Fields that make an object a row by itself, whatever lists it holds.
_OF_A_ROW = {
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "dialog",
    "text",
    "content",
    "prompt",
    "instruction",
}
_SPLITS = {"train", "validation", "valid", "dev", "test", "eval"}
_MEND = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
_BROKEN = re.compile("[\ud800-\udfff\0]")
# Between values, files that were joined also have byte order marks, and sequences of JSON record separators.
_SPACE = re.compile("[ \t\n\r,\ufeff\x1e]*")


def _whole_number(digits: str) -> int | str:
    # Python refuses longer ones, which are identifiers or mistakes and never counted with.
    return int(digits) if len(digits) < 4000 else digits


_STRICT = json.JSONDecoder(parse_constant=lambda name: None)
# Also takes tabs and other control characters inside strings, and numbers of any length.
_LENIENT = json.JSONDecoder(parse_constant=lambda name: None, parse_int=_whole_number, strict=False)


class Scanner:
    """Read JSON values one after the other out of text that comes in pieces. Lines are counted from 1."""

    def __init__(self, pieces: Iterator[str], name: str, account: Account) -> None:
        self.pieces, self.name, self.account = pieces, name, account
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self._counted = 0

    def more(self, least: int = 1) -> bool:
        """Read at least so many characters more; false when there are none."""
        parts, found = [], 0
        while found < least and (piece := next(self.pieces, None)) is not None:
            parts.append(piece)
            found += len(piece)
        if not parts:
            self.ended = True
            return False
        self._count()
        self.text = "".join([self.text[self.at :], *parts])
        self.at = self._counted = 0
        return True

    def _count(self) -> int:
        self.line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self.line

    def peek(self) -> str:
        """Return the next character that is no space, "" at the end. Commas between values are passed over."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def where(self) -> str:
        """Return `file:line` of the next character."""
        return f"{self.name}:{self._count()}"

    def value(self) -> Any:
        """Read one value, with broken code points replaced. Raises `Invalid` naming file and line."""
        decoder = _STRICT
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if decoder is _STRICT and error.msg.startswith("Invalid control") and self.text[error.pos] != "\n":
                    decoder = _LENIENT
                elif not self._cut_off(error) or not self._grow():
                    raise self._broken(error) from error
                continue
            except ValueError:
                decoder = _LENIENT  # A number with thousands of digits.
                continue
            except RecursionError as error:
                raise self._too_deep() from error
            if end == len(self.text) and not self.ended and self.text[end - 1] not in '}]"' and self._grow():
                continue  # The next piece may go on with this number.
            if _MEND.search(self.text, self.at, end):
                try:
                    value = self._mend(value)
                except RecursionError as error:
                    raise self._too_deep() from error
            self.at = end
            return value

    def _too_deep(self) -> Exception:
        return unreadable(f"{self.where()} is nested too deeply to be data; give its text alone")

    def _cut_off(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16

    def _grow(self) -> bool:
        held = len(self.text) - self.at
        if held > LONGEST:
            raise unreadable(
                f"{self.where()} begins a value of over {LONGEST} characters; is a quote or bracket missing?"
            )
        return self.more(held)

    def _broken(self, error: json.JSONDecodeError) -> Exception:
        begin = self._count()
        line = begin + error.doc.count("\n", self.at, error.pos)
        begun = f" in the value that line {begin} begins" if line > begin else ""
        open_end = error.pos > len(self.text) - 2 or error.msg.startswith("Unterminated string")
        end = " (the file ends inside a value: was it cut off?)" if open_end else ""
        return unreadable(f"{self.name}:{line} is not JSON: {error.msg}{begun}{end}; correct the line or take it out")

    def _mend(self, value: Any) -> Any:
        if isinstance(value, str):
            mended, count = _BROKEN.subn(lambda found: "" if found[0] == "\0" else "\ufffd", value)
            if count:
                self.account.dropped["broken characters replaced"] += count
            return mended
        if isinstance(value, list):
            return [self._mend(inner) for inner in value]
        if isinstance(value, dict):
            return {self._mend(key): self._mend(inner) for key, inner in value.items()}
        return value

    def expect(self, character: str) -> None:
        """Pass over one character. Raises `Invalid` for another one."""
        if self.peek() != character:
            raise unreadable(f"{self.where()} is not JSON: {character!r} expected; correct the line or take it out")
        self.at += 1


def json_rows(pieces: Iterator[str], name: str, account: Account) -> Iterator[Row]:
    """Yield the rows of a JSON file. Raises `Invalid` naming file and line for what is not JSON."""
    scanner = Scanner(pieces, name, account)
    first = True
    while kind := scanner.peek():
        if kind == "[":
            yield from _array(scanner)
        elif kind == "{" and first:
            yield from _first_object(scanner)
        else:
            where = scanner.where()
            yield from _row(scanner.value(), where, account)
        first = False


def _row(value: Any, where: str, account: Account) -> Iterator[Row]:
    if isinstance(value, (str, dict)):
        yield Row(value, where)
    elif isinstance(value, list) and _turns(value):
        yield Row({"messages": value}, where)
    else:
        account.dropped["rows without fields"] += 1


def _turns(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(turn, dict) and any(turn.keys() >= keys for keys in _TURN) for turn in value)


def _array(scanner: Scanner) -> Iterator[Row]:
    """Yield the elements of an array, or the array as one row where they are the turns of a conversation."""
    begin = scanner.where()
    scanner.expect("[")
    turns: list[Any] = []
    first = True
    while (kind := scanner.peek()) != "]":
        if not kind:
            raise unreadable(f"{begin} begins an array that does not end (was the file cut off?); get it again")
        where = scanner.where()
        value = scanner.value()
        if (first or turns) and _turns([value]):
            turns.append(value)
        else:
            yield from _row(value, where, scanner.account)
        first = False
    scanner.expect("]")
    if turns:
        yield Row({"messages": turns}, begin)


def _first_object(scanner: Scanner) -> Iterator[Row]:
    """Yield the first object of a file: a row, or what holds all rows, known when no other value follows it."""
    where = scanner.where()
    while not (followed := _followed(scanner)) and len(scanner.text) - scanner.at < 1 << 20 and scanner.more():
        pass
    if followed:
        yield from _row(scanner.value(), where, scanner.account)
    elif scanner.ended:
        value = scanner.value()
        alone = not scanner.peek()
        yield from _contents(value, where, scanner.account) if alone else _row(value, where, scanner.account)
    else:
        yield from _large_object(scanner, where)


def _followed(scanner: Scanner) -> bool:
    """Tell whether the value that begins here is followed by another one in what was read."""
    try:
        end = _LENIENT.raw_decode(scanner.text, scanner.at)[1]
    except (ValueError, RecursionError):
        return False
    return bool(scanner.text[end : end + 1000].strip())


def _contents(value: dict[str, Any], where: str, account: Account) -> Iterator[Row]:
    """Yield the rows in the only value of a file: of its one list of objects, of its columns, or itself."""
    lists = {name: inner for name, inner in value.items() if _holds_rows(name, inner)}
    columns = _columns(value)
    if value.keys() & _OF_A_ROW and not columns:
        yield Row(value, where)
    elif columns:
        account.note(f"the rows are the columns {', '.join(columns)} of {where}")
        for place in range(len(next(iter(columns.values())))):
            yield Row({name: column[place] for name, column in columns.items()}, where)
    elif len(lists) == 1 or lists.keys() & _SPLITS:
        name = next(iter(sorted(lists, key=lambda name: (name != "train", name))))
        account.note(f"the rows are the field {name!r} of {where}")
        yield from (row for inner in lists[name] for row in _row(inner, where, account))
    elif len(lists) > 1:
        raise _several(where, lists)
    elif len(value) > 1 and all(
        isinstance(inner, dict) and inner.keys() & _first(value).keys() for inner in value.values()
    ):
        account.note(f"the rows are what the fields of {where} hold")
        yield from (Row(inner, where) for inner in value.values())
    else:
        yield Row(value, where)


def _first(value: dict[str, Any]) -> dict[str, Any]:
    inner = next(iter(value.values()))
    return inner if isinstance(inner, dict) else {}


def _holds_rows(name: str, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value) and name not in _OF_A_ROW


def _several(where: str, lists: Mapping[str, Any]) -> Exception:
    names = ", ".join(sorted(lists))
    return unreadable(f"{where} holds several lists of rows ({names}); write the one you mean into a file of its own")


def _columns(value: dict[str, Any]) -> dict[str, list[Any]]:
    """Return columns by name of an object that is nothing but lists of one length, numbered cells, or names and rows."""
    if (
        value.keys() == {"columns", "index", "data"}
        and isinstance(value["columns"], list)
        and isinstance(value["data"], list)
    ):
        names = [str(name) for name in value["columns"]]
        if all(isinstance(row, list) and len(row) == len(names) for row in value["data"]):
            return {name: [row[place] for row in value["data"]] for place, name in enumerate(names)}
    found = {
        name: list(column.values()) if isinstance(column, dict) and "0" in column else column
        for name, column in value.items()
    }
    lengths = {len(column) if isinstance(column, list) else -1 for column in found.values()}
    scalar = all(
        not isinstance(cell, (dict, list)) for column in found.values() if isinstance(column, list) for cell in column
    )
    return found if len(lengths) == 1 and lengths.pop() > 1 and scalar else {}


def _large_object(scanner: Scanner, where: str) -> Iterator[Row]:
    """Read an object field by field, so that the rows in its list need not fit into memory together."""
    scanner.expect("{")
    row: dict[str, Any] = {}
    streamed = ""
    while scanner.peek() not in ("}", ""):
        name = scanner.value()
        scanner.expect(":")
        if scanner.peek() == "[" and name not in _OF_A_ROW and not row.keys() & _OF_A_ROW and _objects_follow(scanner):
            if name in _SPLITS - {"train"}:
                for _ in _array(scanner):
                    scanner.account.dropped[f"rows of the split {name}"] += 1
            elif streamed:
                raise _several(where, {streamed: [], name: []})
            else:
                scanner.account.note(f"the rows are the field {name!r} of {where}")
                yield from _array(scanner)
                streamed = name
        else:
            row[name] = scanner.value()
    scanner.expect("}")
    if not streamed:
        yield from _contents(row, where, scanner.account)


def _objects_follow(scanner: Scanner) -> bool:
    while len(scanner.text) - scanner.at < 64 and scanner.more():
        pass
    return bool(re.compile(r"\[\s*\{").match(scanner.text, scanner.at))
