"""Memory does not grow with the size of what is read."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from connito.base.tiny import tokenizer
from connito.data import dedup
from connito.data.blocks import head
from connito.data.corpus import Corpus
from connito.data.reading.texts import read_texts
from connito.jobs.spec import parse_job
from connito.jobs.texts import sort_texts

DOCUMENT = 2_000


def texts(count: int) -> list[str]:
    """So many documents of generated words."""
    rng = random.Random(3)
    words = [f"w{rng.getrandbits(18):x}" for _ in range(3_000)]
    return [" ".join(rng.choices(words, k=DOCUMENT // 7)) for _ in range(count)]


def as_csv(path: Path, written: list[str]) -> None:
    """Write a table."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "n"], *([text, 1] for text in written)])


WRITE: dict[str, Callable[[Path, list[str]], object]] = {
    "jsonl": lambda path, written: path.write_text("".join(json.dumps({"text": text}) + "\n" for text in written)),
    "one line of json": lambda path, written: path.write_text(json.dumps([{"text": text} for text in written])),
    "rows in a field": lambda path, written: path.write_text(
        json.dumps({"data": [{"text": text} for text in written]})
    ),
    "csv": as_csv,
    "text": lambda path, written: path.write_text("\n\n".join(written)),
    "text in one line": lambda path, written: path.write_text(" ".join(written)),
    "utf-16": lambda path, written: path.write_text("\n\n".join(written), "utf-16"),
    "gzip": lambda path, written: path.write_bytes(gzip.compress("\n\n".join(written).encode())),
    "parquet": lambda path, written: pq.write_table(pa.table({"text": written}), path, row_group_size=200),
}


def peak(work: Callable[[], Iterable[object]]) -> int:
    """Bytes at most held by Python and numpy while a work's results are passed over."""
    tracemalloc.start()
    for _ in work():
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("kind", WRITE)
def test_rows_are_read_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for path, count in ((small, 800), (large, 3_200)):
        # Under the name of text, since nothing here depends on it but what plain words are.
        WRITE[kind](path.with_suffix(".txt"), texts(count))
    peak(lambda: read_texts([small.with_suffix(".txt")]))  # Imports and tables that stay.

    growth = peak(lambda: read_texts([large.with_suffix(".txt")])) - peak(
        lambda: read_texts([small.with_suffix(".txt")])
    )
    assert growth < 0.05 * (3_200 - 800) * DOCUMENT


@pytest.mark.slow
def test_a_job_is_prepared_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("_KEPT_BYTES", 1 << 14), ("_KEPT_WORDS", 1 << 9), ("_CHUNK", 1 << 11)):
        monkeypatch.setattr(dedup, name, size)
    monkeypatch.setattr("connito.data.spool._BUFFER", 1 << 14)
    encode = tokenizer()

    def prepare(name: str) -> Iterable[object]:
        job = parse_job({"domain": "d", "data": [{"path": name}], "license": "CC0-1.0"})
        parted = sort_texts(job, tmp_path)
        assert len(parted.train) > 50
        for part in (parted.probe, parted.train, parted.holdout):
            yield Corpus.from_documents(encode(document.text, verbose=False)["input_ids"] for document in part)

    monkeypatch.setattr("connito.data.corpus._IN_MEMORY", 1 << 14)
    WRITE["jsonl"](tmp_path / "small.jsonl", texts(200))
    WRITE["jsonl"](tmp_path / "large.jsonl", texts(450))
    peak(lambda: prepare("small.jsonl"))

    growth = peak(lambda: prepare("large.jsonl")) - peak(lambda: prepare("small.jsonl"))
    # Some hundred bytes a document, which here has 2,000.
    assert growth < 0.3 * (450 - 200) * DOCUMENT


def test_the_beginning_of_a_text_is_all_that_is_read_for_it(tmp_path: Path) -> None:
    WRITE["jsonl"](tmp_path / "a.jsonl", texts(400))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("this is not JSON")

    assert head(tokenizer(), [tmp_path / "a.jsonl"], 1024, 128).shape == (8, 128)
