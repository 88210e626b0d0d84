"""What a closed window held: membership by sequence, and late work that rolls over."""

from __future__ import annotations

import random

import pytest
from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.facts import RunFacts
from hypothesis import given
from hypothesis import strategies as st

from services.committer import settlement
from tests.unit.services.committer.ledger import RUN, Ledger
from tests.unit.services.committer.test_judging import commit, reveal, settle, to_submit

MINERS = ("ma", "mb", "mc")


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.miners(*MINERS)
    return ledger


def who(settled: cycle_pb2.WindowSettled) -> list[tuple[str, int]]:
    return [(submission.miner, submission.origin_cycle) for submission in settled.submissions]


def refusals(ledger: Ledger, window: str, cycle: int) -> dict[str, reasons_pb2.Reason.ValueType]:
    """Reasons by id of the refused fact."""
    found = {}
    for id_, fact in ledger.facts.window(window, cycle).refused.items():
        assert isinstance(fact.message, cycle_pb2.Refused)
        assert f"{fact.message.miner}-{fact.message.ingress_sequence}" == id_
        found[id_] = fact.message.reason
    return found


def finish(ledger: Ledger, cycle: int) -> cycle_pb2.WindowSettled:
    ledger.closed("submit", cycle)
    return settle(ledger, "submit", cycle)


def test_commitments_settle_sorted_by_miner(ledger: Ledger) -> None:
    to_submit(ledger, miners=("mc", "ma"))
    settled = ledger.facts.window("commit", 1).settled
    assert settled is not None
    assert list(settled.committed) == ["ma", "mc"]
    assert settled.last_sequence == 2


def test_submissions_settle_in_the_order_of_their_commitments(ledger: Ledger) -> None:
    to_submit(ledger, miners=("mc", "ma", "mb"))
    for miner in ("ma", "mb", "mc"):
        reveal(ledger, ledger.reveal(miner, 1))
    assert who(finish(ledger, 1)) == [("mc", 1), ("ma", 1), ("mb", 1)]


