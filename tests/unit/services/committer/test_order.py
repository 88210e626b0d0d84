"""What one run's messages wait for is nothing to another run."""

from __future__ import annotations

import pytest
from connito.v1 import cycle_pb2
from connito.wire.fact import Fact, Record
from connito.wire.roster import Roster

from services.committer import judging
from services.committer.state import State, lane_of
from tests.support.run import RUN
from tests.unit.services.committer.ledger import Ledger


def record(run: str, miner: str, kind: str) -> Record:
    return Record("INGRESS", 1, f"connito.v1.{run}.ingress.{miner}.{kind}", b"", 0, {})


def test_a_lane_is_a_key_in_a_run() -> None:
    kinds = ("commitment", "reveal", "trained")
    assert len({lane_of(record("a", "ma", kind)) for kind in kinds}) == 1, "what one key says is answered in its order"
    assert len({lane_of(record(run, miner, "reveal")) for run in ("a", "b") for miner in ("ma", "mb")}) == 4


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.miners("ma", "mb")
    ledger.opened("train").opened("commit")
    return ledger


def state_of(ledger: Ledger, *said: Fact) -> State:
    state = State(Roster({}))
    state.runs[RUN] = ledger.facts
    for fact in said:
        state._pending[RUN][fact.sequence] = fact
    return state


def test_a_window_waits_for_each_message_of_its_own_run_up_to_its_close(ledger: Ledger) -> None:
    first, second, late = (ledger.commitment(miner, 1) for miner in ("ma", "mb", "ma"))
    state = state_of(ledger, first, second, late)
    for said in (first, second):
        assert state.unanswered(RUN, second.sequence) == said.sequence
        answer = judging.judge_commitment(ledger.facts, said)
        assert isinstance(answer, cycle_pb2.CommitmentAccepted)
        ledger.publish("commit", 1, "accepted", answer, answer.miner)
    assert state.unanswered(RUN, second.sequence) is None
    assert state.unanswered(RUN, late.sequence) == late.sequence, "it is refused as a second one, in its turn"


def test_another_run_s_messages_are_not_waited_for(ledger: Ledger) -> None:
    state = state_of(ledger)
    state._pending["another"][1] = ledger.commitment("ma", 1)
    assert state.unanswered(RUN, 1_000) is None


def test_waiting_for_many_looks_at_each_a_few_times(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [ledger.commitment(f"m{number}", 1) for number in range(200)]
    state, looked = state_of(ledger, *said), list[int]()

    def answered(_facts: object, fact: Fact) -> bool:
        looked.append(fact.sequence)
        return fact.sequence in done

    monkeypatch.setattr(judging, "answered", answered)
    done: set[int] = set()
    # They are answered side by side, each in a lane of its own.
    for fact in sorted(said, key=lambda fact: fact.sequence ^ 7):
        assert state.unanswered(RUN, 1_000) is not None
        done.add(fact.sequence)
    assert state.unanswered(RUN, 1_000) is None
    assert len(looked) < 3 * len(said)


def test_what_goes_without_an_answer_is_not_waited_for(ledger: Ledger) -> None:
    spec = ledger.facts.require_spec()
    spec.enrolment.messages_per_cycle = 1
    first, flood = ledger.commitment("ma", 1), [ledger.commitment("ma", 1) for _ in range(5)]
    state = state_of(ledger, first, *flood)
    for said in (first, *flood):
        state._count(said)
    assert state.unanswered(RUN, 1_000) == first.sequence
