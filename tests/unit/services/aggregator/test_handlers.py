from __future__ import annotations

import pytest
from connito.library.scores import benchmark_key
from connito.protocol.rules import quorum_fault
from connito.protocol.scoring.counted_reports import draw, read_reports
from connito.v1 import cycle_pb2, run_pb2
from connito.views.sentences import sentence
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey

from services.aggregator.handlers import Benchmark, Merge, Preload, decide, drop_losses
from tests.support.stage import Stage

RUN = "run-1"


def payloads(facts: RunFacts, loaded: tuple[str, ...] = (RUN,)) -> list[object]:
    return [action.payload for action in decide(facts, loaded).actions]


def test_the_model_is_loaded_as_soon_as_the_targets_are_known(stage: Stage) -> None:
    assert payloads(stage.facts, ()) == [Preload(RUN)]
    assert payloads(stage.facts) == []

    stage.drop("run", 0, "selected")
    assert payloads(stage.facts, ()) == []


def test_a_cycle_is_merged_once_everything_it_rests_on_is_known(ready: Stage) -> None:
    assert payloads(ready.facts) == [Merge(RUN, 1)]


@pytest.mark.parametrize(
    "missing", [("validate", "closed"), ("merge", "opened"), ("submit", "settled"), ("train", "opened")]
)
def test_nothing_is_merged_before(ready: Stage, missing: tuple[str, str]) -> None:
    section, kind = missing
    ready.drop(section, 1, kind)

    assert payloads(ready.facts) == []


def test_a_published_version_is_not_made_again(ready: Stage) -> None:
    ready.put("merge", 1, "version", cycle_pb2.VersionPublished(run=RUN, cycle=1))

    assert payloads(ready.facts) == []


def test_scores_without_a_version_are_finished_after_a_crash(ready: Stage) -> None:
    ready.put("merge", 1, "scored", cycle_pb2.CycleScored(run=RUN, cycle=1))

    assert payloads(ready.facts) == [Merge(RUN, 1)]


def test_what_a_run_names_is_scored_once_it_has_ended_with_an_expert(ready: Stage) -> None:
    ready.facts.require_spec().benchmarks.add(domain="exam")
    ready.put(
        "merge", 1, "version", cycle_pb2.VersionPublished(run=RUN, cycle=1, gate=cycle_pb2.GATE_DECISION_ACCEPTED)
    )
    assert payloads(ready.facts) == []

    ready.put("run", 0, "ended", run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_COMPLETED))
    assert payloads(ready.facts, ()) == [Benchmark(RUN)]

    ready.put("library", 0, "benchmarked", run_pb2.BenchmarksMeasured(run=RUN))
    assert payloads(ready.facts, ()) == []


def test_nothing_is_scored_for_a_record_that_will_not_have_it(ready: Stage) -> None:
    """Once somebody has said that there will be no scores, the record says so; a score that came later would be nowhere."""
    ready.facts.require_spec().benchmarks.add(domain="exam")
    gate = cycle_pb2.GATE_DECISION_ACCEPTED
    ready.put("merge", 1, "version", cycle_pb2.VersionPublished(run=RUN, cycle=1, gate=gate))
    ready.put("run", 0, "ended", run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_COMPLETED))
    late = run_pb2.RunPaused(run=RUN, key="UL", service="library", action=benchmark_key(RUN), detail="late")
    ready.put("run", 0, "paused", late, "UL")

    assert payloads(ready.facts) == []


def test_nothing_is_scored_of_a_run_that_leaves_no_expert(ready: Stage) -> None:
    ready.facts.require_spec().tasks.add(domain="quiz")
    ready.put("run", 0, "ended", run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_COMPLETED))

    assert payloads(ready.facts) == []


