"""What the coordinator does where draw, quorum and closing are checked, and heads are written."""

from __future__ import annotations

from connito.protocol import rules
from connito.protocol.findings import CHECKED
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2

from services.coordinator.handlers import CloseWindow, PublishFact, WriteHead, decide
from tests.support.run import even

from .world import World

VALIDATORS = ("va", "vb", "vc")


def world(min_validators: int = 1) -> World:
    """Assembled, with three validators."""
    return (
        World(min_validators=min_validators)
        .created(protocol_version=CHECKED)
        .selected()
        .miners("ma")
        .validators(*VALIDATORS)
    )


def step(told: World) -> object:
    (action,) = decide(told.facts, told.now, even).actions
    told.perform(decide(told.facts, told.now, even))
    return action.payload


def validating(*committed: str) -> World:
    """Up to the opening of validate, by the coordinator's own decisions."""
    told = world()
    assert step(told) == WriteHead(1)
    step(told)
    told.trained("ma")
    for validator in committed:
        told.seed_committed(validator)
    told.now += 10**6
    step(told)
    step(told)
    told.committed("ma")
    step(told)
    told.settled("commit")
    step(told)
    told.submitted("ma")
    step(told)
    told.settled("submit")
    opened = step(told)
    assert isinstance(opened, PublishFact)
    assert opened.section == "validate"
    return told


def test_a_head_is_written_before_a_cycle_opens_and_behind_the_end_and_the_deposit() -> None:
    told = world()
    assert step(told) == WriteHead(1)
    opened = step(told)
    assert isinstance(opened, PublishFact)
    assert (opened.section, opened.kind) == ("train", "opened")
    told.ended()
    cuts = [run_pb2.StreamCut(stream="RUNS", last_sequence=told.last("RUNS"))]
    assert decide(told.facts, told.now, even).actions[0].payload == WriteHead(2)
    told.say("run", 2, "head", cuts=cuts)
    assert decide(told.facts, told.now, even).actions == []
    told.say("library", 0, "deposited", expert_id="e")
    assert decide(told.facts, told.now, even).actions[0].payload == WriteHead(3)


def test_less_than_half_of_those_that_joined_draw_nothing_though_the_policy_asks_for_one() -> None:
    told = validating("va")
    told.seed_revealed("va")
    told.now += 10**6
    closed = step(told)
    assert isinstance(closed, CloseWindow)
    assert closed.cause == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    assert list(rules.faults(told.facts, 1, even, said=True)) == []


def test_most_of_those_that_joined_draw_and_their_own_decisions_break_no_rule() -> None:
    told = validating("va", "vb")
    told.seed_revealed("va").seed_revealed("vb")
    drawn = step(told)
    assert isinstance(drawn, PublishFact)
    assert drawn.kind == "drawn"
    told.reported("va").reported("vb")
    assert isinstance(step(told), CloseWindow)
    assert list(rules.faults(told.facts, 1, even, said=True)) == []


def test_half_of_the_votes_against_a_cycle_end_the_run_with_the_rule_it_breaks() -> None:
    told = validating(*VALIDATORS)
    finding = cycle_pb2.Finding(kind=cycle_pb2.FINDING_KIND_RULE_EARLY, name="commit", count=5000)
    told.say("validate", 1, "objection", validator="va", finding=finding)
    assert not rules.objectors(told.facts, 1, even)
    told.say("validate", 1, "objection", validator="vb", finding=finding)
    ended = step(told)
    assert isinstance(ended, PublishFact)
    assert isinstance(ended.message, run_pb2.RunEnded)
    assert (ended.message.outcome, ended.message.reason) == (run_pb2.RUN_OUTCOME_FAILED, reasons_pb2.REASON_RULE_BROKEN)
    assert "the commit came 5000 ms before its time" in ended.message.detail


def test_who_objects_is_not_waited_for() -> None:
    told = validating(*VALIDATORS)
    told.seed_revealed("va").seed_revealed("vb").seed_revealed("vc")
    step(told)
    told.reported("va").reported("vb").say("validate", 1, "objection", validator="vc")
    assert isinstance(step(told), CloseWindow)