def test_who_never_revealed_is_told_so(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma", "mb", "mc"))
    reveal(ledger, ledger.reveal("ma", 1))
    wrong = ledger.reveal("mc", 1, salt=b"t" * 32)
    reveal(ledger, wrong)
    assert who(finish(ledger, 1)) == [("ma", 1)]
    assert refusals(ledger, "submit", 1) == {
        "mb-0": reasons_pb2.REASON_NOT_REVEALED,
        f"mc-{wrong.sequence}": reasons_pb2.REASON_COMMITMENT_MISMATCH,
    }


def test_a_late_reveal_enters_the_next_cycle_with_its_origin(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma", "mb"))
    reveal(ledger, ledger.reveal("ma", 1))
    assert who(finish(ledger, 1)) == [("ma", 1)]
    late = ledger.reveal("mb", 1)
    reveal(ledger, late)
    to_submit(ledger, 2, miners=("ma",))
    reveal(ledger, ledger.reveal("ma", 2))
    assert who(finish(ledger, 2)) == [("mb", 1), ("ma", 2)]
    accepted = ledger.facts.reveal(2, "mb")
    assert accepted is not None
    assert accepted.submission.reveal_sequence == late.sequence
    to_submit(ledger, 3, miners=("ma",))
    assert who(finish(ledger, 3)) == [], "it is scored once"


def test_newer_work_in_time_replaces_what_rolls_over(ledger: Ledger) -> None:
    to_submit(ledger, miners=("mb",))
    finish(ledger, 1)
    reveal(ledger, ledger.reveal("mb", 1))
    to_submit(ledger, 2, miners=("mb",))
    reveal(ledger, ledger.reveal("mb", 2))
    assert who(finish(ledger, 2)) == [("mb", 2)]


def test_of_two_late_reveals_the_newer_work_counts(ledger: Ledger) -> None:
    to_submit(ledger, miners=("mb",))
    finish(ledger, 1)
    to_submit(ledger, 2, miners=("mb",))
    finish(ledger, 2)
    reveal(ledger, ledger.reveal("mb", 2))
    reveal(ledger, ledger.reveal("mb", 1))
    to_submit(ledger, 3, miners=())
    assert who(finish(ledger, 3)) == [("mb", 2)]


def test_a_reveal_accepted_before_its_close_was_known_rolls_over_too(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma",))
    said = ledger.reveal("ma", 1)
    reveal(ledger, said)
    closed = cycle_pb2.WindowClosed(run=RUN, cycle=1, stream="INGRESS", last_sequence=said.sequence - 1)
    ledger.publish("submit", 1, "closed", closed)
    assert who(settle(ledger, "submit", 1)) == []
    assert refusals(ledger, "submit", 1) == {f"ma-{said.sequence}": reasons_pb2.REASON_LATE_REVEAL}
    to_submit(ledger, 2, miners=())
    assert who(finish(ledger, 2)) == [("ma", 1)]


def test_windows_fall_due_once_and_not_after_the_end(ledger: Ledger) -> None:
    assert list(settlement.due(ledger.facts)) == []
    ledger.opened("train", 1)
    ledger.opened("commit", 1)
    commit(ledger, ledger.commitment("ma", 1))
    ledger.closed("commit", 1)
    assert list(settlement.due(ledger.facts)) == [("commit", 1)]
    settle(ledger, "commit", 1)
    assert list(settlement.due(ledger.facts)) == []
    ledger.opened("submit", 1)
    ledger.closed("submit", 1)
    assert list(settlement.due(ledger.facts)) == [("submit", 1)]
    ledger.ended()
    assert list(settlement.due(ledger.facts)) == []


@given(
    revealing=st.lists(st.tuples(st.sampled_from(MINERS), st.integers(1, 3), st.integers(1, 4)), max_size=12),
    seed=st.integers(0, 2**32),
)
def test_every_good_reveal_is_scored_once_at_most_and_replay_settles_the_same(
    revealing: list[tuple[str, int, int]], seed: int
) -> None:
    """`revealing` are (miner, origin cycle, cycle in whose submit window it is said)."""
    ledger = Ledger(cycles=4)
    ledger.miners(*MINERS)
    settled = {}
    for cycle in range(1, 5):
        to_submit(ledger, cycle, miners=MINERS)
        for miner, origin, when in revealing:
            if when == cycle and origin <= cycle:
                reveal(ledger, ledger.reveal(miner, origin))
        settled[cycle] = finish(ledger, cycle)
    works = [(s.miner, s.origin_cycle) for item in settled.values() for s in item.submissions]
    assert len(works) == len(set(works))
    for cycle, item in settled.items():
        miners = [submission.miner for submission in item.submissions]
        assert len(miners) == len(set(miners)), "one submission per miner and cycle"
        assert {(m, o) for m, o, when in revealing if o == when == cycle} <= set(who(item))
        sequences = [submission.commit_sequence for submission in item.submissions]
        assert sequences == sorted(sequences)

    shuffled = list(ledger.facts.facts.values())
    random.Random(seed).shuffle(shuffled)
    rebuilt = RunFacts(RUN)
    for stored in shuffled:
        rebuilt.add(stored)
    for cycle, item in settled.items():
        assert settlement.settle(rebuilt, ledger.reveals, "submit", cycle)[-1].message == item


def test_new_keys_beyond_the_quota_are_told_and_come_first_no_more(ledger: Ledger) -> None:
    spec = ledger.facts.spec
    assert spec is not None
    spec.rewards.newcomers_per_cycle = 1
    to_submit(ledger, miners=("mb", "ma"))
    told = {miner: ledger.reveal(miner, 1) for miner in ("ma", "mb")}
    for said in told.values():
        reveal(ledger, said)
    assert who(finish(ledger, 1)) == [("mb", 1)]
    assert refusals(ledger, "submit", 1) == {f"ma-{told['ma'].sequence}": reasons_pb2.REASON_NEWCOMER_QUOTA}
    to_submit(ledger, 2, miners=("mb", "ma"))
    for miner in ("ma", "mb"):
        reveal(ledger, ledger.reveal(miner, 2))
    assert who(finish(ledger, 2)) == [("mb", 2), ("ma", 2)]


def test_late_work_of_a_new_key_has_no_place_of_its_own(ledger: Ledger) -> None:
    spec = ledger.facts.spec
    assert spec is not None
    spec.rewards.newcomers_per_cycle = 1
    to_submit(ledger, miners=("ma",))
    finish(ledger, 1)
    late = ledger.reveal("ma", 1)
    reveal(ledger, late)
    to_submit(ledger, 2, miners=("mb",))
    reveal(ledger, ledger.reveal("mb", 2))
    # What was committed in the first cycle came before.
    assert who(finish(ledger, 2)) == [("ma", 1)]
    assert reasons_pb2.REASON_NEWCOMER_QUOTA in refusals(ledger, "submit", 2).values()


def test_a_miner_that_joins_in_mid_run_is_scored_in_its_first_cycle(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma",))
    reveal(ledger, ledger.reveal("ma", 1))
    finish(ledger, 1)
    ledger.miners("new")
    to_submit(ledger, 2, miners=("ma", "new"))
    for miner in ("ma", "new"):
        reveal(ledger, ledger.reveal(miner, 2))
    settled = finish(ledger, 2)
    assert who(settled) == [("ma", 2), ("new", 2)]
    # It started from the current version, not from the first one.
    assert settled.submissions[1].base_state == settled.submissions[0].base_state


def test_a_ban_before_the_close_takes_the_submission_out(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma", "mb", "mc"))
    said = ledger.reveal("ma", 1)
    reveal(ledger, said)
    reveal(ledger, ledger.reveal("mb", 1))
    ledger.banned("ma")
    ledger.banned("mc")
    assert who(finish(ledger, 1)) == [("mb", 1)]
    assert refusals(ledger, "submit", 1) == {
        f"ma-{said.sequence}": reasons_pb2.REASON_BANNED,
        "mc-0": reasons_pb2.REASON_BANNED,
    }


def test_a_ban_after_the_close_counts_from_the_next_window_on(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma",))
    reveal(ledger, ledger.reveal("ma", 1))
    ledger.closed("submit", 1)
    ledger.banned("ma")
    assert who(settle(ledger, "submit", 1)) == [("ma", 1)]


def test_a_ban_takes_out_a_commitment_and_a_late_reveal(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma", "mb"))
    finish(ledger, 1)
    reveal(ledger, ledger.reveal("mb", 1))
    ledger.banned("mb")
    to_submit(ledger, 2, miners=("ma",))
    assert who(finish(ledger, 2)) == []


def test_a_ban_that_was_lifted_counts_no_more(ledger: Ledger) -> None:
    to_submit(ledger, miners=("ma",))
    reveal(ledger, ledger.reveal("ma", 1))
    ledger.banned("ma")
    ledger.banned("ma", 2, lifted=True)
    assert who(finish(ledger, 1)) == [("ma", 1)]
