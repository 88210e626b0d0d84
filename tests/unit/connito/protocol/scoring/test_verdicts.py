from __future__ import annotations

import pytest
from connito.protocol.findings import Refusal
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.verdicts import agree, no_quorum, score_cycle, without
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts

from tests.support.stage import Stage

MERGED = cycle_pb2.VERDICT_STATUS_MERGED
SCORED = cycle_pb2.VERDICT_STATUS_SCORED
REJECTED = cycle_pb2.VERDICT_STATUS_REJECTED
COPY = Refusal(reasons_pb2.REASON_COPY, Finding(kind=cycle_pb2.FINDING_KIND_COPY, copy_of="MA"))


def even(validator: str) -> float:
    return 1.0


def consensus_of(stage: Stage) -> tuple[RunFacts, list[cycle_pb2.Submission], Consensus]:
    facts = stage.facts
    settled = facts.window("submit", 1).require_settled()
    return facts, list(settled.submissions), agree(facts, 1, read_reports(facts, 1), settled.submissions, even)


def test_a_lying_minority_neither_grants_nor_takes(stage: Stage) -> None:
    stage.add("VA", {"MA": 0.2, "MB": 0.1})
    stage.add("VB", {"MA": 0.2, "MB": 0.1})
    stage.add("VC", {"MA": 0.0, "MC": 9.0})
    stage.close()

    _, _, agreed = consensus_of(stage)

    assert agreed.utilities == {"MA": 0.2, "MB": 0.1, "MC": 0.0}
    assert {s.validator: round(s.deviation, 6) for s in agreed.standings} == {"VA": 0.0, "VB": 0.0, "VC": 9.0}


def test_silence_makes_no_minority_a_majority(stage: Stage) -> None:
    stage.add("VA", {"MA": 0.2})
    stage.add("VC", {"MA": 5.0, "MC": 9.0})
    stage.close()

    _, _, agreed = consensus_of(stage)

    assert agreed.utilities == {"MA": 0.2, "MB": 0.0, "MC": 0.0}
    assert {s.validator: s.reported for s in agreed.standings} == {"VA": True, "VB": False, "VC": True}


def test_a_validator_with_a_bad_report_stands_as_silent(stage: Stage) -> None:
    stage.add("VA", {"MA": 0.2})
    stage.add("VB", {"MA": 0.2})
    stage.add("VC", {"MA": 0.2}, seed=b"other")
    stage.close()

    _, _, agreed = consensus_of(stage)

    assert [s.reported for s in agreed.standings] == [True, True, False]


def test_verdicts_tell_everyone_and_conserve_the_emission(ready: Stage) -> None:
    facts, submissions, agreed = consensus_of(ready)

    result = score_cycle(facts, 1, submissions, agreed, {"MB": COPY}, {"MA": 1.0}, {})

    by_miner = {verdict.miner: verdict for verdict in result.verdicts}
    assert (by_miner["MA"].status, by_miner["MA"].rank, by_miner["MA"].weight) == (MERGED, 1, 1.0)
    assert (by_miner["MB"].status, by_miner["MB"].reason) == (REJECTED, reasons_pb2.REASON_COPY)
    assert by_miner["MB"].finding.copy_of == "MA"
    assert by_miner["MC"].status == REJECTED
    assert sum(verdict.reward for verdict in result.verdicts) + result.unallocated == 100


def test_who_scored_but_was_not_merged_learns_why(ready: Stage) -> None:
    facts, submissions, agreed = consensus_of(ready)
    why = {"MB": Refusal(reasons_pb2.REASON_GATE_REJECTED, Finding(domain="code"))}

    result = score_cycle(facts, 1, submissions, agreed, {}, {"MA": 1.0}, why)

    verdict = result.verdicts[1]
    assert (verdict.status, verdict.reason) == (SCORED, reasons_pb2.REASON_GATE_REJECTED)
    assert verdict.finding.domain == "code"
    assert verdict.reward > 0


def test_an_unusable_artifact_scores_nothing_whatever_validators_said(ready: Stage) -> None:
    facts, submissions, agreed = consensus_of(ready)
    agreed = without(agreed, {"MA": Refusal(reasons_pb2.REASON_NON_FINITE, Finding(name="down_proj"))})

    result = score_cycle(facts, 1, submissions, agreed, {}, {"MB": 1.0}, {})

    assert (result.verdicts[0].status, result.verdicts[0].reason) == (REJECTED, reasons_pb2.REASON_NON_FINITE)
    assert result.verdicts[1].rank == 1


@pytest.mark.parametrize("drawn", [True, False])
def test_without_a_quorum_nobody_is_judged_and_nothing_is_paid(ready: Stage, drawn: bool) -> None:
    if not drawn:
        ready.drop("validate", 1, "drawn")
    facts = ready.facts
    submissions = list(facts.window("submit", 1).require_settled().submissions)

    too_few = Finding(kind=cycle_pb2.FINDING_KIND_NOTHING_DRAWN)
    result = score_cycle(facts, 1, submissions, no_quorum(facts, 1, submissions, too_few), {}, {}, {})

    assert [verdict.reason for verdict in result.verdicts] == [reasons_pb2.REASON_NO_QUORUM] * 3
    assert [verdict.finding for verdict in result.verdicts] == [too_few] * 3
    assert result.unallocated == 100
