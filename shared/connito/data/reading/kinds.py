"""Tell what a file is by its content, and whether a person would call it text."""

from __future__ import annotations

import json
import re

from connito.data.reading import decode
from connito.data.reading.arrow_rows import MAGIC
from connito.data.reading.rows import Account
from connito.data.reading.table_rows import Dialect, sniff
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

HEAD = 1 << 18
JSON = {".jsonl", ".ndjson", ".json"}
TABLES = {".csv": "", ".tsv": "\t", ".tab": "\t", ".psv": "|"}
TEXT = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm"}
_MARKUP = {".md", ".markdown", ".rst", ".tex", ".html", ".htm"}
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
OF_FOLDERS = {*JSON, *TABLES, *TEXT, *COMPRESSED, ".parquet", ".arrow", ".feather", ".orc", ".zip", ".tar", ".tgz", ""}

_CONTAINERS = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}  # fmt: skip
_FOREIGN = {
    b"%PDF": "a PDF: export its text", b"\xd0\xcf\x11\xe0": "an Office document: save it as text or CSV",
    b"SQLite format 3": "a database: export its table as CSV", b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file: export its table as Parquet", b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it", b"\x04\x22\x4d\x18": "compressed with lz4: unpack it",
    b"Obj\x01": "an Avro file: export it as Parquet", b"\x80\x04\x95": "a pickle: write its rows as JSON",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"GIF8": "a picture", b"RIFF": "a sound, film or picture",
    b"\x7fELF": "a program", b"{\\rtf": "an RTF document: save it as plain text",
}  # fmt: skip
_POINTER = b"version https://git-lfs.github.com/spec/"
_ENCODED = re.compile(r"(?<![^\s\"',;])(?:[A-Za-z0-9+/_-]{40,}={0,2})(?![^\s\"',;])")
_PATH = re.compile(
    r"(?:[0-9a-fA-F]{32,128} [ *])?(?:\.{0,2}/)?(?:[^\s/\\]+[/\\])*[^\s/\\]+\.\w{1,8}|[-dl](?:[r-][w-][xsStT-]){3}.*"
)
_NAME = re.compile(r"[^\W\d][\w-]{0,40}")


class NotText(Invalid):
    """A file that a person would not call text, nor data with text in it. `why` is a few words to count under."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} is {why}", reason=reasons.REASON_BAD_SPEC)
        self.why = why


def container(head: bytes, name: str) -> str:
    """Return how bytes are packed or tabled: gzip, zip, tar, parquet …; "" for what may be text. Raises `NotText`."""
    if head.startswith(_POINTER):
        raise Invalid(
            f"{name} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder",
            reason=reasons.REASON_BAD_SPEC,
        )
    for magic, kind in (*_CONTAINERS.items(), *MAGIC.items()):
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "tar"
    if head[:4] == b"\xff\xff\xff\xff" and len(head) > 8 and head[4:8] != b"\0\0\0\0":
        return "arrow stream"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise NotText(name, what)
    return ""


def text_of(head: bytes, name: str) -> str:
    """Return the beginning of a file as text. Raises `NotText` for bytes that are none."""
    mark, size = decode.marked(head)
    encoding = mark or decode.wide(head)
    if not encoding.startswith("utf-") and decode.binary(head):
        raise NotText(name, "binary")
    return decode.Decoder(name, encoding, Account()).decode(head[size:])


def form(text: str, suffix: str, name: str, whole: bool) -> str:
    """Return how text is to be read: `json`, `table` or `text`. `whole`: there is no more of it than this.

    Raises `NotText` for a web page in place of data, encoded bytes and lists of files.
    """
    stripped = text.lstrip()
    if suffix not in TEXT and re.match(r"<!doctype html|<html", stripped, re.IGNORECASE):
        raise NotText(name, "a web page in place of data: does its address need a login?")
    if re.match(r"[\[{]\s*\{?\s*'\w+'\s*:", stripped):
        raise NotText(name, "rows in Python's own notation: write them with json.dumps")
    if suffix in JSON or (stripped.startswith(("{", "[")) and _json_begins(stripped, whole)):
        return "json"
    if suffix in TABLES or (suffix not in _MARKUP and _is_table(text, whole)):
        return "table"
    why = encoded(text) or _listing(stripped)
    if why:
        raise NotText(name, why)
    return "text"


def _json_begins(text: str, whole: bool) -> bool:
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated") or error.pos > len(text) - 16
        return cut and not whole and bool(re.match(r'[\[{]\s*["\[{]', text))
    except (ValueError, RecursionError):
        return True
    scalar = isinstance(value, list) and all(isinstance(inner, (int, float, type(None))) for inner in value)
    rest = text[end:].lstrip(", \t\r\n")
    return not (rest and rest[0] not in '{["') and not (scalar and rest)


def _is_table(text: str, whole: bool) -> bool:
    """Tell whether text without the name of a table is one: every row as wide as a header that looks like one."""
    if text.lower().startswith("sep=") and text[5:6] == "\n":
        return True
    lines = text.split("\n")[:50]
    lines = [line for line in (lines if whole or len(lines) == 50 else lines[:-1]) if line.strip()]
    if len(lines) < 3:
        return False
    dialect, share = sniff([f"{line}\n" for line in lines])
    if share < 1.0 or dialect == Dialect("\x1f"):
        return False
    header = [cell.strip() for cell in lines[0].split(dialect.delimiter)]
    names = all(len(cell) <= 40 for cell in header) if dialect.delimiter == "\t" else all(map(_NAME.fullmatch, header))
    return bool(names) and len(set(header)) == len(header)


def encoded(text: str) -> str:
    """Return what text is that is not written for people, such as base64; "" for text."""
    sample = text[:8192]
    if sample.count(" ") > 0.12 * len(sample):
        return ""  # More spaces than half a page of words has.
    found = [run for run in _ENCODED.findall(sample) if _mixed(run)]
    size = sum(map(len, found))
    return "encoded bytes" if size > 0.5 * len(sample.strip()) and size > 60 else ""


def _mixed(run: str) -> bool:
    """Tell whether a run without spaces mixes its letters and digits as encoded bytes do, unlike words and sequences."""
    digits = sum(character.isdigit() for character in run)
    if not digits:
        return False
    if re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", run):
        return digits < len(run)
    return any(map(str.islower, run)) and any(map(str.isupper, run))


def _listing(text: str) -> str:
    lines = [line.strip() for line in text[:8192].split("\n")][:100]
    lines = [line for line in lines if line]
    return (
        "a list of files" if len(lines) > 2 and sum(map(bool, map(_PATH.fullmatch, lines))) >= 0.9 * len(lines) else ""
    )