def test_an_ended_run_needs_nothing(ready: Stage) -> None:
    ready.put("run", 0, "ended", run_pb2.RunEnded(run=RUN))

    assert payloads(ready.facts, ()) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seed": b"x" * 32}, "another seed"),
        ({"state_digest": "state-1"}, "another state"),
        ({"scores": [cycle_pb2.SubmissionScore(miner="MA", artifact_digest="forged")]}, "not submitted"),
        ({"scores": [cycle_pb2.SubmissionScore(miner="MX", artifact_digest="artifact-0")]}, "not submitted"),
        ({"scores": [cycle_pb2.SubmissionScore(miner="MA", artifact_digest="artifact-0")] * 2}, "twice"),
        (
            {"scores": [cycle_pb2.SubmissionScore(miner="MA", artifact_digest="artifact-0", utility=float("nan"))]},
            "not a finite number",
        ),
        (
            {"scores": [cycle_pb2.SubmissionScore(miner="MA", artifact_digest="artifact-0", utility=-0.1)]},
            "at least 0",
        ),
        (
            {"scores": [cycle_pb2.SubmissionScore(miner="MA", artifact_digest="artifact-0", utility=1.7e308)]},
            "above 1000 nats",
        ),
    ],
)
def test_a_report_on_something_else_does_not_count(
    stage: Stage, changes: dict[str, bytes | list[cycle_pb2.SubmissionScore] | str], why: str
) -> None:
    stage.add("VA", {}, **changes)
    stage.add("VB", {"MA": 0.1})
    stage.close()

    reports = read_reports(stage.facts, 1)

    assert list(reports.counted) == ["VB"]
    assert why in sentence(reports.ignored["VA"].finding)


def test_a_report_behind_the_close_is_late(ready: Stage) -> None:
    ready.add("VC", {"MA": 0.9})

    reports = read_reports(ready.facts, 1)

    assert list(reports.counted) == ["VA", "VB"]
    assert [(who, why.finding.kind) for who, why in reports.ignored.items()] == [
        ("VC", cycle_pb2.FINDING_KIND_REPORT_LATE)
    ]


def test_a_validator_that_was_not_drawn_does_not_count(stage: Stage) -> None:
    stage.add("VX", {"MA": 0.1})
    stage.close()

    (ignored,) = read_reports(stage.facts, 1).ignored.items()
    assert (ignored[0], ignored[1].finding.kind) == ("VX", cycle_pb2.FINDING_KIND_REPORT_NOT_DRAWN)


def even(validator: str) -> float:
    return 1.0


def test_more_than_half_of_the_drawn_stake_must_have_reported(stage: Stage) -> None:
    stage.add("VA", {"MA": 0.1})
    stage.close()
    facts = stage.facts
    reports = read_reports(facts, 1)

    fault = quorum_fault(facts, 1, reports, even)
    assert fault is not None
    assert (fault.kind, fault.weight, fault.total_weight) == (cycle_pb2.FINDING_KIND_QUORUM_MISSED, 1.0, 3.0)
    assert quorum_fault(facts, 1, reports, {"VA": 3.0, "VB": 1.0, "VC": 1.0}.__getitem__) is None


def test_without_a_draw_there_is_no_quorum(ready: Stage) -> None:
    ready.drop("validate", 1, "drawn")
    facts = ready.facts

    fault = quorum_fault(facts, 1, read_reports(facts, 1), even)
    assert fault is not None
    assert fault.kind == cycle_pb2.FINDING_KIND_NOTHING_DRAWN


def test_a_draw_behind_the_close_is_none(stage: Stage) -> None:
    stage.close()
    stage.put("validate", 1, "drawn", cycle_pb2.SeedDrawn(run=RUN, cycle=1, validators=["VA"]))

    assert draw(stage.facts, 1) is None


def test_losses_are_kept_until_the_version_is_out(stage: Stage) -> None:
    """Copies are found by them: an aggregator without them decides otherwise than an auditor."""
    losses = [cycle_pb2.SequenceLoss(domain="medical", before=2.0, after=1.0)]

    def told(*kinds: str) -> int:
        facts = RunFacts(RUN)
        for kind in kinds:
            message: cycle_pb2.ScoreReport | cycle_pb2.VersionPublished
            if kind == "report":
                message = cycle_pb2.ScoreReport(scores=[cycle_pb2.SubmissionScore(miner="MA", losses=losses)])
                key = FactKey("validate", 1, "report", "VA")
            else:
                message, key = cycle_pb2.VersionPublished(), FactKey("merge", 1, "version")
            fact = Fact(RUN, key, message, "UX", "X", 1, 0)
            facts.add(fact)
            drop_losses(facts, fact)
        return len(facts.reports(1)["VA"].message.scores[0].losses)

    assert told("report") == 1
    assert told("report", "version") == 0
    assert told("version", "report") == 0
