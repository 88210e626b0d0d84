from __future__ import annotations

from connito.v1 import cycle_pb2, reasons_pb2
from connito.views.leaderboard import leaderboard

from tests.support.run import Run
from tests.unit.services.console.world import LATE, MERGED, UNSURE, a_run


def verdict(miner: str, reward: int, *, merged: bool = True) -> cycle_pb2.Verdict:
    status = cycle_pb2.VERDICT_STATUS_MERGED if merged else cycle_pb2.VERDICT_STATUS_REJECTED
    reason = reasons_pb2.REASON_UNSPECIFIED if merged else reasons_pb2.REASON_COPY
    return cycle_pb2.Verdict(miner=miner, status=status, reward=reward, reason=reason)


def test_who_earned_comes_first_and_who_did_not_is_told_why() -> None:
    places = leaderboard([a_run().facts])
    told = [(place.rank, place.miner, place.label, place.reward, place.merged, place.why) for place in places]
    assert told == [
        (1, MERGED, "alice", 100, 1, ""),
        (2, LATE, "", 0, 0, "late-commitment 2"),
        (2, UNSURE, "<b>bob", 0, 0, "not-significant 1"),
    ]
    assert places[0].to_json()["earned"] == {"r1": 100}


def test_earnings_add_up_over_runs_and_equal_ones_share_a_rank() -> None:
    first = Run(name="one").created().selected().miners("UA", "UB", "UC").opened("train")
    first.scored(verdict("UA", 10), verdict("UB", 30), verdict("UC", 0, merged=False))
    second = Run(name="two").created().selected().miners("UA", "UD").opened("train")
    rated = [cycle_pb2.MinerStanding(miner="UA", mu=25.0, sigma=3.0)]
    second.scored(verdict("UA", 20), verdict("UD", 5), miners=rated)
    places = {place.miner: place for place in leaderboard([first.facts, second.facts])}
    assert {miner: (place.rank, place.reward) for miner, place in places.items()} == {
        "UA": (1, 30), "UB": (1, 30), "UD": (3, 5), "UC": (4, 0)
    }  # fmt: skip
    assert dict(places["UA"].earned) == {"one": 10, "two": 20}
    assert (places["UA"].skill, places["UC"].why, places["UC"].skill) == ("25.0 ± 3.0", "copy 1", "")


def test_before_any_result_there_is_nobody() -> None:
    assert leaderboard([Run().created().facts]) == []
