"""The text of a row: what a template makes of its fields, or the fields that hold text where nothing is said."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from connito.data.reading.rows import Account, Row, unreadable

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_STEP = re.compile(r"[^.\[\]]+")
# A field that no row so far has is a mistake in the template; rows after the first ones may lack it.
_FIRST_ROWS = 100
# Fields that hold a row's text, the likeliest first, and sets of fields that make it together.
_ALONE = ("text", "content", "document", "body", "article", "passage", "raw_content", "markdown", "transcript")
_TOGETHER = (
    ("instruction", "input", "output"), ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"),
    ("prompt", "response"), ("question", "answer"), ("title", "abstract"),
)  # fmt: skip
_TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog")


@dataclass
class Template:
    """Text of the rows of one source by a template with `{field}`, `{field.inner}` and `{field.0}`, or without one by the
    fields that the first row has. `{{` and `}}` are braces."""

    text: str
    label: str
    account: Account
    known: set[str] = field(default_factory=set)
    lacking: dict[str, Row] = field(default_factory=dict)
    rows: int = 0
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.text and not any(match[1] for match in _PLACE.finditer(self.text)):
            raise unreadable(
                f"the template of {self.label} names no field in braces: every row would give the same text"
            )

    def fill(self, row: Row) -> str:
        """Return the text of a row, "" where its fields are empty. Raises `Invalid` for a field that no row has or that is
        no text."""
        self.rows += 1
        if not self.text:
            return self._usual(row)
        if row.plain:
            raise unreadable(f"{row.where} is plain text and has no fields for a template; drop `text`, or give rows")
        return _PLACE.sub(lambda match: match[0][0] if match[1] is None else self._field(match[1], row), self.text)

    def check(self) -> None:
        """Raise `Invalid` for a field that no row had."""
        for path, row in self.lacking.items():
            if path not in self.known:
                raise self._missing(path, row)

    def _usual(self, row: Row) -> str:
        if isinstance(row.value, str):
            return row.value
        if not self.fields:
            self.fields = usual_fields(row.value)
            if not self.fields:
                raise self._missing("text", row)
            if self.fields != ("text",):
                self.account.note(f"the text of {self.label} is its {' and '.join(self.fields)}")
        if self.fields[0] in _TURNS:
            return _conversation(row.value.get(self.fields[0]))
        return "\n\n".join(part for name in self.fields if (part := self._field(name, row)))

    def _field(self, path: str, row: Row) -> str:
        value: Any = row.value
        steps = [path] if isinstance(value, Mapping) and path in value else _STEP.findall(path)
        for step in steps:
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

    def _missing(self, path: str, row: Row) -> Exception:
        if isinstance(row.value, str):
            return unreadable(f"{row.where} is text by itself, not an object with fields for the template; drop `text`")
        fields = ", ".join(sorted(map(str, row.value))) or "none"
        if self.text:
            return unreadable(f"{row.where} has no field {path!r} that the template asks for; it has {fields}")
        example = '`text: "{title}\\n{body}"`'
        return unreadable(
            f"{row.where} has no `text`; its fields are {fields}; say what to take, for example {example}"
        )


def usual_fields(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that hold the text of rows like this one; none where it cannot be told."""
    names = {str(name).lower(): str(name) for name in row}
    for name in _ALONE:
        if name in names and _is_text(row[names[name]]):
            return (names[name],)
    for name in _TURNS:
        if name in names and isinstance(row[names[name]], list):
            return (names[name],)
    for together in _TOGETHER:
        if all(name in names and _is_text(row[names[name]]) for name in together):
            return tuple(names[name] for name in together)
    if len(row) == 1 and isinstance(next(iter(row.values())), str):
        return (next(iter(names.values())),)
    return next(((names[name],) for name in _ALONE if name in names), ())


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float)) or (isinstance(value, list) and not value)


def _conversation(turns: Any) -> str:
    """Return what is said in a conversation, a paragraph each turn."""
    said = (
        [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
        if isinstance(turns, list)
        else []
    )
    return "\n\n".join(part for part in said if isinstance(part, str) and part.strip())


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
