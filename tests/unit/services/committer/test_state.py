"""What a key may cost the committer before its signatures are checked."""

from __future__ import annotations

import pytest
from connito.bus import offences
from connito.errors import Invalid
from connito.protocol.quota import LETTERS_PER_KEY
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.checkpoint import Checkpoint
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.heads import leaf_of
from connito.wire.identity import Identity
from connito.wire.merkle import Tree
from connito.wire.roster import Roster
from connito.wire.subjects import ingress
from connito.wire.verification import verify_ingress

from services.committer import state as committer
from services.committer.handlers import Acknowledge, decide
from services.committer.state import State
from tests.support.run import RUN, Run

LIMIT = 16
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
    found.runs[RUN].require_spec().enrolment.messages_per_cycle = LIMIT
    return found


def test_messages_to_runs_that_do_not_exist_are_looked_at_a_few_times(known: State) -> None:
    looked = [not known.needless(said(LOUD, n, run=f"nosuch-{n}")) for n in range(100)]
    assert looked == [True] * LETTERS_PER_KEY + [False] * (100 - LETTERS_PER_KEY)
    assert not known.needless(said(QUIET, 200, run="nosuch-1")), "of each key"
    assert not known.needless(said(LOUD, 201)), "and not of a run that exists"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of what was verified."""
    found: list[int] = []

    def count(record: Record) -> object:
        found.append(record.sequence)
        return verify_ingress(record)

    monkeypatch.setattr(committer, "verify_ingress", count)
    return found


def test_what_comes_after_the_first_over_the_quota_is_not_verified(known: State, verified: list[int]) -> None:
    first = LIMIT + 1
    for sequence in range(1, 50):
        record = said(LOUD, sequence)
        assert known.needless(record) == (sequence > first), "the first one over the quota is told so"
        known.apply(record)
    assert verified == [*range(1, first + 1)]
    assert not known.needless(said(LOUD, first)), "which may be handled after later ones were read"
    for record in (said(QUIET, 60), said(LOUD, 61, cycle=2)):
        assert not known.needless(record), "another key, another cycle"
        known.apply(record)
    assert verified[-2:] == [60, 61]


def test_cycles_that_the_run_does_not_have_count_as_one(known: State, verified: list[int]) -> None:
    for sequence in range(1, 50):
        known.apply(said(LOUD, sequence, cycle=76 + sequence))
    assert verified == [*range(1, LIMIT + 2)]
    assert known.needless(said(LOUD, 50, cycle=4))
    assert not known.needless(said(LOUD, 51, cycle=3))


def test_a_run_without_a_limit_reads_everything(known: State, verified: list[int]) -> None:
    known.runs[RUN].require_spec().enrolment.messages_per_cycle = 0
    for sequence in range(1, 50):
        known.apply(said(LOUD, sequence))
    assert verified == [*range(1, 50)]


def test_what_cannot_be_read_is_told_as_such(known: State) -> None:
    for sequence in range(1, LIMIT + 2):
        known.apply(said(LOUD, sequence))
    record = said(LOUD, LIMIT + 2, data=b"\xff")
    assert not known.needless(record)
    for _ in range(2):
        with pytest.raises(Invalid):
            known.verified(record)


def test_who_has_not_read_of_a_run_yet_keeps_everything(known: State) -> None:
    """Runs are in another stream, and may be read later."""
    facts = known.runs.pop(RUN)
    for sequence in range(1, 50):
        known.apply(said(LOUD, sequence))
    known.runs[RUN] = facts
    assert not known.needless(said(LOUD, 49)), "which of them was the first over the quota is not known"
    known.apply(said(LOUD, 50))
    assert known.needless(said(LOUD, 51))


def test_what_does_not_verify_is_kept_a_few_times_and_then_dropped(known: State) -> None:
    for sequence in range(1, LETTERS_PER_KEY + 1):
        record = said(LOUD, sequence, data=b"\xff")
        assert not known.needless(record)
        assert known.apply(record) is None
        with pytest.raises(Invalid) as caught:
            known.verified(record)
        assert known.worth_a_letter(record, caught.value)
    assert all(known.needless(said(LOUD, sequence, data=b"\xff")) for sequence in range(20, 40))
    assert not known.needless(said(LOUD, 40)), "what does verify has its answer all the same"
    assert not known.needless(said(QUIET, 41, data=b"\xff"))


def test_bytes_that_somebody_put_on_a_miners_subject_are_not_held_against_it(known: State) -> None:
    """Only what its key signed is its offence."""
    offences.collect()
    forged = seal(LOUD, ingress(RUN, LOUD.public, "commitment"), cycle_pb2.Commitment(run=RUN, cycle=1))
    forged.signature = bytes(64)
    record = said(LOUD, 1, data=forged.SerializeToString())
    with pytest.raises(Invalid) as caught:
        known.verified(record)
    known.worth_a_letter(record, caught.value)
    malformed = seal(LOUD, ingress(RUN, LOUD.public, "commitment"), cycle_pb2.Commitment(run="another", cycle=1))
    record = said(LOUD, 2, data=malformed.SerializeToString())
    with pytest.raises(Invalid) as caught:
        known.verified(record)
    known.worth_a_letter(record, caught.value)
    assert [(one.kind, one.key) for one in offences.collect()] == [("bad_signature", ""), ("malformed", LOUD.public)]


def test_a_receipt_is_due_for_what_none_covers_and_is_over_every_message_in_order(known: State) -> None:
    known.runs[RUN] = Run().created().facts
    facts, heard = known.runs[RUN], known.heard[RUN]
    assert decide(facts, heard).actions == []
    records = [said(LOUD, 1), said(QUIET, 2, data=b"junk"), said(QUIET, 4)]
    tree = Tree()
    for record in records:
        known.apply(record)
        tree.append(leaf_of(record))
    assert [action.payload for action in decide(facts, heard).actions] == [Acknowledge()]
    assert (heard.tree.size, heard.tree.root, heard.last_sequence) == (3, tree.root, 4)
    note = Checkpoint("origin", 3, tree.root).signed(LOUD).note
    heard.given(run_pb2.IngressHead(run=RUN, cycle=1, checkpoint=note))
    assert decide(facts, heard).actions == []
