"""The text of a row: what a template makes of its fields, or the fields that hold text where nothing is said."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from connito.data.reading.rows import Account, Row, unreadable

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_STEP = re.compile(r"[^.\[\]]+")
# A field that no row so far has is a mistake in the template; rows after the first ones may lack it.
_FIRST_ROWS = 100
# Fields that hold a row's text, the likeliest first.
_ALONE = ("text", "content", "document", "body", "article", "passage", "raw_content", "markdown", "transcript")


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
    usual: str = ""

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
        if self.usual not in row.value:
            # Another file of a folder may have other fields.
            self.usual = usual_field(row.value) or self.usual
            if not self.usual:
                raise self._missing("text", row)
            if self.usual != "text":
                self.account.note(f"the text of {self.label} is its {self.usual}")
        return self._field(self.usual, row)

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
        fields = (
            ", ".join(name if len(name) < 60 else f"{name[:60]}…" for name in sorted(map(str, row.value))) or "none"
        )
        if self.text:
            return unreadable(f"{row.where} has no field {path!r} that the template asks for; it has {fields}")
        example = '`text: "{title}\\n{body}"`'
        return unreadable(
            f"{row.where} has no `text`; its fields are {fields}; say what to take, for example {example}"
        )


@cache
def _frame(template: str) -> tuple[str, ...]:
    """Return what a template says by itself, the longest first: words that every row's text has."""
    parts, start = [], 0
    for match in _PLACE.finditer(template):
        if match[1] is not None:
            parts.append(template[start : match.start()])
            start = match.end()
    said = {part.replace("{{", "{").replace("}}", "}") for part in (*parts, template[start:])}
    return tuple(sorted((part for part in said if re.search(r"\w", part)), key=len, reverse=True))


def unframed(text: str, template: str) -> str:
    """Return a row's text without what its template says in every one."""
    for part in _frame(template) if template else ():
        text = text.replace(part, "\n")
    return text


def usual_field(row: Mapping[str, Any]) -> str:
    """Return the field that holds the text of rows like this one; "" where it cannot be told."""
    names = {str(name).lower(): str(name) for name in row}
    known = [names[name] for name in _ALONE if name in names]
    if len(row) == 1 and isinstance(next(iter(row.values())), str):
        known += names.values()
    return next((name for name in known if not isinstance(row[name], (dict, list))), known[0] if known else "")


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
