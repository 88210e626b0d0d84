from __future__ import annotations

from itertools import repeat

import numpy as np
import pytest
from connito.data.corpus import ENDS, WHOLE, Corpus
from connito.data.packing import PADDING, ROW, apart, content_of, counted, pack, text_of
from connito.errors import Invalid
from hypothesis import given
from hypothesis import strategies as st


def corpus_of(lengths: list[int], mask: list[list[bool]] | None = None) -> Corpus:
    """Every token is a different number, so that a row shows where it came from."""
    starts = np.cumsum([0, *lengths])
    documents = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
    return Corpus.from_masked(zip(documents, mask or repeat(None), strict=False), {"domain": "d", ENDS: WHOLE})


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 16))
def test_every_token_but_a_documents_first_is_predicted_once_from_its_own_document(
    lengths: list[int], length: int
) -> None:
    corpus = corpus_of(lengths)
    if max(lengths) < 2:
        with pytest.raises(Invalid):
            pack(corpus, length)
        return
    rows = pack(corpus, length)
    before, after = rows[:, :-1], rows[:, 1:]
    predicted = after["token"][after["counts"]]
    assert np.array_equal(before["token"][after["counts"]] + 1, predicted), "from the token right before it"
    firsts = set(corpus.offsets[:-1].tolist())
    assert sorted(predicted.tolist()) == [token for token in range(sum(lengths)) if token not in firsts]
    assert not rows["counts"][:, 0].any()
    assert not rows["counts"][rows["position"] <= 0].any()


def test_a_document_that_fits_is_never_cut_and_the_rows_are_filled() -> None:
    lengths = [3, 9, 2, 4, 8, 5, 6, 10, 7, 3]
    rows = pack(corpus_of(lengths), 9)
    whole = [row["token"][row["position"] != PADDING].tolist() for row in rows]
    documents = [
        list(range(start, start + size)) for start, size in zip(np.cumsum([0, *lengths]), lengths, strict=False)
    ]
    for document in documents:
        assert sum(document == row[i : i + len(document)] for row in whole for i in range(len(row))) == 1
    assert len(rows) == 6, "57 tokens in rows of 10"


def test_positions_begin_anew_and_what_fills_up_is_marked() -> None:
    rows = pack(corpus_of([3, 2]), 6)
    assert rows.dtype == ROW
    assert rows["position"].tolist() == [[0, 1, 2, 0, 1, PADDING, PADDING]]
    assert rows["counts"].tolist() == [[False, True, True, False, True, False, False]]
    assert counted(rows).tolist() == [3]
    assert text_of(rows).sum() == 5


def test_a_mask_goes_along_and_what_teaches_nothing_is_left_out() -> None:
    mask = [[False, False, True, True], [False, False, False], [True, False, False]]
    rows = pack(corpus_of([4, 3, 3], mask), 5)
    assert rows["token"][rows["counts"]].tolist() == [2, 3]
    assert set(rows["token"][text_of(rows)].tolist()) == {0, 1, 2, 3}, "the first token of a document is not predicted"


def test_separators_go_behind_documents_without_ends_of_their_own() -> None:
    corpus = Corpus.from_documents([[1, 2], [], [3]], {"separator": "9"})
    rows = pack(corpus, 6)
    assert rows["token"][0].tolist()[:5] == [1, 2, 9, 3, 9]


def test_a_long_document_is_read_in_pieces_that_share_a_token() -> None:
    rows = pack(corpus_of([12]), 5)
    assert [row["token"][row["position"] != PADDING].tolist() for row in rows] == [
        [0, 1, 2, 3, 4, 5],
        [5, 6, 7, 8, 9, 10],
        [10, 11],
    ]
    assert counted(rows).sum() == 11


def test_rows_apart_hold_one_document_each_and_say_where_it_was() -> None:
    rows = pack(corpus_of([3, 2, 5, 4]), 6)
    alone, owner = apart(rows)
    assert len(alone) == 4
    for document, row in zip(alone, owner, strict=True):
        inside = document["position"] != PADDING
        assert document["position"][inside].tolist() == list(range(inside.sum()))
        assert set(document["token"][inside]) <= set(rows[row]["token"])
    assert np.bincount(owner, counted(alone)).tolist() == counted(rows).tolist()


def test_packing_is_the_same_everywhere() -> None:
    """A change of these bytes changes what runs of protocol version 2 draw and report."""
    import hashlib

    corpus = corpus_of([(7 * i) % 23 for i in range(50)], [[j % 3 > 0 for j in range((7 * i) % 23)] for i in range(50)])
    assert hashlib.sha256(content_of(pack(corpus, 15))).hexdigest()[:16] == "b74e00fac3acd489"
