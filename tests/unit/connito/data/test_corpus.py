from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.corpus import ENDS, WHOLE, Corpus, check_vocabulary
from connito.data.packing import pack
from connito.data.tensors import tensor_bytes
from connito.errors import Invalid
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray


def numbered(documents: int = 40, length: int = 33, first: int = 0) -> Corpus:
    """Every token is a different number, so that a sequence shows where it came from."""
    made = [range(first + d * length, first + (d + 1) * length) for d in range(documents)]
    return Corpus.from_documents(made, {"domain": "d", "split": "train", "separator": "9999999"})


def test_an_artifact_is_the_same_bytes_and_comes_back(tmp_path: Path) -> None:
    corpus = numbered()
    path = tmp_path / "c.safetensors"
    corpus.save(path)
    again = Corpus.load(path)
    assert path.read_bytes() == corpus.to_bytes() == again.to_bytes()
    assert again.documents == 40
    assert again.domain == "d"
    np.testing.assert_array_equal(again.document(1), np.arange(33, 66))


def test_without_a_separator_documents_have_no_end() -> None:
    with pytest.raises(Invalid, match="separator"):
        Corpus.from_documents([[1, 2, 3]]).complete()


@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [
        (np.zeros(3, np.int64), np.array([0, 3])),
        (np.zeros(3, np.int32), np.array([0, 2])),
        (np.zeros(3, np.int32), np.array([0, 2, 1, 3])),
        (np.zeros(3, np.int32), np.array([1, 3])),
        (np.zeros(0, np.int32), np.zeros(0, np.int64)),
        (np.array([-1], np.int32), np.array([0, 1])),
        (np.zeros((1, 3), np.int32), np.array([0, 3])),
    ],
)
def test_arrays_that_are_no_corpus_are_refused(tokens: NDArray[Any], offsets: NDArray[np.int64]) -> None:
    with pytest.raises(Invalid, match="not a usable corpus"):
        Corpus(tokens, offsets)


def test_a_mask_comes_back_and_needs_documents_with_their_own_ends() -> None:
    whole = {"domain": "d", "separator": "0", ENDS: WHOLE}
    corpus = Corpus.from_masked([([1, 2, 3], [False, True, True]), ([4, 5], [False, True])], whole)
    again = Corpus.load(corpus.to_bytes())
    assert again.loss is not None
    assert again.loss.tolist() == [False, True, True, False, True]
    assert again.to_bytes() == corpus.to_bytes()
    for metadata, loss in (({}, [True] * 3), (whole, [True] * 2)):
        with pytest.raises(Invalid, match="loss"):
            Corpus.from_masked([([1, 2, 3], loss)], metadata)


def test_a_corpus_without_a_mask_has_the_bytes_that_it_always_had() -> None:
    corpus = Corpus.from_documents([[1, 2], [3]], {"domain": "d", "separator": "0"})
    assert (
        hashlib.sha256(corpus.to_bytes()).hexdigest()
        == "6a3ae39738c70bf80cca19765dfb58200373047c44696ea2fad8a01050f0c2d8"
    )
    with pytest.raises(Invalid, match="holds offsets, other, tokens"):
        Corpus.load(tensor_bytes({"tokens": corpus.tokens, "offsets": corpus.offsets, "other": corpus.tokens}, {}))
    with pytest.raises(Invalid, match="loss must be uint8"):
        Corpus.load(tensor_bytes({"tokens": corpus.tokens, "offsets": corpus.offsets, "loss": corpus.tokens}, {}))


SEPARATORS = [
    "abc", "1e3", str(2**31), str(2**40), "-1", "", "\u0663", "9" * 5000, "0x1", " 1", "1 ", "01", "1_0", "+1", "1.0",
    "\u00b2", "nan", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_separator_that_is_no_token_is_refused(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(Corpus.from_documents([[1, 2, 3]] * 20, {"domain": "d", "separator": separator}).to_bytes())
    for use in (
        lambda corpus: corpus.complete(),
        lambda corpus: corpus.largest,
        lambda corpus: pack(corpus, 4),
    ):
        with pytest.raises(Invalid, match="not a usable corpus"):
            use(Corpus.load(path))


@pytest.mark.parametrize(
    "metadata",
    [{str(i): "" for i in range(65)}, {"x" * 129: ""}, {"domain": "d" * 20_000}],
    ids=["many", "name", "value"],
)
def test_what_a_corpus_says_of_itself_has_bounds(metadata: dict[str, str]) -> None:
    with pytest.raises(Invalid, match="not a usable corpus"):
        Corpus.load(Corpus.from_documents([[1]], metadata).to_bytes())


@pytest.mark.parametrize(
    ("ids", "separator", "largest"), [([[1, 7]], "3", 7), ([[1, 7]], "9", 9), ([], "9", 9), ([[]], None, -1)]
)
def test_the_largest_token_is_found_with_what_is_put_behind(
    ids: list[list[int]], separator: str | None, largest: int
) -> None:
    corpus = Corpus.from_documents(ids, {} if separator is None else {"separator": separator})
    assert corpus.largest == largest
    check_vocabulary(largest, largest + 1, "text")
    if largest >= 0:
        with pytest.raises(Invalid, match=f"token {largest}"):
            check_vocabulary(largest, largest, "text")


TEXT = st.text(max_size=20) | st.sampled_from(SEPARATORS)
NUMBERS = st.lists(st.integers(-(2**33), 2**33), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    NUMBERS, NUMBERS, st.sampled_from([np.int32, np.int64, np.uint8, np.float32]), st.sampled_from([np.int64, np.int32]),
    st.dictionaries(st.sampled_from(["separator", "ends", "domain", "split", ""]) | TEXT, TEXT, max_size=4),
    st.none() | NUMBERS,
)  # fmt: skip
def test_any_corpus_is_read_or_refused(
    tokens: list[int], offsets: list[int], of: Any, at: Any, metadata: dict[str, str], loss: list[int] | None
) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.array(tokens, np.int64).astype(of),
        "offsets": np.array(offsets, np.int64).astype(at),
        **({} if loss is None else {"loss": np.array(loss, np.int64).astype(np.uint8)}),
    }
    with suppress(Invalid):
        corpus = Corpus.load(tensor_bytes(arrays, metadata))
        assert corpus.largest >= -1
        with suppress(Invalid):
            assert pack(corpus, 2).shape[1] == 3
