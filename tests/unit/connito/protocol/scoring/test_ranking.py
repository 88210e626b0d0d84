from __future__ import annotations

import pytest
from connito.protocol.findings import Refusal
from connito.protocol.scoring import payout
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.ranking import rank, verdicts
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.cycle_pb2 import Finding
from hypothesis import given
from hypothesis import strategies as st


def submissions(*miners: str) -> list[cycle_pb2.Submission]:
    """Committed in the order given."""
    return [cycle_pb2.Submission(miner=m, commit_sequence=10 + i, origin_cycle=1) for i, m in enumerate(miners)]


def test_best_first_and_the_earlier_commitment_wins_a_tie() -> None:
    entries = submissions("UC", "UB", "UA", "UD")
    assert rank(entries[::-1], {"UA": 0.2, "UB": 0.2, "UC": 0.1, "UD": 0.0}) == ["UB", "UA", "UC"]


def by_rank(ranked: int, emission: int, paid: int) -> list[int]:
    return payout.pay([1.0] * ranked, emission, paid, run_pb2.RewardPolicy())


@given(st.integers(0, 30), st.integers(0, 10**12), st.integers(0, 12))
def test_every_unit_is_accounted_for(ranked: int, emission: int, paid: int) -> None:
    units = by_rank(ranked, emission, paid)
    assert len(units) == ranked
    assert sum(units) == (emission if min(ranked, paid) else 0)
    assert units == sorted(units, reverse=True)
    assert all(unit >= 0 for unit in units)
    assert all(unit == 0 for unit in units[paid:])


def test_geometric() -> None:
    assert by_rank(5, 700, 3) == [400, 200, 100, 0, 0]
    assert by_rank(2, 700, 3) == [467, 233]
    assert by_rank(3, 2, 3) == [1, 1, 0]


def test_verdicts_say_everything() -> None:
    entries = submissions("UA", "UB", "UC", "UD", "UE", "UF")
    agreed = Consensus(
        {"UA": 0.1, "UB": 0.3, "UC": 0.3, "UD": 0.05, "UE": 0.0, "UF": 0.2},
        {"UE": Refusal(reasons_pb2.REASON_NOT_SIGNIFICANT, Finding(text="chance"))},
    )
    copied = Refusal(reasons_pb2.REASON_COPY, Finding(kind=cycle_pb2.FINDING_KIND_COPY, copy_of="UB"))
    found, unallocated = verdicts(
        entries, agreed, emission=900, paid_ranks=2, weights={"UB": 0.75, "UF": 0.25}, copies={"UC": copied}
    )
    by_miner = {verdict.miner: verdict for verdict in found}
    assert unallocated == 0
    assert [v.miner for v in found] == ["UA", "UB", "UC", "UD", "UE", "UF"]
    assert {m: v.rank for m, v in by_miner.items()} == {"UB": 1, "UF": 2, "UA": 3, "UD": 4, "UC": 0, "UE": 0}
    assert {m: v.reward for m, v in by_miner.items() if v.reward} == {"UB": 600, "UF": 300}
    assert by_miner["UB"].status == cycle_pb2.VERDICT_STATUS_MERGED
    assert by_miner["UB"].weight == 0.75
    assert by_miner["UA"].status == cycle_pb2.VERDICT_STATUS_SCORED
    assert by_miner["UA"].reason == reasons_pb2.REASON_BELOW_CUTOFF
    assert (by_miner["UA"].finding.rank, by_miner["UA"].finding.limit) == (3, 2)
    assert by_miner["UC"].status == by_miner["UE"].status == cycle_pb2.VERDICT_STATUS_REJECTED
    assert by_miner["UC"].reason == reasons_pb2.REASON_COPY
    assert by_miner["UC"].finding.copy_of == "UB"
    assert by_miner["UC"].utility == 0.0
    assert (by_miner["UE"].reason, by_miner["UE"].finding.text) == (reasons_pb2.REASON_NOT_SIGNIFICANT, "chance")


def test_a_tie_never_zeroes_the_earlier_one() -> None:
    entries = submissions("UB", "UA")
    found, _ = verdicts(entries, Consensus({"UA": 0.1, "UB": 0.1}, {}), emission=3, paid_ranks=2, weights={})
    assert [(v.miner, v.rank, v.reward) for v in found] == [("UB", 1, 2), ("UA", 2, 1)]


@pytest.mark.parametrize(("utility", "paid"), [(0.0, 3), (0.1, 0)])
def test_what_nobody_earned_is_unallocated(utility: float, paid: int) -> None:
    found, unallocated = verdicts(
        submissions("UA"), Consensus({"UA": utility}, {}), emission=500, paid_ranks=paid, weights={}
    )
    assert (found[0].reward, unallocated) == (0, 500)
