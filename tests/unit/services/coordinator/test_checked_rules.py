"""What the coordinator does where draw, quorum and closing are checked, and heads are written."""

from __future__ import annotations

from connito.protocol import rules
from connito.protocol.quorum import pause
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2

from services.coordinator import expected
from services.coordinator.handlers import CloseWindow, PublishFact, WriteHead, decide
from tests.support.run import even

from .world import World

VALIDATORS = ("va", "vb", "vc")


def world(stakes: dict[str, float] | None = None) -> World:
    """Assembled, with three validators."""
    return World().created().selected().miners("ma").validators(*VALIDATORS, stakes=stakes)


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
    told = validating("va", "vb")
    told.seed_revealed("va").seed_revealed("vb", secret=b"another secret than that".ljust(32))
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


def training(*committed: str, stakes: dict[str, float] | None = None) -> tuple[World, rules.Stake]:
    """A first train window past its deadline, in which these validators have committed to a secret."""
    told = world(stakes)

    def stake(validator: str) -> float:
        raise AssertionError("the log counts the stakes, and the roster may have changed")

    step(told)
    step(told)
    told.trained("ma")
    for validator in committed:
        told.seed_committed(validator)
    told.now += 10**6
    return told, stake


def test_what_a_vote_weighs_is_written_down_before_anything_rests_on_it() -> None:
    told = World().created().selected().miners("ma")
    told.say("run", 0, "validator", validator="va").say("run", 0, "validator", validator="vb")
    told.perform(decide(told.facts, told.now, {"va": 3.0, "vb": 0.5}.__getitem__))
    assert {key: fact.message.stake for key, fact in told.facts.stakes.items()} == {"va": 3.0, "vb": 0.5}
    assert decide(told.facts, told.now, even).actions[0].payload == WriteHead(1)


def test_a_cycle_that_half_of_the_votes_would_judge_is_not_begun() -> None:
    """By heads there are enough in each; by votes only where more than half of them are there."""
    told, stake = training("vb")
    assert not decide(told.facts, told.now, stake).actions
    assert str(pause(told.facts, told.now, stake)) == (
        "1 of 1 miner and 1 of 1 validator here; they have 1.00 of 3.00 votes; more than half are needed"
    )
    told.seed_committed("vc")
    assert pause(told.facts, told.now, stake) is None
    assert isinstance(decide(told.facts, told.now, stake).actions[0].payload, CloseWindow)
    for committed, goes_on in ((("va",), True), (("vb", "vc"), False)):
        told, stake = training(*committed, stakes={"va": 3.0})
        assert bool(decide(told.facts, told.now, stake).actions) is goes_on
        assert (pause(told.facts, told.now, stake) is None) is goes_on


def test_a_newcomer_ends_the_pause_where_the_others_stay_away() -> None:
    told, stake = training("va")
    told.validators("vd", "ve")
    for validator in ("vd", "ve"):
        assert pause(told.facts, told.now, stake) is not None
        told.seed_committed(validator)
    assert pause(told.facts, told.now, stake) is None, "three of the five that could have been there"


def test_all_who_joined_are_waited_for_where_those_who_reported_are_too_few() -> None:
    for stakes, waited_for in (({}, {"vb", "vc"}), ({"va": 3.0}, set(VALIDATORS))):
        told, stake = training(*VALIDATORS, stakes=stakes)
        told.reported("vb").reported("vc").say("run", 2, "head")
        assert set(expected.named(told.facts, told.facts.next_train, stake)) == {"ma", *waited_for}


def test_a_window_in_which_nobody_can_be_heard_waits_for_the_first_and_then_for_the_others() -> None:
    """The store was away for as long as the window was announced: all that was made would have been late."""
    told = submitting("ma", "mb")
    window = told.facts.window("submit", 1)
    told.now = window.deadline_unix_ms + 1
    again = decide(told.facts, told.now, even)
    assert not again.actions
    assert str(pause(told.facts, told.now, even)).startswith("nobody of 2 was heard in the submit window")
    told.submitted("ma")
    assert pause(told.facts, told.now, even) is None
    again = decide(told.facts, told.now, even)
    assert again.actions == [], "the other one has as much time as after a first in time"
    assert again.wake_at_ms is not None
    assert told.now < again.wake_at_ms < told.now + 100_000
    told.now = again.wake_at_ms
    close = step(told)
    assert isinstance(close, CloseWindow)
    assert close.cause == cycle_pb2.CLOSE_CAUSE_DEADLINE
    assert list(rules.faults(told.facts, 1, even, said=True)) == []


def test_a_window_in_which_nobody_is_ever_heard_is_given_up() -> None:
    told = submitting("ma")
    opened = told.now
    while not (decision := decide(told.facts, told.now, even)).actions:
        assert decision.wake_at_ms is not None
        assert decision.wake_at_ms > told.now
        told.now = decision.wake_at_ms
    assert told.now == opened + 300_000
    told.perform(decision)
    assert list(rules.faults(told.facts, 1, even, said=True)) == []


def test_who_closes_sooner_though_nobody_was_heard_breaks_a_rule() -> None:
    told = submitting("ma")
    told.now = told.facts.window("submit", 1).deadline_unix_ms + 1
    told.closed("submit", cause=cycle_pb2.CLOSE_CAUSE_DEADLINE)
    (finding,) = rules.faults(told.facts, 1, even, said=True)
    assert (finding.kind, finding.name) == (cycle_pb2.FINDING_KIND_RULE_EARLY, "submit")


def submitting(*miners: str) -> World:
    """Up to the opening of submit, whose deadline is less than the ceiling."""
    told = World().created().selected().miners(*miners).validators(*VALIDATORS)
    step(told)
    step(told)
    for miner in miners:
        told.trained(miner)
    for validator in VALIDATORS:
        told.seed_committed(validator)
    step(told)
    step(told)
    for miner in miners:
        told.committed(miner)
    step(told)
    told.settled("commit")
    step(told)
    opened = told.facts.window("submit", 1).opened
    assert opened is not None
    return told
