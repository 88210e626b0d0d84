from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.corpus import Corpus
from connito.errors import Invalid
from numpy.typing import NDArray

MINERS = ["UA", "UB", "UC"]


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


def test_miners_get_disjoint_text_that_anyone_can_recompute() -> None:
    corpus = numbered()
    batches = {m: corpus.miner_batches("r", 1, m, MINERS, 3, 4, 15) for m in MINERS}
    seen = [set(rows.reshape(-1).tolist()) - {9999999} for rows in batches.values()]
    assert all(rows.shape == (3, 4, 16) for rows in batches.values())
    assert len(set().union(*seen)) == sum(map(len, seen))
    shuffled = corpus.miner_batches("r", 1, "UA", ["UC", "UA", "UB"], 3, 4, 15)
    np.testing.assert_array_equal(batches["UA"], shuffled)
    assert not np.array_equal(batches["UA"], corpus.miner_batches("r", 2, "UA", MINERS, 3, 4, 15))


def test_newcomers_and_crowds_draw_samples_of_their_own() -> None:
    corpus = numbered(4)
    newcomer = corpus.miner_batches("r", 1, "UX", MINERS, 2, 2, 15)
    crowd = [f"U{i}" for i in range(50)]
    squeezed = corpus.miner_batches("r", 1, "U7", crowd, 2, 2, 15)
    rows = {tuple(row) for row in corpus.sequences(15)}
    for batch in (newcomer, squeezed):
        assert {tuple(row) for row in batch.reshape(-1, 16)} <= rows
        assert len({tuple(row) for row in batch.reshape(-1, 16)}) == 4


def test_a_short_slice_is_gone_through_again() -> None:
    corpus = numbered(2)
    batch = corpus.miner_batches("r", 1, "UA", MINERS, 5, 4, 15).reshape(-1, 16)
    counts = np.unique(batch, axis=0, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 2), (0.25, 5), (0.5, 10)])
def test_replay_takes_its_share_evenly(share: float, expected: int) -> None:
    general = numbered(20, first=100_000)
    batch = numbered().miner_batches("r", 1, "UA", MINERS, 5, 4, 15, replay=general, replay_share=share)
    replayed = (batch[:, :, 0] >= 100_000) & (batch[:, :, 0] != 9999999) | (batch[:, :, 1] >= 100_000) & (
        batch[:, :, 1] != 9999999
    )
    assert replayed.sum() == expected
    assert replayed.sum(1).max() - replayed.sum(1).min() <= 1


def test_a_share_of_everything_is_refused() -> None:
    with pytest.raises(Invalid, match="replay share"):
        numbered().miner_batches("r", 1, "UA", MINERS, 1, 1, 15, replay=numbered(), replay_share=1.0)


def test_the_batches_stand() -> None:
    """A change of these values changes what every miner of a running run trains on."""
    batch = numbered().miner_batches("r", 1, "UB", MINERS, 1, 4, 15)
    assert batch[0, :, 3].tolist() == [733, 982, 997, 966]
