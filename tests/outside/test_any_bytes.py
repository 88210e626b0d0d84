"""Arbitrary bytes under every name: rows, or one sentence, never a traceback."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from connito.errors import ConnitoError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.reading import texts

SUFFIXES = [
    ".txt", ".md", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".gz",
    ".csv.gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".html", "", ".weird",
]  # fmt: skip


def packed(raw: bytes) -> bytes:
    """Bytes in a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inner.jsonl", raw)
    return buffer.getvalue()


PACKERS: list[Callable[[bytes], bytes]] = [
    bytes, gzip.compress, bz2.compress, lzma.compress, packed, zstandard.ZstdCompressor().compress,
]  # fmt: skip
MAGIC = [
    b"", b"PAR1", b"ARROW1\0\0", b"ORC", b"\xff\xff\xff\xff\x10\0\0\0", b"FEA1", b"\x1f\x8b\x08", b"PK\x03\x04", b"BZh9",
    b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"{", b"[", b'{"text": "',
    b"a,b\n", b"sep=;\n", b"version https://git-lfs", b"\0" * 257 + b"ustar",
]  # fmt: skip
BYTES = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(str.encode),
    st.text(alphabet='{}[]",:\\u12eE+-. \n\ttrulfasn\x00;|', max_size=200).map(str.encode),
    st.text(max_size=80).map(lambda text: text.encode("utf-16")),
    st.text(max_size=80).map(lambda text: text.encode("cp1252", "replace")),
)


def check(name: str, raw: bytes, template: str) -> None:
    """Read a file of these bytes; what comes out is text, or the error is a sentence."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        for location in (path, Path(folder)):
            try:
                for text in texts(location, template):
                    assert text.strip()
                    text.encode()
                    assert "\0" not in text
            except ConnitoError as error:
                said.append(str(error))
    assert all(0 < len(sentence) < 1200 and "Traceback" not in sentence for sentence in said)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SUFFIXES), st.sampled_from(PACKERS), st.sampled_from(MAGIC), BYTES, st.sampled_from(["", "{text}"])
)
@example(".jsonl", bytes, b"", b"[" * 100_000, "")
@example(".jsonl", bytes, b"", b'{"a":' * 100_000, "")
@example(".json", bytes, b"", b"9" * 10_000, "")
@example(".json", bytes, b"", b'{"text": ' + b"9" * 10_000 + b"}", "")
@example(".jsonl", bytes, b"", b'{"text": "\\ud800"}\n{"text": NaN}\n{"text": 1e999}', "")
@example(".csv", bytes, b"", b'text\n"' + b"x" * 300_000, "")
@example(".csv", bytes, b"", b"\n\n\n", "")
@example(".tsv", bytes, b"", b"a\tb\n\t\t\t\n", "")
def test_any_bytes_are_rows_or_a_sentence(
    suffix: str, pack: Callable[[bytes], bytes], magic: bytes, raw: bytes, template: str
) -> None:
    check(f"data{suffix}", pack(magic + raw), template)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["text", "messages", "a", ""]), VALUES), max_size=5), st.booleans())
def test_any_json_is_rows_or_a_sentence(values: list[object], pretty: bool) -> None:
    raw = "\n".join(json.dumps(value, indent=1 if pretty else None) for value in values)
    check("data.jsonl", raw.encode(), "")
    check("data.json", json.dumps(values).encode(), "{messages.0.content}")


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_file_that_was_cut_off_is_a_sentence(cut: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a text", "another one"] * 20}), buffer)
    raw = buffer.getvalue()
    check("data.parquet", raw[: len(raw) * cut // 200], "")
    for pack in PACKERS[1:]:
        done = pack(b'{"text": "a text"}\n' * 50)
        check("data.jsonl", done[: len(done) * cut // 200], "")
