"""Reading a customer's text: speed, and peak memory for each byte of it, beside the library datasets in the same run.

Text is generated: documents of about 2,000 characters, words with Zipf frequencies and numbers, a twentieth of them copies.
Each way runs in a process of its own, on files of two sizes. `megabytes_per_second` is of text. Memory is what the process
holds by itself (anonymous pages; a mapped file is not counted), beyond what it held before the first row; `peak_per_byte`
is its growth from the smaller to the larger file over the growth of the text.

rows: read. job: read, de-duplicate, split, decontaminate, tokenise into corpora. datasets: `load_dataset` and `map` with the
same tokenizer, without de-duplication.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.harness import Options, Result, main, note
from bench.peak import peak_of

FORMATS = ("jsonl", "csv", "parquet", "jsonl.gz")


def run(options: Options) -> Result:
    """Measure every way on every format; --quick takes smaller files and two formats."""
    sizes = (2_000_000, 6_000_000) if options.quick else (8_000_000, 24_000_000)
    formats = FORMATS[:1] if options.quick else FORMATS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in formats:
            files = [(size, _write(Path(folder) / f"{size}.{kind}", size)) for size in sizes]
            for way in ("rows", "job", "datasets") if kind == "jsonl" else ("rows",):
                note(f"{way} of {kind}")
                found = [measured(way, file, size) for size, file in files]
                growth = (found[1]["peak_bytes"] - found[0]["peak_bytes"]) / (sizes[1] - sizes[0])
                rows += [
                    {"way": way, "format": kind, "text_bytes": size, **row}
                    for (size, _), row in zip(files, found, strict=True)
                ]
                rows[-1]["peak_per_byte"] = round(growth, 3)
    large = [row for row in rows if "peak_per_byte" in row]
    figures = {
        f"{row['way']}_{row['format']}_{name}": row[name]
        for row in large
        for name in ("peak_per_byte", "megabytes_per_second")
    }
    return Result({"text_bytes": list(sizes)}, rows, figures)


def documents(size: int, seed: int = 0) -> Iterator[str]:
    """Yield documents of `size` characters in all."""
    rng = random.Random(seed)
    words = [f"{rng.choice('bdfgklmnprst')}{rng.choice('aeiou')}{rng.getrandbits(20):x}"[:9] for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    written, last = 0, ""
    while written < size:
        text = last if last and rng.random() < 0.05 else " ".join(rng.choices(words, weights, k=300)) + "."
        written, last = written + len(text), text
        yield text


def _write(path: Path, size: int) -> Path:
    import csv
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        table = pa.table({"text": list(documents(size))})
        pq.write_table(table, path, row_group_size=1000)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in documents(size))])
    else:
        raw = "".join(json.dumps({"text": text}) + "\n" for text in documents(size)).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def measured(way: str, file: Path, size: int) -> dict[str, Any]:
    """Return seconds, speed and peak memory of one way, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    process = context.Process(target=_child, args=(way, str(file), results))
    process.start()
    seconds, peak = results.get()
    process.join()
    return {"seconds": seconds, "megabytes_per_second": round(size / 1e6 / seconds, 2), "peak_bytes": peak}


def _child(way: str, file: str, results: Any) -> None:
    from connito.base.tiny import tokenizer

    encode = tokenizer()
    ways: dict[str, Callable[[Path, Any], None]] = {"rows": _rows, "job": _job, "datasets": _datasets}
    results.put(peak_of(lambda: ways[way](Path(file), encode)))


def _rows(file: Path, _: Any) -> None:
    from connito.data.reading.texts import read_texts

    for _text in read_texts([file]):
        pass


def _job(file: Path, encode: Any) -> None:
    from connito.data.corpus import Corpus
    from connito.jobs.spec import parse_job
    from connito.jobs.texts import sort_texts

    job = parse_job({"domain": "bench", "data": [{"path": str(file)}], "license": "CC0-1.0"})
    texts = sort_texts(job, file.parent)
    for part in (texts.probe, texts.train, texts.holdout):
        Corpus.from_documents(encode(document.text, add_special_tokens=False)["input_ids"] for document in part)


def _datasets(file: Path, encode: Any) -> None:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
        table.map(lambda rows: encode(rows["text"], add_special_tokens=False), batched=True, remove_columns=["text"])


if __name__ == "__main__":
    main("reading", run, doc=__doc__, seeds=1)
