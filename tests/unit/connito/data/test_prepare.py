from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from connito.data.corpus import Corpus
from connito.data.dedup import contaminated
from connito.data.prepare import Prepared, Split, part_of, prepare_corpora, tokenizer_digest
from connito.errors import Invalid

WORDS = [f"w{i}" for i in range(2000)]
NUMBERS = {word: i for i, word in enumerate(WORDS)}


def documents(count: int = 300, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=40)) for _ in range(count)]


def encode(batch: list[str]) -> list[list[int]]:
    return [[NUMBERS.get(word, 2001) for word in text.split()] for text in batch]


def prepare(texts: list[str], **options: Any) -> Prepared:
    return prepare_corpora("law", texts, encode, tokenizer_digest="d" * 64, separator=5000, **options)


def texts_of(corpus: Corpus) -> set[str]:
    return {" ".join(WORDS[i] for i in corpus.document(d)) for d in range(corpus.documents)}


def test_the_parts_are_disjoint_and_everything_is_accounted_for() -> None:
    texts = documents()
    made = prepare([*texts, "", texts[0], texts[1] + " w1"])
    parts = [texts_of(corpus) for corpus in (made.probe, made.train, made.holdout)]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 300
    assert set(texts) == set().union(*parts)
    assert set(made.train_texts) == parts[1]
    found = made.statistics
    assert (found.documents, found.empty, found.exact_duplicates, found.near_duplicates) == (303, 1, 1, 1)
    assert found.probe_documents + found.train_documents + found.holdout_documents == 300
    assert 0.08 < found.holdout_documents / 300 < 0.22
    assert json.loads(found.to_json())["train_tokens"] == len(made.train.tokens)
    assert made.holdout.metadata == {"domain": "law", "split": "holdout", "tokenizer": "d" * 64, "separator": "5000"}


def test_more_text_never_moves_a_document_to_another_part() -> None:
    texts = documents()
    before, after = prepare(texts), prepare([*documents(200, seed=9), *texts])
    assert texts_of(before.holdout) <= texts_of(after.holdout)
    assert texts_of(before.train) <= texts_of(after.train)


def test_training_text_that_repeats_the_hold_out_is_dropped() -> None:
    texts = documents()
    held = [text for text in texts if part_of(text, Split()) == "holdout"]
    # Held-out passages inside longer, otherwise new documents: not near-duplicates of anything.
    quoting = [f"{' '.join(held[i].split()[:30])} {documents(1, seed=50 + i)[0][:60]}" for i in range(12)]
    made = prepare([*texts, *quoting])
    assert made.statistics.contaminated >= 6
    assert contaminated(made.train_texts, list(texts_of(made.holdout))) == []


def test_preparing_is_repeatable_and_stops_at_the_cap() -> None:
    one, other = prepare(documents(), max_tokens=4000), prepare(documents(), max_tokens=4000)
    assert one.train.to_bytes() == other.train.to_bytes()
    assert one.statistics.unused == 200
    assert sum(len(c.tokens) for c in (one.probe, one.train, one.holdout)) == 4000


def test_too_little_text_says_what_is_there_and_what_is_needed() -> None:
    with pytest.raises(Invalid, match=r"too little text for law: 300 documents .* the probe part, which needs 50000"):
        prepare(documents(), min_tokens=50_000)
    with pytest.raises(Invalid, match="too little text"):
        prepare(["one text"])
    with pytest.raises(Invalid, match="too little text"):
        prepare([])


def test_a_split_must_leave_something_for_everyone() -> None:
    with pytest.raises(Invalid, match="leaves nothing"):
        Split(0.5, 0.5)
    with pytest.raises(Invalid, match="leaves nothing"):
        Split(0.0, 0.5)


def test_a_tokenizer_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    digest = tokenizer_digest([tmp_path / "b", tmp_path / "a"])
    assert digest == tokenizer_digest([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "a").write_text("3")
    assert digest != tokenizer_digest([tmp_path / "a", tmp_path / "b"])
