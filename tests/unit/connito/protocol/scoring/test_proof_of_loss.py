from __future__ import annotations

import math

import numpy as np
import pytest
from connito.errors import Invalid
from connito.protocol.scoring.proof_of_loss import Paired, general_change, judge, paired, score_submission
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from scipy import stats

POLICY = run_pb2.ScorePolicy(confidence=0.95, retention_margin=0.02)
INF = math.inf


def pair(gains: list[float], tokens: int = 100) -> Paired:
    return paired([300.0] * len(gains), [300.0 - gain for gain in gains], [tokens] * len(gains), 0.95)


GOOD = pair([5.0, 6.0, 4.0, 5.5, 4.5])
FLAT = pair([0.1, -0.1, 0.1, -0.1])


def test_equal_lengths_give_the_textbook_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(300, 20, 24), rng.normal(298, 20, 24)
    compared = paired(list(before), list(after), [128] * 24, 0.9)
    gains = (before - after) / 128
    low, high = stats.t.interval(0.9, 23, gains.mean(), stats.sem(gains))
    assert (compared.effect, compared.low, compared.high) == pytest.approx((gains.mean(), low, high))


def test_the_interval_covers_what_it_says_with_few_unequal_sequences() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        tokens = rng.integers(100, 156, 8)
        gains = 0.03 * tokens + rng.normal(0, 4, 8)
        compared = paired(list(gains), [0.0] * 8, [int(t) for t in tokens], 0.95)
        covered += compared.low <= 0.03 <= compared.high
    assert 0.935 <= covered / 1500 <= 0.97


def test_sequences_are_weighted_by_their_tokens() -> None:
    assert paired([10.0, 10.0], [9.0, 7.0], [10, 30], 0.95).effect == pytest.approx(4 / 40)


def test_a_single_sequence_proves_nothing() -> None:
    compared = pair([5.0])
    assert (compared.effect, compared.low, compared.high) == (0.05, -INF, INF)
    assert judge(compared, {}, POLICY).reason == reasons_pb2.REASON_NOT_SIGNIFICANT


@pytest.mark.parametrize("lengths", [(0, 0, 0), (2, 1, 2), (2, 2, 1)])
def test_losses_that_do_not_pair_are_refused(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(Invalid, match="cannot pair"):
        paired([1.0] * lengths[0], [1.0] * lengths[1], [1] * lengths[2], 0.95)
    with pytest.raises(Invalid, match="every count positive"):
        paired([1.0], [1.0], [0], 0.95)


@pytest.mark.parametrize(
    ("target", "general", "reason"),
    [
        (GOOD, {}, reasons_pb2.REASON_UNSPECIFIED),
        (GOOD, {"code": FLAT}, reasons_pb2.REASON_UNSPECIFIED),
        (pair([-1.0, -2.0, -1.5]), {}, reasons_pb2.REASON_NO_IMPROVEMENT),
        (pair([9.0, -7.0, 5.0, -4.0]), {}, reasons_pb2.REASON_NOT_SIGNIFICANT),
        (pair([0.0, 0.0, 0.0]), {}, reasons_pb2.REASON_UNCHANGED),
        (pair([1.0, math.nan]), {}, reasons_pb2.REASON_NON_FINITE),
        (pair([1.0, -INF]), {}, reasons_pb2.REASON_NON_FINITE),
        (GOOD, {"code": pair([math.nan, 1.0])}, reasons_pb2.REASON_NON_FINITE),
        (GOOD, {"code": pair([-3.0, -3.1, -2.9])}, reasons_pb2.REASON_RETENTION_BROKEN),
        # The mean over domains is fine; one of them is ruined beyond doubt.
        (GOOD, {"code": pair([-9.0, -9.1, -8.9]), "law": pair([9.0, 9.1, 8.9])}, reasons_pb2.REASON_RETENTION_BROKEN),
        # Damage in one sequence widens the interval but does not hide.
        (GOOD, {"code": pair([-40.0, 0.1, 0.1, 0.1])}, reasons_pb2.REASON_RETENTION_BROKEN),
    ],
)
def test_verdicts(target: Paired, general: dict[str, Paired], reason: int) -> None:
    judgement = judge(target, general, POLICY)
    assert judgement.reason == reason
    assert judgement.finding.kind
    assert judgement.utility == (target.effect if reason == reasons_pb2.REASON_UNSPECIFIED else 0.0)


def test_the_base_state_itself_is_unchanged_whatever_it_scores() -> None:
    assert judge(GOOD, {}, POLICY, unchanged=True).reason == reasons_pb2.REASON_UNCHANGED


def test_general_change_is_the_mean_over_domains_with_a_bound() -> None:
    change = general_change({"a": pair([-1.0, -2.0]), "b": pair([1.0, 1.0])}, 0.95)
    assert change.mean == pytest.approx((0.015 - 0.01) / 2)
    assert change.high > change.mean
    assert general_change({"b": pair([1.0, 1.0])}, 0.95).high == pytest.approx(-0.01)
    assert general_change({"b": pair([1.0])}, 0.95).high == INF
    assert general_change({}, 0.95) == (0.0, 0.0)


def test_one_domain_has_the_bound_of_its_own_interval() -> None:
    one = pair([-1.0, -2.0, -4.0])
    assert general_change({"a": one}, 0.95).high == pytest.approx(-one.low)


def losses(after: float = 290.0) -> list[cycle_pb2.SequenceLoss]:
    made = [
        cycle_pb2.SequenceLoss(domain="law", sequence=i, before=300.0, after=after + i / 10, tokens=100)
        for i in range(6)
    ]
    return [*made, cycle_pb2.SequenceLoss(domain="code", sequence=0, before=300.0, after=300.5, tokens=100)]


def test_a_receipt_recomputes_from_its_own_losses() -> None:
    score = score_submission("UA", "a" * 64, losses(), "law", POLICY)
    assert score.utility == score.effect > 0
    assert score.effect_low < score.effect < score.effect_high
    assert score.general_change == pytest.approx(0.005)
    assert list(score.losses) == losses()
    assert score_submission("UA", "a" * 64, score.losses, "law", POLICY) == score


def test_a_receipt_of_non_finite_losses_carries_no_numbers() -> None:
    score = score_submission("UA", "a" * 64, losses(math.nan), "law", POLICY)
    assert score.reason == reasons_pb2.REASON_NON_FINITE
    assert (score.utility, score.effect, score.effect_low, score.effect_high) == (0, 0, 0, 0)


def test_a_receipt_needs_the_target_domain() -> None:
    with pytest.raises(Invalid, match="medical"):
        score_submission("UA", "a" * 64, losses(), "medical", POLICY)


def test_nonsense_confidence_is_refused() -> None:
    with pytest.raises(Invalid, match="confidence"):
        paired([1.0, 2.0], [1.0, 1.0], [1, 1], 95.0)
