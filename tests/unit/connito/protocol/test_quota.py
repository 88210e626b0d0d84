"""How many messages of one key are answered one by one."""

from __future__ import annotations

from connito.protocol.quota import MessageCounter
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.subjects import FactKey

SPEC = run_pb2.RunSpec(cycles=2, enrolment=run_pb2.EnrolmentPolicy(messages_per_cycle=2))


def said(sequence: int, cycle: int = 1, miner: str = "m", kind: str = "commitment") -> Fact:
    return Fact("r", FactKey("ingress", cycle, kind, miner), cycle_pb2.Commitment(), miner, "INGRESS", sequence, 0)


def counted(*facts: Fact) -> MessageCounter:
    known = MessageCounter()
    for fact in facts:
        known.add(fact)
    return known


def test_the_third_message_of_a_kind_in_a_cycle_is_over() -> None:
    messages = [said(1), said(2), said(3)]
    known = counted(*messages)
    assert [known.over(fact, SPEC) for fact in messages] == [False, False, True]


def test_other_miners_kinds_and_cycles_do_not_count() -> None:
    known = counted(said(1), said(2, miner="other"), said(3, cycle=2), said(4, kind="reveal"), said(5))
    assert not known.over(said(5), SPEC)


def test_a_message_that_is_read_twice_counts_once() -> None:
    assert counted(said(1), said(1), said(2)).before(said(3), SPEC) == 2


def test_cycles_that_the_run_does_not_have_are_one() -> None:
    known = counted(said(1, cycle=0), said(2, cycle=7), said(3, cycle=999))
    assert known.over(said(3, cycle=999), SPEC)
    assert not known.over(said(4, cycle=1), SPEC)


def test_without_a_number_in_the_policy_everything_is_answered() -> None:
    assert not counted(said(1), said(2), said(3)).over(said(3), run_pb2.RunSpec(cycles=2))
