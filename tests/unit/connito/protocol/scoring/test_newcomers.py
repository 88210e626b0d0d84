from __future__ import annotations

import pytest
from connito.protocol.scoring.newcomers import over_quota, withhold
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2

from tests.unit.connito.protocol.scoring.test_trust import TRUTH, Season


def settled(season: Season, cycle: int, *miners: str) -> list[cycle_pb2.Submission]:
    entries = [cycle_pb2.Submission(miner=m, commit_sequence=i) for i, m in enumerate(miners, 1)]
    season.put("submit", cycle, "settled", cycle_pb2.WindowSettled(run="r", cycle=cycle, submissions=entries))
    return entries


def test_new_keys_share_a_quota_in_the_order_of_their_commitments() -> None:
    season = Season(policy=run_pb2.RewardPolicy(newcomers_per_cycle=2))
    entries = [cycle_pb2.Submission(miner=m, commit_sequence=i) for m, i in (("A", 3), ("B", 1), ("C", 2), ("D", 4))]
    assert [entry.miner for entry in over_quota(season.facts, 1, entries)] == ["A", "D"]
    settled(season, 1, "B", "C")
    assert [entry.miner for entry in over_quota(season.facts, 2, entries)] == []
    more = [cycle_pb2.Submission(miner=f"S{i}", commit_sequence=i) for i in range(9)]
    assert len(over_quota(season.facts, 2, [*entries, *more])) == 9


def test_without_a_quota_everybody_has_a_place() -> None:
    season = Season(policy=run_pb2.RewardPolicy())
    assert over_quota(season.facts, 1, [cycle_pb2.Submission(miner=f"S{i}") for i in range(99)]) == []


@pytest.fixture
def season() -> Season:
    return Season(policy=run_pb2.RewardPolicy(probation_cycles=2, probation_pay=0.5, payout="proportional"))


def test_probation_withholds_until_work_was_useful_often_enough(season: Season) -> None:
    honest = dict.fromkeys(("VA", "VB", "VC"), TRUTH)
    for cycle, pay, withheld in ((1, 300, 300), (2, 300, 300), (3, 600, 0)):
        _, scored = season.play(honest)
        verdict = next(v for v in scored.verdicts if v.miner == "MA")
        assert (cycle, verdict.reward, verdict.withheld) == (cycle, pay, withheld)
        assert (verdict.reason == reasons_pb2.REASON_PROBATION) == (withheld > 0)
        assert scored.unallocated == 2 * withheld - withheld + (200 if withheld else 0)


def test_a_new_key_is_on_probation_where_an_old_one_no_longer_is(season: Season) -> None:
    for _ in range(2):
        season.play(dict.fromkeys(("VA", "VB", "VC"), TRUTH))
    truth = {**TRUTH, "NEW": 0.5}
    _, scored = season.play(dict.fromkeys(("VA", "VB", "VC"), truth), truth=truth)
    by_miner = {v.miner: v for v in scored.verdicts}
    assert (by_miner["NEW"].reward, by_miner["NEW"].withheld) == (250, 250)
    assert (by_miner["MA"].reward, by_miner["MA"].withheld) == (300, 0)
    told = by_miner["NEW"].finding
    assert (told.kind, told.count, told.limit, told.share) == (cycle_pb2.FINDING_KIND_PROBATION, 1, 2, 0.5)


def test_useless_work_does_not_end_a_probation(season: Season) -> None:
    for _ in range(5):
        season.play({key: {"MA": 0.1} for key in ("VA", "VB", "VC")})
    verdict = cycle_pb2.Verdict(miner="MC", reward=100)
    season.cycle += 1
    withhold(season.facts, season.cycle, verdict)
    assert (verdict.reward, verdict.withheld) == (50, 50)


def test_a_reason_that_says_more_stays(season: Season) -> None:
    verdict = cycle_pb2.Verdict(
        miner="MA", reward=100, reason=reasons_pb2.REASON_GATE_REJECTED, finding=cycle_pb2.Finding(text="loss rose")
    )
    withhold(season.facts, 1, verdict)
    assert (verdict.reason, verdict.finding.text, verdict.withheld) == (
        reasons_pb2.REASON_GATE_REJECTED,
        "loss rose",
        50,
    )
