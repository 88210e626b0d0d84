"""Compressed files and archives."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from connito.errors import Invalid

from tests.support.reading import account, rows, texts, tree

TABLE = [{"text": f"row {i}"} for i in range(2000)]
LINES = "".join(json.dumps(row) + "\n" for row in TABLE).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress,
    ".lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_XZ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
def test_compressed_rows(tmp_path: Path, suffix: str, name: str) -> None:
    (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](LINES))
    (tmp_path / "renamed.txt").write_bytes(PACK[suffix](LINES))

    assert rows(tmp_path / f"{name}{suffix}") == rows(tmp_path / "renamed.txt") == TABLE


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_parts_one_after_the_other(tmp_path: Path, suffix: str) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](LINES[:half]) + PACK[suffix](LINES[half:]))

    assert rows(tmp_path / f"a.jsonl{suffix}") == TABLE


def test_zstandard_with_a_long_window(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    begun = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(begun.compress(LINES) + begun.flush())

    assert rows(tmp_path / "a.jsonl.zst") == TABLE


def test_a_compressed_table_of_arrow_and_text(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), buffer)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(buffer.getvalue()))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text;n\n" + b"x;1\n"))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("größer".encode("utf-16")))

    assert rows(tmp_path / "a.parquet.gz") == [{"text": "a"}, {"text": "b"}]
    assert rows(tmp_path / "a.csv.gz") == [{"text": "x", "n": "1"}]
    assert texts(tmp_path / "a.txt.xz") == ["größer"]


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    """An archive of these files."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, raw in files.items():
                packed.writestr(name, raw)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tgz" else "w") as tar:
        for name, raw in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_archives_of_many_files(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["of parquet"]}), buffer)
    files = {
        "d/a.jsonl": b'{"text": "of json"}', "d/b.csv": b"text,n\nof csv,1\n", "d/c.txt": b"of text",
        "__MACOSX/d/._a.jsonl": b"\0\5",
        "d/picture.png": b"\x89PNG\0", "README.md": b"# about", "d/e.jsonl.gz": gzip.compress(b'{"text": "of gzip"}'),
        "d/f.parquet": buffer.getvalue(),
    }  # fmt: skip
    (tmp_path / f"a.{kind}").write_bytes(archive(kind, files))

    assert texts(tmp_path / f"a.{kind}") == ["of json", "of csv", "of text", "of gzip", "of parquet"]
    skipped = account(tmp_path / f"a.{kind}").skipped
    if kind == "zip":
        assert skipped == {"hidden or of the system": 1, "about the files beside it": 1, ".png files": 1}
    else:
        assert skipped == {"hidden or about other files": 2, "a picture": 1}


def test_the_splits_of_an_archive(tmp_path: Path) -> None:
    files = {"test.csv": b"text,n\nheld,1\n", "train.csv": b"text,n\nkept,1\n"}
    (tmp_path / "a.zip").write_bytes(archive("zip", files))

    assert texts(tmp_path / "a.zip") == ["kept"]
    assert rows(tmp_path / "a.zip", split="test") == [{"text": "held", "n": "1"}]


def test_documents_that_are_zip_inside(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(
        archive("zip", {"[Content_Types].xml": b"<x/>", "word/document.xml": b"<w>words</w>"})
    )
    (tmp_path / "b.epub").write_bytes(archive("zip", {"mimetype": b"application/epub+zip", "a.html": b"<p>words</p>"}))
    (tmp_path / "c.txt").write_bytes(archive("zip", {"archive/data.pkl": b"\x80\x02", "archive/data/0": b"\0"}))

    for name, what in (("a.docx", "Office document"), ("b.epub", "Office document or book"), ("c.txt", "PyTorch")):
        with pytest.raises(Invalid, match=what):
            texts(tmp_path / name)


def test_archives_that_cannot_be_opened(tmp_path: Path) -> None:
    raw = bytearray(archive("zip", {"a.jsonl": LINES}))
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(bytes(raw))
    deep = LINES[:1000]
    for _ in range(6):
        deep = gzip.compress(deep)
    (tmp_path / "deep.gz").write_bytes(deep)

    with pytest.raises(Invalid, match="is encrypted"):
        rows(tmp_path / "locked.zip")
    with pytest.raises(Invalid, match="packed more than"):
        rows(tmp_path / "deep.gz")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damage_is_said_and_nothing_is_lost_in_silence(tmp_path: Path, suffix: str) -> None:
    whole = PACK[suffix](LINES * 20)
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(Invalid, match="cut off"):
        rows(tmp_path / f"cut.jsonl{suffix}")


def test_compressed_files_in_a_folder(tmp_path: Path) -> None:
    tree(
        tmp_path / "d",
        {
            "a.jsonl.gz": gzip.compress(b'{"text": "one"}'),
            "b.csv.zst": PACK[".zst"](b"text,n\ntwo,2\n"),
            "README.md": "about",
        },
    )

    assert texts(tmp_path / "d") == ["one", "two"]
