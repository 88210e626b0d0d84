"""Which works of earlier cycles a cycle's are held against."""

from __future__ import annotations

import pytest
from connito.protocol.merging.earlier import MOST, earlier_works
from connito.protocol.scoring.copies import REMEMBERED_CYCLES
from connito.v1 import cycle_pb2, run_pb2

from tests.support.run import Run, ref, theta

MERGED, REJECTED = cycle_pb2.VERDICT_STATUS_MERGED, cycle_pb2.VERDICT_STATUS_REJECTED


def run_of(cycles: int, miners: int = 3, *, kept: int = 0) -> Run:
    """Cycles in which M0 earned most, and the last miner's work was refused; M1's of each came from the one before."""
    run = Run()
    run.created(run.spec(cycles=100, retention=run_pb2.RetentionPolicy(cycles=kept))).selected()
    for cycle in range(1, cycles + 1):
        entries = [
            cycle_pb2.Submission(
                miner=f"M{place}",
                artifact=ref(f"{100 * cycle + place:064x}"),
                base_state=theta(cycle - 1),
                origin_cycle=cycle - (place == 1),
            )
            for place in range(miners)
        ]
        verdicts = [
            cycle_pb2.Verdict(
                miner=f"M{place}", reward=miners - place, status=REJECTED if place == miners - 1 else MERGED
            )
            for place in reversed(range(miners))
        ]
        run.say("submit", cycle, "settled", submissions=entries)
        run.say("merge", cycle, "scored", verdicts=verdicts)
    return run


def names(run: Run, cycle: int) -> list[tuple[int, str]]:
    return [(int(one.artifact.digest, 16) // 100, one.miner) for one in earlier_works(run.facts, cycle)]


def test_the_last_cycles_come_first_and_the_best_paid_in_each() -> None:
    run = run_of(3)
    assert names(run, 1) == []
    assert names(run, 3) == [(2, "M0"), (2, "M1"), (1, "M0"), (1, "M1")]


@pytest.mark.parametrize(("cycles", "miners", "expected"), [(40, 3, 2 * REMEMBERED_CYCLES), (3, 50, MOST)])
def test_reading_them_has_an_end(cycles: int, miners: int, expected: int) -> None:
    assert len(names(run_of(cycles, miners), cycles + 1)) == expected


def test_where_artifacts_are_kept_for_few_cycles_an_audit_still_has_them() -> None:
    assert names(run_of(6, kept=2), 7) == [(6, "M0")], "what began a cycle earlier began from a state that is gone"
