from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.corpus import ENDS, WHOLE, Corpus
from connito.data.tensors import tensor_bytes
from connito.errors import Invalid
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


def test_sequences_pack_documents_with_separators() -> None:
    corpus = Corpus.from_documents([[1, 2], [], [3, 4, 5]], {})
    np.testing.assert_array_equal(corpus.sequences(3, 0), [[1, 2, 0, 0], [3, 4, 5, 0]])
    assert corpus.sequences(3, 0).dtype == np.int32


def test_too_little_text_says_how_much() -> None:
    with pytest.raises(Invalid, match="has 3 tokens"):
        Corpus.from_documents([[1, 2, 3]], {"domain": "law"}).sequences(16, 0)
    with pytest.raises(Invalid, match="separator"):
        Corpus.from_documents([[1, 2, 3]]).sequences(1)


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
    with pytest.raises(Invalid, match="which tokens count"):
        corpus.sequences(2)
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
