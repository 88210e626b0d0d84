"""From losses to the signed report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from connito.errors import Invalid
from connito.protocol.findings import Refusal
from connito.protocol.scoring.evaluation import Evaluation, Losses, Measurable, Part, Parts, fit, rejected, score
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2

SPEC = run_pb2.RunSpec(
    holdout=run_pb2.CorpusRef(domain="medical"),
    scoring=run_pb2.ScorePolicy(confidence=0.95, retention_margin=0.01, target_sequences=4, general_sequences=2),
)
DRAWN = {"medical": [3, 5, 8, 9], "code": [1, 4]}
SUBMISSION = cycle_pb2.Submission(miner="UME")


def losses(medical: list[float], code: list[float]) -> dict[str, Losses]:
    def of(values: list[float]) -> Losses:
        return Losses(np.array(values), np.full(len(values), 10))

    return {"medical": of(medical), "code": of(code)}


BEFORE = losses([30.0, 32.0, 31.0, 29.0], [20.0, 21.0])


def evaluated(after: dict[str, Losses], *, unchanged: bool = False) -> Evaluation:
    def side(of: dict[str, Losses]) -> Callable[[Parts], Losses]:
        return lambda parts: Losses(
            np.concatenate([of[part.domain].sums[part.begin : part.end] for part in parts]),
            np.concatenate([of[part.domain].tokens[part.begin : part.end] for part in parts]),
        )

    return Evaluation(DRAWN, Measurable(side(BEFORE), side(after), unchanged), "medical")


def test_an_improvement_is_worth_its_effect_in_nats_per_token() -> None:
    after = losses([29.0, 31.1, 29.9, 28.0], [20.0, 21.0])
    got = score(SUBMISSION, evaluated(after), SPEC)
    assert got.utility == pytest.approx(0.1)
    assert got.reason == reasons_pb2.REASON_UNSPECIFIED
    assert got.effect_low > 0
    assert got.general_change == 0


def test_the_receipt_holds_every_drawn_sequence_under_its_number() -> None:
    after = losses([29.0, 31.1, 29.9, 28.0], [20.5, 21.0])
    got = score(SUBMISSION, evaluated(after), SPEC)
    rows = [(loss.domain, loss.sequence, loss.before, loss.after, loss.tokens) for loss in got.losses]
    assert rows[0] == ("medical", 3, 30.0, 29.0, 10)
    assert rows[4] == ("code", 1, 20.0, 20.5, 10)
    assert len(rows) == 6


def test_damage_to_general_text_is_worth_nothing() -> None:
    after = losses([29.0, 31.1, 29.9, 28.0], [25.0, 26.0])
    got = score(SUBMISSION, evaluated(after), SPEC)
    assert (got.utility, got.reason) == (0.0, reasons_pb2.REASON_RETENTION_BROKEN)


def test_the_base_state_itself_is_called_unchanged() -> None:
    got = score(SUBMISSION, evaluated(BEFORE, unchanged=True), SPEC)
    assert (got.utility, got.reason) == (0.0, reasons_pb2.REASON_UNCHANGED)


def test_a_loss_that_is_not_a_number_is_worth_nothing() -> None:
    after = losses([float("nan"), 31.1, 29.9, 28.0], [20.0, 21.0])
    got = score(SUBMISSION, evaluated(after), SPEC)
    assert (got.utility, got.reason) == (0.0, reasons_pb2.REASON_NON_FINITE)


def test_a_race_measures_no_further_than_the_look_that_decides() -> None:
    spec = run_pb2.RunSpec()
    spec.CopyFrom(SPEC)
    spec.scoring.minimum_sequences = 2
    asked: list[Parts] = []
    evaluation = evaluated(losses([31.0, 33.0, 31.0, 29.0], [20.0, 21.0]))
    measurable = evaluation._measurable

    def after(parts: Parts) -> Losses:
        asked.append(parts)
        return measurable.after(parts)

    got = score(SUBMISSION, Evaluation(DRAWN, Measurable(measurable.before, after, unchanged=False), "medical"), spec)
    assert (got.reason, got.evaluated_sequences) == (reasons_pb2.REASON_NO_IMPROVEMENT, 2)
    assert asked == [(Part("medical", 0, 2), Part("code", 0, 2))]


def test_what_cannot_be_measured_carries_its_reason() -> None:
    got = rejected(SUBMISSION, Refusal.of(Invalid("it is gone", reason=reasons_pb2.REASON_ARTIFACT_MISSING)))
    assert (got.utility, got.reason, got.finding.text) == (0.0, reasons_pb2.REASON_ARTIFACT_MISSING, "it is gone")


def test_a_large_report_loses_the_losses_of_the_least_useful_first() -> None:
    def item(miner: str, utility: float) -> cycle_pb2.SubmissionScore:
        rows = [
            cycle_pb2.SequenceLoss(domain="medical", sequence=i, before=1.0, after=2.0, tokens=9) for i in range(50)
        ]
        return cycle_pb2.SubmissionScore(miner=miner, utility=utility, losses=rows)

    report = cycle_pb2.ScoreReport(scores=[item("a", 0.2), item("b", 0.0), item("c", 0.1)])
    whole = report.ByteSize()
    assert fit(report, whole) == 0
    assert fit(report, whole - 1) == 1
    assert [len(score.losses) for score in report.scores] == [50, 0, 50]
    assert fit(report, 200) == 2
    assert report.ByteSize() <= 200
    assert [score.utility for score in report.scores] == [0.2, 0.0, 0.1]
