"""Read a customer's text from files, folders and globs: plain text as passages, rows through a template."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.data.prepare import passages, read_text
from connito.errors import Invalid, NotFound
from connito.jobs.spec import Source
from connito.v1 import reasons_pb2 as reasons

# What is taken out of a folder. A file that is named, by itself or through a glob, may have any name.
TEXT = {".txt", ".md", ".rst", ".tex", ".html"}
ROWS = {".jsonl", ".ndjson", ".csv", ".tsv"}
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Document:
    """One text and where it comes from: the source's number and `file:line`."""

    text: str
    source: int
    where: str


@dataclass
class Reach:
    """Counts of what was read from one source: files, rows, documents."""

    label: str
    files: int = 0
    rows: int = 0
    empty: int = 0
    characters: int = 0
    documents: list[Document] = field(default_factory=list)


def read_source(source: Source, number: int, root: Path) -> Reach:
    """Return every document of a source, in the order of its files' names. Paths are relative to `root`.

    Raises `NotFound` when no file is there, and `Invalid` naming file and line for what cannot be read: not UTF-8, not
    JSON, a template that asks for a field the row does not have.
    """
    check_template(source)
    reach = Reach(source.label)
    for file in _files(source, root):
        reach.files += 1
        for where, raw in _texts(file, source.text):
            reach.rows += 1
            text = raw.strip()
            if not text:
                reach.empty += 1
                continue
            reach.characters += len(text)
            reach.documents.append(Document(text, number, where))
    return reach


def _files(source: Source, root: Path) -> list[Path]:
    path = root / source.path
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT | ROWS and file.is_file())
        if not found:
            kinds = ", ".join(sorted(TEXT | ROWS))
            raise NotFound(
                f"the folder {path} holds no text: files of other kinds than {kinds} are not read from a folder"
            )
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 - absolute patterns
    if not found:
        what = "nothing matches" if glob.has_magic(str(path)) else "there is no file or folder"
        raise NotFound(f"{what} {path}; paths are relative to the job's file")
    return found


def _texts(file: Path, template: str) -> Iterator[tuple[str, str]]:
    """Yield (`file:line`, text) of every row, or of every passage of a plain text."""
    kind = file.suffix.lower()
    if kind not in ROWS:
        if template:
            raise _bad(f"{file} is plain text and has no fields for a template; drop `text`, or give .jsonl or .csv")
        yield from ((f"{file}#{number}", text) for number, text in enumerate(passages(read_text(file)), start=1))
        return
    for line, row in _json_rows(file) if kind in (".jsonl", ".ndjson") else _csv_rows(file, kind):
        where = f"{file}:{line}"
        yield where, _fill(template, row, where) if template else _plain(row, where)


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise _bad(f"{file}:{number} is not JSON ({error}); every line must be one JSON value") from error


def _csv_rows(file: Path, kind: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(file)), delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            yield reader.line_num, {name: value or "" for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise _bad(f"{file}:{reader.line_num} is not {kind[1:].upper()}: {error}") from error


def _plain(row: Any, where: str) -> str:
    """Return the text of a row without a template: a string, or an object's `text`."""
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        fields = f"; its fields are {', '.join(sorted(row))}" if isinstance(row, dict) else ""
        raise _bad(f'{where} has no `text`{fields}; say what to take, for example `text: "{{title}}\\n{{body}}"`')
    return text


def _fill(template: str, row: Any, where: str) -> str:
    """Return the template with `{field}` and `{field.inner}` replaced; `{{` and `}}` are braces."""
    if not isinstance(row, Mapping):
        raise _bad(f"{where} is {type(row).__name__}, not an object with fields for the template")

    def place(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value: Any = row
        for part in match[1].split("."):
            if not isinstance(value, Mapping) or part not in value:
                known = ", ".join(sorted(map(str, row)))
                raise _bad(f"{where} has no field {match[1]!r} that the template asks for; it has {known}")
            value = value[part]
        return _cell(value)

    return _PLACE.sub(place, template)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def check_template(source: Source) -> None:
    """Raise `Invalid` for a template without a single field: every document would be the same."""
    if source.text and not any(match[1] for match in _PLACE.finditer(source.text)):
        raise _bad(f"the template of {source.label} names no field in braces: every row would give the same text")


def _bad(message: str) -> Invalid:
    return Invalid(message, reason=reasons.REASON_BAD_SPEC)
