"""What the miner decides, at every point of a cycle at which it may be killed and started again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from connito.service.engine import Decision
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2

from services.trainer.handlers import (
    HEAD_SECONDS,
    Commit,
    Enrol,
    KeepReceipt,
    LogDecision,
    ReportTrained,
    Reveal,
    Train,
    decide,
    describe,
    without_head,
)
from services.trainer.state import CycleProgress, Ledger
from tests.support.run import ME, Run

COMMITMENT = "ab" * 32
TRAINED = CycleProgress(1, ME, base_state="5" * 64, artifact="cd" * 32, size=10, commitment=COMMITMENT)
SAID = replace(TRAINED, said=True)
COMMITTED = replace(SAID, committed=True)


def steps(story: Run, *progress: CycleProgress, me: str = ME) -> list[object]:
    """What is decided, without what is only told."""
    decision = decide(story.facts, me, {item.cycle: item for item in progress})
    return [action.payload for action in decision.actions if not isinstance(action.payload, LogDecision)]


def tells(story: Run, *progress: CycleProgress) -> list[LogDecision]:
    decision = decide(story.facts, ME, {item.cycle: item for item in progress})
    return [action.payload for action in decision.actions if isinstance(action.payload, LogDecision)]


def committed_story(story: Run) -> Run:
    story.opened("train").closed("train").opened("commit").committed(ME, digest=bytes.fromhex(COMMITMENT)).closed(
        "commit"
    )
    return story.settled("commit", committed=[ME])


def test_a_run_that_is_not_known_needs_nothing(story: Run) -> None:
    story.facts.facts.clear()
    assert steps(story) == []


def test_enrols_when_a_stranger_to_the_run(story: Run) -> None:
    assert steps(story, me="UOTHER") == [Enrol()]


def test_waits_between_enrolment_and_the_first_cycle(story: Run) -> None:
    assert steps(story) == []


def test_trains_in_an_open_train_window_and_again_when_killed_before_it_finished(story: Run) -> None:
    story.opened("train")
    assert steps(story) == [Train(1)]
    assert steps(story, CycleProgress(1, ME)) == [Train(1)]


def test_a_cycle_that_is_past_training_is_left_and_the_next_one_taken_up(story: Run) -> None:
    story.opened("train").closed("train").opened("commit")
    assert steps(story) == []
    story.closed("commit").opened("train", 2)
    assert steps(story) == [Train(2)]


def test_says_trained_once(story: Run) -> None:
    story.opened("train")
    assert steps(story, TRAINED) == [ReportTrained(1)]
    assert steps(story, SAID) == []


def test_a_result_that_came_too_late_to_be_announced_is_still_committed(story: Run) -> None:
    story.opened("train").closed("train").opened("commit")
    assert steps(story, TRAINED) == [Commit(1)]


@pytest.mark.parametrize("progress", [TRAINED, SAID])
def test_commits_only_while_the_commit_window_is_open(story: Run, progress: CycleProgress) -> None:
    story.opened("train").closed("train")
    assert steps(story, progress) == []
    story.opened("commit")
    assert steps(story, progress) == [Commit(1)]
    story.closed("commit")
    assert steps(story, progress) == []


def test_a_commitment_that_was_acknowledged_or_answered_is_not_repeated(story: Run) -> None:
    story.opened("train").closed("train").opened("commit")
    assert steps(story, COMMITTED) == []
    assert steps(story.committed(ME, digest=bytes.fromhex(COMMITMENT)), SAID) == []


def test_a_refused_commitment_is_not_repeated(story: Run) -> None:
    story.opened("train").closed("train").opened("commit").refused("commit")
    assert steps(story, SAID) == []


def test_a_refusal_of_someone_else_is_not_mine(story: Run) -> None:
    story.opened("train").closed("train").opened("commit").refused("commit", miner="UMEN")
    assert steps(story, SAID) == [Commit(1)]


def test_reveals_only_when_the_submit_window_is_open_and_the_commitment_stands(story: Run) -> None:
    committed_story(story)
    assert steps(story, COMMITTED) == []
    story.opened("submit")
    assert steps(story, COMMITTED) == [Reveal(1)]


@pytest.mark.parametrize("progress", [SAID, COMMITTED])
def test_reveals_after_a_restart_in_which_the_mark_of_the_commitment_was_lost(
    story: Run, progress: CycleProgress
) -> None:
    assert steps(committed_story(story).opened("submit"), progress) == [Reveal(1)]


def test_does_not_reveal_what_the_committer_did_not_settle_on(story: Run) -> None:
    story.opened("train").closed("train").opened("commit").committed(ME, digest=bytes.fromhex(COMMITMENT)).closed(
        "commit"
    )
    story.opened("submit")
    assert steps(story, COMMITTED) == []
    assert steps(story.settled("commit", committed=["UOTHER"]), COMMITTED) == []


def test_does_not_reveal_another_result_than_the_committed_one(story: Run) -> None:
    """The work folder was lost and the cycle trained again, say: revealing would open nothing."""
    committed_story(story).opened("submit")
    assert steps(story, replace(COMMITTED, commitment="00" * 32)) == []
    assert steps(story) == []


def test_an_answered_or_acknowledged_reveal_is_not_repeated(story: Run) -> None:
    committed_story(story).opened("submit")
    assert steps(story, replace(COMMITTED, revealed=True)) == []
    assert steps(story.submitted(ME), COMMITTED) == []


def test_a_refused_reveal_is_not_repeated(story: Run) -> None:
    committed_story(story).opened("submit").refused("submit")
    assert steps(story, COMMITTED) == []


def test_a_reveal_that_missed_the_window_is_made_late_beside_the_next_cycle(story: Run) -> None:
    committed_story(story).opened("submit").closed("submit").opened("train", 2)
    assert steps(story, COMMITTED) == [Reveal(1), Train(2)]


def test_the_remark_that_nothing_was_revealed_does_not_keep_from_revealing_late(story: Run) -> None:
    committed_story(story).opened("submit").closed("submit")
    story.refused("submit", reason=reasons_pb2.REASON_NOT_REVEALED)
    assert steps(story, COMMITTED) == [Reveal(1)]
    assert steps(story.refused("submit", reason=reasons_pb2.REASON_LATE_REVEAL), COMMITTED) == []


def test_a_rolled_over_reveal_does_not_answer_for_the_cycle_that_scores_it(story: Run) -> None:
    committed_story(story).opened("submit").closed("submit")
    story.opened("train", 2).closed("train", 2).opened("commit", 2).committed(ME, 2, bytes.fromhex("ef" * 32))
    story.closed("commit", 2).settled("commit", 2, committed=[ME]).opened("submit", 2).submitted(ME, 2, origin_cycle=1)
    mine = replace(COMMITTED, cycle=2, commitment="ef" * 32)
    assert steps(story, COMMITTED, mine) == [Reveal(2)]


def test_two_cycles_back_is_past(story: Run) -> None:
    committed_story(story).opened("submit").closed("submit").opened("train", 2).closed("train", 2).opened("train", 3)
    assert steps(story, COMMITTED) == [Train(3)]


def test_nothing_is_done_for_a_run_that_ended(story: Run) -> None:
    story.opened("train").ended()
    assert steps(story) == []


def test_refusals_are_told_once_in_plain_words(story: Run) -> None:
    committed_story(story).opened("submit").refused("submit", reason=reasons_pb2.REASON_LATE_REVEAL)
    told = {tell.name: tell for tell in tells(story, COMMITTED)}
    (name,) = [name for name in told if name.startswith("submit-refused")]
    assert told[name].text == "refused: late-reveal: because"
    assert told[name].reason == "late-reveal"
    assert tells(story, replace(COMMITTED, told=tuple(told))) == []


def test_the_verdict_is_told_even_after_the_end(story: Run) -> None:
    verdict = cycle_pb2.Verdict(
        miner=ME, status=cycle_pb2.VERDICT_STATUS_MERGED, rank=2, reward=300, utility=0.0125, weight=0.4
    )
    story.opened("train").scored(verdict).ended()
    assert [tell.text for tell in tells(story)] == ["merged: rank 2, reward 300, utility 0.0125 nats per token"]


def test_paid_work_that_is_not_merged_is_no_refusal_and_says_why(story: Run) -> None:
    verdict = cycle_pb2.Verdict(
        miner=ME, status=cycle_pb2.VERDICT_STATUS_SCORED, rank=2, reward=300, utility=0.0125,
        reason=reasons_pb2.REASON_OUTLIER, finding=cycle_pb2.Finding(kind=cycle_pb2.FINDING_KIND_OUTLIER),
    )  # fmt: skip
    (told,) = tells(story.opened("train").scored(verdict).ended())
    assert told.reason == ""
    assert told.text == "scored: rank 2, reward 300, utility 0.0125 nats per token; its delta lies far from the others'"


def test_a_rejection_names_its_reason() -> None:
    verdict = cycle_pb2.Verdict(
        status=cycle_pb2.VERDICT_STATUS_REJECTED, reason=reasons_pb2.REASON_COPY, detail="of an earlier one"
    )
    assert describe(verdict) == "rejected: copy: of an earlier one"


def test_keys_are_unique_per_run_cycle_and_step(story: Run) -> None:
    committed_story(story).opened("submit").closed("submit").opened("train", 2)
    keys = [action.key for action in decide(story.facts, ME, {1: COMMITTED}).actions]
    assert "r1/1/reveal" in keys
    assert "r1/2/train" in keys
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("covered", "kept"), [((), (4,)), ((6,), (4,)), ((7,), (4, 7)), ((4, 5, 6, 9), (4, 7))])
def test_a_receipt_is_kept_for_what_it_covers(
    story: Run, tmp_path: Path, covered: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    story.opened("train")
    for number, last in enumerate((2, 3, 4, *covered), 1):
        story.put("run", number, "received", run_pb2.IngressHead(last_sequence=last, checkpoint=f"up to {last}"))
    ledger = Ledger(tmp_path, ME)
    ledger.said("run-1", 1, 4, said=True)
    ledger.said("run-1", 1, 7, committed=True)
    progress = ledger.progress("run-1")
    assert KeepReceipt() in steps(story, *progress.values())
    receipt = story.facts.newest_receipt
    assert receipt is not None
    ledger.keep_receipt("run-1", 1, receipt, kept)
    assert ledger.cycle("run-1", 1).unreceipted == tuple(place for place in (4, 7) if place not in kept)
    assert KeepReceipt() not in steps(story, *ledger.progress("run-1").values())
    ledger.close()


def test_without_anything_said_no_receipt_is_looked_for(story: Run) -> None:
    assert KeepReceipt() not in steps(story, SAID)
    story.put("run", 1, "received", run_pb2.IngressHead(last_sequence=2))
    assert KeepReceipt() not in steps(story, SAID)
    assert KeepReceipt() not in steps(story, replace(SAID, unreceipted=(3,)))


def test_a_miner_that_waits_for_a_missing_head_says_so_once(story: Run) -> None:
    story.opened("train").drop("run", 1, "head")
    assert steps(story) == []
    window = story.facts.window("train", 1).opened_fact
    assert window is not None
    late = window.time_unix_ms + HEAD_SECONDS * 1000
    assert without_head(story.facts, ME, {}, late - 1) == Decision((), late), "it may come yet"
    (action,) = without_head(story.facts, ME, {}, late).actions
    assert isinstance(action.payload, LogDecision)
    assert "the coordinator has not signed yet where cycle 1 begins" in action.payload.text
    told = {1: replace(CycleProgress(1, ME), told=(action.payload.name,))}
    assert without_head(story.facts, ME, told, late) == Decision()
    assert without_head(story.facts, "USTRANGER", {}, late) == Decision()
    story.headed()
    assert without_head(story.facts, ME, {}, late) == Decision()
