from __future__ import annotations

import numpy as np
import pytest
from connito.data.corpus import Corpus
from connito.data.packing import ROW
from connito.errors import Invalid
from connito.protocol.sequences import batches_of, miner_batches, sequences, share_of
from connito.v1.run_pb2 import RunSpec, TrainPolicy
from hypothesis import given
from hypothesis import strategies as st

from tests.support.run import Run

MINERS = ["UA", "UB", "UC"]


def spec(steps: int = 3, batch: int = 4, length: int = 15, replay: float = 0.0) -> RunSpec:
    policy = TrainPolicy(local_steps=steps, batch_sequences=batch, sequence_length=length, replay_share=replay)
    return RunSpec(run="r", training=policy)


def numbered(count: int, first: int = 0) -> np.ndarray:
    """Rows [count, 2] that say which they are."""
    return np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], 2, axis=1)


def test_documents_are_apart() -> None:
    corpus = Corpus.from_documents([[1, 2], [3, 4, 5]], {"separator": "0"})
    found = sequences(corpus, spec(length=3))
    assert found.dtype == ROW
    assert found["token"].tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]


@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True), min_size=1, max_size=8),
    st.sampled_from(["head", "other"]),
)
def test_nothing_comes_again_before_everything_came_once(
    count: int, needed: int, cycles: list[list[str]], turn: str
) -> None:
    """Whoever comes and goes: over all that was given out, no row is ahead of another by more than one."""
    seen, before = np.zeros(count, int), 0
    for cycle, miners in enumerate(cycles, start=1):
        for miner in miners:
            np.add.at(seen, share_of(count, needed, cycle, miner, miners, before * needed, ("train", "r"), turn), 1)
        before += len(miners)
        assert seen.max() - seen.min() <= 1, (cycle, seen)


def test_one_epoch_of_draws_sees_every_row() -> None:
    taken = [
        share_of(120, 10, cycle, m, MINERS, 30 * (cycle - 1), ("r",), "head") for cycle in (1, 2, 3, 4) for m in MINERS
    ]
    assert sorted(np.concatenate(taken).tolist()) == list(range(120))


def test_miners_are_apart_and_anyone_can_recompute_it() -> None:
    given_out = {m: share_of(100, 20, 2, m, MINERS, 100, ("r",), "head").tolist() for m in MINERS}
    assert len(set().union(*given_out.values())) == 60
    assert share_of(100, 20, 2, "UB", ["UC", "UB", "UA"], 100, ("r",), "head").tolist() == given_out["UB"]
    assert share_of(100, 20, 2, "UB", MINERS, 100, ("other",), "head").tolist() != given_out["UB"]


def test_a_newcomer_draws_a_sample_of_its_own() -> None:
    late = share_of(100, 20, 1, "UX", MINERS, 0, ("r",), "head").tolist()
    assert len(set(late)) == 20
    assert late != share_of(100, 20, 2, "UX", MINERS, 0, ("r",), "head").tolist()


def test_nobody_knows_the_text_of_a_cycle_before_its_head() -> None:
    """Whoever trained from it a cycle earlier, and committed that, had the miner called a copier."""

    def share(head: str, miner: str = "UB") -> list[int]:
        run = Run(name="r").created(spec(4, 8, 1)).selected().miners(*MINERS, "UX")
        run.say("run", 1, "head", checkpoint=head).opened("train", 1, expected=MINERS)
        return miner_batches(run.facts, 1, miner, numbered(200))[..., 0].reshape(-1).tolist()

    shares = [set(share("this", miner)) for miner in MINERS]
    assert len(set.union(*shares)) == 3 * 32, "miners are apart all the same"
    assert set.union(*shares) == {row for miner in MINERS for row in share("other", miner)}, "and read what is next"
    for miner, limit in (("UB", 0.6), ("UX", 0.6)):
        assert len({*share("this", miner)} & {*share("other", miner)}) < limit * 32


def test_what_was_given_out_before_follows_from_the_log() -> None:
    """Two cycles of three and of two miners; a validator is expected in train windows too and takes no text."""
    run = Run(name="r").created(spec(2, 2, 1)).selected().miners("UA", "UB", "UC").validators("UV")
    run.opened("train", 1, expected=["UA", "UB", "UC", "UV"]).opened("train", 2, expected=["UA", "UC", "UV"])
    run.opened("train", 3, expected=["UB", "UV"])
    rows = numbered(40)
    found = [
        miner_batches(run.facts, cycle, miner, rows)[..., 0].reshape(-1)
        for cycle, miners in ((1, MINERS), (2, ["UA", "UC"]), (3, ["UB"]))
        for miner in miners
    ]
    assert len(set(np.concatenate(found).tolist())) == 24
    assert miner_batches(run.facts, 1, "UA", rows).shape == (2, 2, 2)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 2), (0.25, 5), (0.5, 10)])
def test_replay_takes_its_share_evenly(share: float, expected: int) -> None:
    asked = spec(5, 4, 1, replay=share)
    batch = batches_of("r", asked.training, 1, "UA", MINERS, numbered(60), "head", numbered(20, 1000))
    replayed = batch[:, :, 0] >= 1000
    assert replayed.sum() == expected
    assert replayed.sum(1).max() - replayed.sum(1).min() <= 1


def test_replay_goes_through_epochs_too() -> None:
    asked = spec(5, 4, 1, replay=0.5)
    found = [
        batches_of(
            "r", asked.training, cycle, "UA", ["UA"], numbered(60), "head", numbered(20, 1000), (0, 10 * (cycle - 1))
        )[:, :, 0]
        for cycle in (1, 2)
    ]
    general = np.concatenate([batch[batch >= 1000] for batch in found])
    assert sorted(general.tolist()) == list(range(1000, 1020))


def test_a_share_of_everything_is_refused() -> None:
    with pytest.raises(Invalid, match="replay share"):
        batches_of("r", spec(1, 1, 1, replay=1.0).training, 1, "UA", MINERS, numbered(5), "head", numbered(5))


def test_the_order_stands() -> None:
    """A change of these values changes what every miner of a running run trains on."""
    assert share_of(100, 4, 2, "UB", MINERS, 12, ("train", "r"), "head").tolist() == [18, 13, 21, 51]
