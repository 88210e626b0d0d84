"""What the committer really settles passes; each thing that it could claim instead is found by whoever uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from connito.errors import VerificationFailed
from connito.protocol.provenance import check_settled, check_start
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC

from services.committer import settlement
from tests.unit.services.committer.ledger import RUN, Ledger, theta
from tests.unit.services.committer.test_judging import reveal, to_submit

Change = Callable[[cycle_pb2.WindowSettled], object]


def settled(change: Change = lambda message: None) -> Ledger:
    """A submit window of one miner who revealed and one who was banned, settled with a change."""
    ledger = Ledger()
    ledger.miners("ma", "mb")
    to_submit(ledger, miners=("ma", "mb"))
    for miner in ("ma", "mb"):
        reveal(ledger, ledger.reveal(miner, 1))
    ledger.banned("mb")
    ledger.closed("submit", 1)
    *others, last = settlement.settle(ledger.facts, ledger.reveals, "submit", 1)
    for write in others:
        ledger.publish(write.section, write.cycle, write.kind, write.message, write.id)
    message = cycle_pb2.WindowSettled()
    assert isinstance(last.message, cycle_pb2.WindowSettled)
    message.CopyFrom(last.message)
    change(message)
    ledger.publish("submit", 1, "settled", message)
    return ledger


def test_what_the_committer_settles_passes() -> None:
    check_settled(settled().facts, 1)


def stranger(message: cycle_pb2.WindowSettled) -> None:
    message.submissions.add().CopyFrom(message.submissions[0])
    message.submissions[1].miner = "mz"


def banned(message: cycle_pb2.WindowSettled) -> None:
    stranger(message)
    message.submissions[1].miner = "mb"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (stranger, "no commitment that stands"),
        (banned, "is banned by then"),
        (lambda m: m.submissions.add().CopyFrom(m.submissions[0]), "twice"),
        (lambda m: setattr(m, "last_sequence", 99), "settled up to 99"),
        (lambda m: setattr(m.submissions[0], "commit_sequence", 1000), "not at 1000"),
        (lambda m: setattr(m.submissions[0], "reveal_sequence", 1000), "after the close"),
        (lambda m: setattr(m.submissions[0], "origin_cycle", 7), "worked in cycle 7"),
        (lambda m: setattr(m.submissions[0].base_state, "digest", "ff" * 32), "started from"),
        (lambda m: setattr(m.submissions[0].artifact, "realm", REALM_PUBLIC), "no submission"),
    ],
)
def test_a_settlement_that_contradicts_the_log_is_refused(change: Change, fault: str) -> None:
    with pytest.raises(VerificationFailed, match=fault):
        check_settled(settled(change).facts, 1)


def test_a_cycle_starts_from_what_the_one_before_has_published() -> None:
    ledger = Ledger()
    ledger.opened("train", 1)
    check_start(ledger.facts, 1)
    version = cycle_pb2.VersionPublished(run=RUN, cycle=1, version=1, state=theta(2))
    ledger.publish("merge", 1, "version", version)
    ledger.publish("train", 2, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=2, version=1, state=theta(2)))
    check_start(ledger.facts, 2)
    for wrong in (theta(9), theta(1)):
        other = Ledger()
        other.publish("merge", 1, "version", version)
        other.publish("train", 2, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=2, version=1, state=wrong))
        with pytest.raises(VerificationFailed, match="what was published is version 1"):
            check_start(other.facts, 2)
