from __future__ import annotations

import random
import time

import numpy as np
import pytest
from connito.data.dedup import contaminated, deduplicate, jaccard, shingles

WORDS = [f"word{i}" for i in range(3000)]


def document(rng: random.Random, words: int = 60) -> list[str]:
    return rng.choices(WORDS, k=words)


def text(words: list[str]) -> str:
    return " ".join(words)


def test_case_spacing_and_punctuation_do_not_make_a_document() -> None:
    found = deduplicate(["The quick, brown fox.", "the quick brown fox", "THE QUICK\nBROWN FOX!", "another one"])
    assert (found.kept, found.exact, found.near) == ([0, 3], 2, 0)


def test_near_duplicates_are_dropped_and_the_first_stays() -> None:
    rng = random.Random(1)
    original = document(rng, 100)
    edited = [*original[:50], "inserted", *original[50:]]
    related = [*original[:40], *document(rng, 60)]
    found = deduplicate([text(original), text(edited), text(related)])
    assert (found.kept, found.exact, found.near) == ([0, 2], 0, 1)


def test_likely_pairs_are_found_and_unlikely_ones_left_alone() -> None:
    """Pairs from 0.5 to 0.95 similar: nearly all above the threshold go, none below it."""
    rng = random.Random(2)
    missed = looked_at = 0
    for _ in range(150):
        original = document(rng, 120)
        cut = rng.randrange(60, 114)
        pair = [text(original), text([*original[:cut], *document(rng, 120 - cut)])]
        similarity = jaccard(*shingles(pair))
        kept = len(deduplicate(pair).kept)
        if similarity < 0.7:
            assert kept == 2
        else:
            looked_at += 1
            missed += kept == 2
    assert looked_at > 20
    assert missed <= 2


def test_order_of_words_matters_and_short_texts_are_compared_whole() -> None:
    assert jaccard(*shingles(["a b c d e f g", "g f e d c b a"])) == 0.0
    assert jaccard(*shingles(["a b", "a b"])) == 1.0
    assert jaccard(*shingles(["a b", "a c"])) == 0.0
    assert jaccard(*shingles(["", "!!"])) == 1.0


def test_training_text_made_of_held_out_text_is_found() -> None:
    rng = random.Random(3)
    held = [document(rng, 300), document(rng, 30)]
    inside = held[0][100:160]  # a passage of a long held-out document: a small Jaccard, wholly contaminated
    around = [*document(rng, 20), *held[1], *document(rng, 2)]
    quoting = [*document(rng, 80), *held[1][:12]]
    fresh = document(rng)
    found = contaminated([text(d) for d in (inside, fresh, around, quoting)], [text(d) for d in held])
    assert found == [0, 2]
    assert contaminated(["anything"], []) == []
    assert contaminated([], ["anything"]) == []


@pytest.mark.slow
def test_twenty_thousand_documents_take_seconds() -> None:
    rng = random.Random(4)
    documents = [text(document(rng, 50)) for _ in range(20_000)]
    documents[10_000:10_500] = documents[:500]
    started = time.process_time()
    found = deduplicate(documents)
    assert time.process_time() - started < 15
    assert (found.exact, found.near, len(found.kept)) == (500, 0, 19_500)


def test_a_very_long_document_is_handled() -> None:
    rng = random.Random(5)
    long = text(document(rng, 200_000))
    assert deduplicate([long, long + " end"]).near == 1
    assert isinstance(next(shingles([long])), np.ndarray)


@pytest.mark.parametrize("threshold", [0.3, 0.99])
def test_the_threshold_decides(threshold: float) -> None:
    rng = random.Random(6)
    original = document(rng, 100)
    pair = [text(original), text([*original[:92], *document(rng, 8)])]
    assert len(deduplicate(pair, threshold).kept) == (1 if threshold < 0.5 else 2)
