from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from connito.errors import Invalid
from connito.protocol.scoring.proof_of_loss import RaceResult, race, score_submission
from connito.protocol.scoring.racing import looks
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

TOKENS = 100
POLICY = run_pb2.ScorePolicy(
    target_sequences=32, general_sequences=16, confidence=0.95, retention_margin=0.02, minimum_sequences=8
)
FIXED = run_pb2.ScorePolicy(target_sequences=32, general_sequences=16, confidence=0.95, retention_margin=0.02)


def losses(domain: str, gains: Iterable[float]) -> list[cycle_pb2.SequenceLoss]:
    return [
        cycle_pb2.SequenceLoss(domain=domain, sequence=i, before=300.0, after=300.0 - TOKENS * gain, tokens=TOKENS)
        for i, gain in enumerate(gains)
    ]


def run_race(
    target: Iterable[float], general: Iterable[float] | None = None, policy: run_pb2.ScorePolicy = POLICY
) -> RaceResult:
    """`target` and `general`: gains in nats per token of all drawn sequences, in the order of evaluation."""
    drawn = {"t": losses("t", target), "g": losses("g", np.zeros(16) if general is None else general)}
    return race(lambda look: {"t": drawn["t"][: look.target], "g": drawn["g"][: look.general]}, "t", policy)


def noise(seed: int, mean: float, deviation: float, count: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(mean, deviation, count)


def test_looks_double_up_to_the_budget_and_spend_the_error_between_them() -> None:
    found = looks(POLICY)
    assert [(look.target, look.general, look.last) for look in found] == [(8, 4, False), (16, 8, False), (32, 16, True)]
    assert [1 - look.confidence for look in found] == pytest.approx([0.05 / 16, 0.05 * 3 / 16, 0.05 * 12 / 16])


@given(budget=st.integers(1, 500), size=st.integers(0, 600), general=st.integers(0, 100), alpha=st.floats(0.001, 0.4))
def test_any_schedule_ends_at_the_budget_and_spends_exactly_the_error(
    budget: int, size: int, general: int, alpha: float
) -> None:
    policy = run_pb2.ScorePolicy(
        target_sequences=budget, general_sequences=general, minimum_sequences=size, confidence=1 - alpha
    )
    found = looks(policy)
    assert (found[-1].target, found[-1].general, found[-1].last) == (budget, general, True)
    assert all(one.target < other.target and one.general <= other.general for one, other in pairwise(found))
    assert math.fsum(1 - look.confidence for look in found) == pytest.approx(alpha)
    assert found[0].target == (size if 0 < size < budget else budget)


def test_without_racing_there_is_one_look_as_before() -> None:
    (only,) = looks(FIXED)
    assert (only.target, only.general, only.confidence, only.last) == (32, 16, 0.95, True)


@pytest.mark.parametrize("shape", ["normal", "heavy", "skewed"])
def test_submissions_without_effect_pass_no_more_often_than_stated(shape: str) -> None:
    """One-sided 2.5 % at 95 % confidence. 4000 races: three standard deviations are 0.74 %."""
    rng = np.random.default_rng(7)
    draws = {
        "normal": lambda: rng.normal(0, 0.1, 32),
        "heavy": lambda: 0.1 * rng.standard_t(4, 32),
        "skewed": lambda: 0.1 * (rng.exponential(1.0, 32) - 1.0),
    }
    passed = sum(run_race(draws[shape]()).judgement.utility > 0 for _ in range(4000))
    assert passed / 4000 <= 0.025 + 0.0075


def test_the_interval_at_the_stop_covers_the_effect_as_often_as_stated() -> None:
    covered = 0
    for seed in range(2000):
        raced = run_race(noise(seed, 0.05, 0.1, 32))
        covered += raced.target.low <= 0.05 <= raced.target.high
    assert covered / 2000 >= 0.95 - 0.015


def test_what_is_clear_is_decided_at_the_first_look() -> None:
    clear = {
        "better": run_race(noise(1, 0.05, 0.01, 32)),
        "worse": run_race(noise(1, -0.05, 0.01, 32)),
        "harmful": run_race(noise(1, 0.01, 0.1, 32), noise(2, -0.5, 0.02, 16)),
        "nan": run_race([math.nan] * 32),
        "unchanged": run_race(np.zeros(32)),
    }
    assert {name: raced.target.sequences for name, raced in clear.items()} == dict.fromkeys(clear, 8)
    assert {name: reasons_pb2.Reason.Name(raced.judgement.reason) for name, raced in clear.items()} == {
        "better": "REASON_UNSPECIFIED",
        "worse": "REASON_NO_IMPROVEMENT",
        "harmful": "REASON_RETENTION_BROKEN",
        "nan": "REASON_NON_FINITE",
        "unchanged": "REASON_UNCHANGED",
    }


def test_better_is_not_granted_before_general_text_is_clear_too() -> None:
    """The mean of the general domain is within the margin, its bound is not: only the whole budget decides."""
    general = np.tile([0.2, -0.2], 8)
    raced = run_race(noise(1, 0.05, 0.01, 32), general)
    assert raced.look.last
    assert raced.judgement.utility > 0


def test_nothing_gained_by_half_of_the_budget_is_given_up() -> None:
    gains = [0.2, -0.21] * 16
    raced = run_race(gains)
    assert raced.target.sequences == 16
    assert raced.judgement.reason == reasons_pb2.REASON_NO_IMPROVEMENT


def test_racing_keeps_almost_all_of_the_power() -> None:
    """An effect that a single look at everything finds nine times in ten."""
    rng = np.random.default_rng(5)
    fixed = raced = 0
    for _ in range(1000):
        gains = rng.normal(0.06, 0.1, 32)
        fixed += run_race(gains, policy=FIXED).judgement.utility > 0
        raced += run_race(gains).judgement.utility > 0
    assert fixed > 850
    assert raced >= 0.93 * fixed


def score(part: Any, policy: run_pb2.ScorePolicy = POLICY) -> cycle_pb2.SubmissionScore:
    return score_submission("M", "d", part, "t", policy)


def test_a_receipt_shows_where_its_race_was_decided_and_recomputes() -> None:
    raced = run_race(noise(1, 0.05, 0.01, 32))
    kept = [loss for of_domain in raced.losses.values() for loss in of_domain]
    receipt = score(kept)
    assert (receipt.evaluated_sequences, len(receipt.losses)) == (8, 12)
    assert score(receipt.losses) == receipt
    assert score(losses("t", noise(1, 0.05, 0.01, 32)), FIXED).evaluated_sequences == 0


def test_stopping_anywhere_else_is_refused() -> None:
    target, general = losses("t", noise(1, 0.05, 0.01, 32)), losses("g", np.zeros(16))
    with pytest.raises(Invalid, match="went on to 16 sequences of t, although the look at 8 decided"):
        score([*target[:16], *general[:8]])
    with pytest.raises(Invalid, match="went on to 5 sequences of g"):
        score([*target[:8], *general[:5]])
    with pytest.raises(
        Invalid, match="stopped after 7 sequences of t, before a look had decided; the next one is at 8"
    ):
        score([*target[:7], *general[:4]])
    unclear = losses("t", [0.2, -0.15] * 16)
    with pytest.raises(Invalid, match="stopped after 8 sequences of t"):
        score([*unclear[:8], *general[:4]])
