"""What a key may cost the committer before its signatures are checked."""

from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.protocol.quota import LETTERS_PER_KEY
from connito.v1 import cycle_pb2
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.subjects import ingress
from connito.wire.verification import verify_ingress

from services.committer import state as committer
from services.committer.state import State
from tests.support.run import RUN, Run

LOUD, QUIET = (Identity.generate(bytes([n]) * 32) for n in (1, 2))


def said(who: Identity, sequence: int, run: str = RUN, cycle: int = 1, data: bytes | None = None) -> Record:
    subject = ingress(run, who.public, "commitment")
    message = cycle_pb2.Commitment(run=run, cycle=cycle, digest=bytes(32))
    body = data if data is not None else seal(who, subject, message).SerializeToString()
    return Record("INGRESS", sequence, subject, body, 0)


@pytest.fixture
def known() -> State:
    found = State(Roster({}), clock=lambda: 0.0)
    found.runs[RUN] = Run().created(cycles=3).facts
    found.live = True
    return found


def test_messages_to_runs_that_do_not_exist_are_looked_at_a_few_times(known: State) -> None:
    looked = [not known.needless(said(LOUD, n, run=f"nosuch-{n}")) for n in range(100)]
    assert looked == [True] * LETTERS_PER_KEY + [False] * (100 - LETTERS_PER_KEY)
    assert not known.needless(said(QUIET, 200, run="nosuch-1")), "of each key"
    assert not known.needless(said(LOUD, 201)), "and not of a run that exists"


def test_who_was_told_of_the_quota_is_not_verified_any_more(known: State, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not known.needless(said(LOUD, 1))
    known.told(verify_ingress(said(LOUD, 1)))
    verified: list[int] = []

    def count(record: Record) -> object:
        verified.append(record.sequence)
        return verify_ingress(record)

    monkeypatch.setattr(committer, "verify_ingress", count)
    for sequence in range(2, 50):
        record = said(LOUD, sequence)
        assert known.needless(record)
        assert known.apply(record) is None
    assert verified == []
    for record in (said(QUIET, 60), said(LOUD, 61, cycle=2)):
        assert not known.needless(record), "another key, another cycle"
        known.apply(record)
    assert verified == [60, 61]


def test_cycles_that_the_run_does_not_have_count_as_one(known: State) -> None:
    known.told(verify_ingress(said(LOUD, 1, cycle=77)))
    assert known.needless(said(LOUD, 2, cycle=78))
    assert not known.needless(said(LOUD, 3, cycle=3))


def test_what_cannot_be_read_is_told_as_such(known: State) -> None:
    known.told(verify_ingress(said(LOUD, 1)))
    record = said(LOUD, 2, data=b"\xff")
    assert not known.needless(record)
    for _ in range(2):
        with pytest.raises(Invalid):
            known.verified(record)


def test_who_reads_from_the_beginning_keeps_everything(known: State) -> None:
    """Runs are in another stream, and may be read later."""
    known.told(verify_ingress(said(LOUD, 1)))
    known.live = False
    assert known.apply(said(LOUD, 2)) is not None
