from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from connito.protocol.scoring import ratings
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.ledger import UNALLOCATED, balances, check, entries
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey

RUN = "r"


class Book:
    """A run of which only the results are told."""

    def __init__(self, **policy: Any) -> None:
        spec = run_pb2.RunSpec(run=RUN, cycles=50, emission=100, rewards=run_pb2.RewardPolicy(**policy))
        self.facts, self.cycle = RunFacts(RUN), 0
        self.put("run", 0, "created", run_pb2.RunCreated(spec=spec))

    def put(
        self,
        section: str,
        cycle: int,
        kind: str,
        message: cycle_pb2.CycleScored | cycle_pb2.WindowOpened | run_pb2.RunCreated,
    ) -> None:
        fact = Fact(RUN, FactKey(section, cycle, kind, ""), message, "U", section, len(self.facts.facts) + 1, 0)
        self.facts.add(fact)

    def cycle_of(
        self,
        *order: str,
        tail: Sequence[str] = (),
        reasons: Mapping[str, reasons_pb2.Reason.ValueType] | None = None,
        reward: int = 0,
        unallocated: int = 100,
    ) -> dict[str, cycle_pb2.MinerStanding]:
        """`order` are the ranked miners, best first, `tail` those that were rejected. Ratings afterwards, by miner."""
        self.cycle += 1
        self.put("train", self.cycle, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=self.cycle))
        verdicts = [
            cycle_pb2.Verdict(miner=m, rank=i, utility=1.0 / i, reward=reward if i == 1 else 0)
            for i, m in enumerate(order, 1)
        ]
        verdicts += [
            cycle_pb2.Verdict(miner=m, reason=(reasons or {}).get(m, reasons_pb2.REASON_UNSPECIFIED)) for m in tail
        ]
        miners = ratings.rate(self.facts, self.cycle, verdicts)
        scored = cycle_pb2.CycleScored(
            run=RUN, cycle=self.cycle, verdicts=verdicts, miners=miners, unallocated=unallocated
        )
        self.put("merge", self.cycle, "scored", scored)
        return {standing.miner: standing for standing in miners}


@pytest.fixture
def book() -> Book:
    return Book(payout="rank-table")


def conservative(standing: cycle_pb2.MinerStanding) -> float:
    """μ − 3σ: a miner is better than this almost surely."""
    return standing.mu - 3.0 * standing.sigma


def test_who_wins_is_rated_higher_and_more_surely(book: Book) -> None:
    for _ in range(8):
        found = book.cycle_of("A", "B", "C", tail=["D", "E"])
    assert found["A"].mu > found["B"].mu > found["C"].mu > found["D"].mu == found["E"].mu
    later = book.cycle_of("A", "B", "C", tail=["D", "E"])
    assert all(later[miner].sigma < found[miner].sigma < ratings.SIGMA for miner in later)
    assert (later["A"].judged, later["A"].useful, later["D"].useful) == (9, 9, 0)
    assert conservative(found["A"]) > conservative(found["B"])


def test_a_newcomer_that_wins_once_is_not_yet_above_who_always_does(book: Book) -> None:
    for _ in range(8):
        book.cycle_of("A", "B", "C")
    found = book.cycle_of("N", "A", "B", "C")
    assert conservative(found["N"]) < conservative(found["A"])


def test_a_late_joiner_is_rated_in_its_first_cycle(book: Book) -> None:
    book.cycle_of("A", "B")
    found = book.cycle_of("N", "A", "B")
    assert found["N"].judged == 1
    assert found["N"].mu > ratings.MU


def test_the_absent_become_strangers_again(book: Book) -> None:
    for _ in range(8):
        known = book.cycle_of("A", "B", "C")
    found, sigmas = known, [known["A"].sigma]
    for _ in range(40):
        found = book.cycle_of("B", "C")
        sigmas.append(found["A"].sigma)
    assert sigmas == sorted(sigmas)
    assert found["A"].sigma > known["A"].sigma
    assert ratings.MU < found["A"].mu < known["A"].mu
    assert found["A"].judged == 8


def test_what_is_nobody_s_doing_is_no_game(book: Book) -> None:
    found = book.cycle_of(tail=["A", "B"], reasons=dict.fromkeys("AB", reasons_pb2.REASON_NO_QUORUM))
    assert found == {}
    found = book.cycle_of("A", tail=["B"], reasons={"B": reasons_pb2.REASON_ARTIFACT_MISSING})
    assert (found["A"].mu, found["A"].sigma) == (ratings.MU, round(ratings.SIGMA, ratings.DECIMALS))
    assert set(found) == {"A"}


def test_the_same_log_gives_the_same_ratings() -> None:
    def play() -> list[dict[str, cycle_pb2.MinerStanding]]:
        book = Book()
        return [book.cycle_of("A", "B", tail=["C"]) for _ in range(5)]

    assert play() == play()


def test_a_run_without_a_reward_policy_has_none() -> None:
    book = Book()
    book.facts.require_spec().ClearField("rewards")
    assert book.cycle_of("A", "B") == {}


def test_the_ledger_keeps_every_entry_and_adds_up(book: Book) -> None:
    book.cycle_of("A", "B", reward=60, unallocated=40)
    book.cycle_of("B", "A", reward=70, unallocated=30)
    ledger = entries(book.facts)
    assert [(e.cycle, e.account, e.units, e.balance) for e in ledger] == [
        (1, "A", 60, 60), (1, "B", 0, 0), (1, "", 40, 40), (2, "B", 70, 70), (2, "A", 0, 60), (2, "", 30, 70),
    ]  # fmt: skip
    assert {(e.role, e.account): e.balance for e in balances(ledger)} == {
        ("miner", "A"): 60, ("miner", "B"): 70, (UNALLOCATED, ""): 70,
    }  # fmt: skip
    assert check(book.facts, ledger) == []
    before = list(ledger)
    book.cycle_of("A", reward=50, unallocated=40)
    assert entries(book.facts)[: len(before)] == before
    assert check(book.facts, entries(book.facts)) == ["cycle 3: 90 units for 100"]
