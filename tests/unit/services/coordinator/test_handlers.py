"""The coordinator's decisions, one situation at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from connito.protocol.beacon import draw_seed
from connito.protocol.rules import deadline_ms
from connito.service.engine import Decision
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.wire.facts import RunFacts
from connito.wire.window import Window

from services.coordinator import expected
from services.coordinator.deadlines import window_ms
from services.coordinator.handlers import CloseWindow, PublishFact, WriteHead, decide
from tests.support.run import RUN, Run, even, secret_of, theta
from tests.unit.services.coordinator.world import World


def only(decision: Decision) -> PublishFact | CloseWindow:
    assert len(decision.actions) == 1
    payload = decision.actions[0].payload
    assert isinstance(payload, PublishFact | CloseWindow)
    return payload


def step(world: World) -> PublishFact | CloseWindow:
    """Decide, do it, and say what it was."""
    decision = decide(world.facts, world.now, even)
    world.perform(decision)
    return only(decision)


def headed(world: World) -> None:
    """The log so far is signed."""
    decision = decide(world.facts, world.now, even)
    assert [action.payload for action in decision.actions] == [WriteHead(world.facts.next_head)]
    world.perform(decision)


def opened(world: World, window: str, cycle: int) -> cycle_pb2.WindowOpened:
    if window == "train":
        headed(world)
    action = step(world)
    assert isinstance(action, PublishFact)
    assert (action.section, action.cycle, action.kind) == (window, cycle, "opened")
    assert isinstance(action.message, cycle_pb2.WindowOpened)
    return action.message


def closed(world: World, window: str, cycle: int) -> cycle_pb2.CloseCause.ValueType:
    action = step(world)
    assert isinstance(action, CloseWindow)
    assert (action.window, action.cycle) == (window, cycle)
    return action.cause


def nothing(world: World) -> int | None:
    """Assert that nothing is due. Returns when to look again."""
    decision = decide(world.facts, world.now, even)
    assert decision.actions == []
    return decision.wake_at_ms


@pytest.fixture
def world() -> World:
    """Selected, with two miners and two validators, first cycle not opened."""
    world = World(min_miners=2, min_validators=2)
    world.created()
    world.selected()
    for name in ("a", "b"):
        world.miners(f"m{name}")
        world.validators(f"v{name}")
    return world


def to_window(world: World, window: str, cycle: int) -> None:
    """Everybody acts at once until `window` of `cycle` is open."""
    for _ in range(200):
        if world.facts.window(window, cycle).opened is not None:
            return
        world.now += 10
        world.perform(decide(world.facts, world.now, even))
        everybody_acts(world)
    raise AssertionError(f"{window} of cycle {cycle} never opened")


def everybody_acts(world: World) -> None:
    cycle = world.facts.cycle
    for miner in world.facts.miners:
        if world.facts.window("train", cycle).opened:
            world.trained(miner, cycle)
        if world.facts.window("commit", cycle).opened and not world.facts.window("commit", cycle).closed:
            world.committed(miner, cycle)
        if world.facts.window("submit", cycle).opened and not world.facts.window("submit", cycle).closed:
            world.submitted(miner, cycle)
    for validator in world.facts.validators:
        if world.facts.window("train", cycle).opened:
            world.seed_committed(validator, cycle)
        if world.facts.window("validate", cycle).opened:
            world.seed_revealed(validator, cycle)
        if world.facts.drawn(cycle) is not None:
            world.reported(validator, cycle)
    for window in ("commit", "submit"):
        world.settled(window, cycle)
    if world.facts.window("merge", cycle).opened:
        world.merged(cycle)


def test_nothing_is_decided_before_a_run_is_created_and_selected() -> None:
    world = World()
    assert nothing(world) is None
    world.created()
    world.miners("ma")
    world.validators("va")
    assert nothing(world) is None


def test_a_failed_selection_ends_the_run_with_its_reason() -> None:
    world = World()
    world.created()
    failed = run_pb2.SelectionFailed(run=RUN, reason=reasons_pb2.REASON_BAD_SPEC, detail="no expert reaches it")
    world.publish("run", 0, "selection_failed", failed)
    action = step(world)
    assert isinstance(action, PublishFact)
    assert action.message == run_pb2.RunEnded(
        run=RUN,
        outcome=run_pb2.RUN_OUTCOME_FAILED,
        reason=reasons_pb2.REASON_BAD_SPEC,
        detail="no expert reaches it",
    )
    headed(world)
    assert nothing(world) is None


def test_a_run_that_does_not_assemble_fails_and_says_who_is_missing() -> None:
    world = World(min_miners=3, min_validators=2)
    world.created()
    world.now += 500_000  # the selection may take its time
    world.selected()
    world.miners("ma")
    assert nothing(world) == world.now + 50_000
    world.now += 50_000
    action = step(world)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, run_pb2.RunEnded)
    assert action.message.reason == reasons_pb2.REASON_TOO_FEW_MINERS
    assert "1 of 3 miners and 0 of 2 validators" in action.message.detail


def test_missing_validators_are_a_missing_quorum(world: World) -> None:
    few = World(min_miners=1, min_validators=2)
    few.created()
    few.selected()
    few.miners("ma")
    few.validators("va")
    few.now += 50_001
    action = step(few)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, run_pb2.RunEnded)
    assert action.message.reason == reasons_pb2.REASON_NO_QUORUM


def test_the_first_cycle_opens_from_the_selection_with_the_ceiling_as_deadline(world: World) -> None:
    message = opened(world, "train", 1)
    assert (message.version, message.state) == (0, theta(0))
    assert list(message.expected) == ["ma", "mb", "va", "vb"]
    assert message.deadline_unix_ms == world.now + 100_000
    assert nothing(world) == message.deadline_unix_ms


def test_train_closes_when_every_miner_trained_and_every_validator_committed_a_seed(world: World) -> None:
    opened(world, "train", 1)
    acts: list[Callable[[], object]] = [
        lambda: world.trained("ma", 1),
        lambda: world.seed_committed("va", 1),
        lambda: world.trained("mb", 1),
        lambda: world.trained("stranger", 1),
    ]
    for act in acts:
        act()
        assert nothing(world) is not None
    world.seed_committed("vb", 1)
    assert closed(world, "train", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    assert world.facts.window("train", 1).closed.stream == "INGRESS"  # type: ignore[union-attr]
    assert list(opened(world, "commit", 1).expected) == ["ma", "mb"]


def test_train_closes_at_the_deadline_without_the_absent() -> None:
    world = World()
    world.created().selected().miners("ma", "mb").validators("va", "vb", "vc")
    deadline = opened(world, "train", 1).deadline_unix_ms
    world.trained("ma", 1)
    world.seed_committed("va", 1).seed_committed("vb", 1)
    world.now = deadline - 1
    assert nothing(world) == deadline
    world.now = deadline
    assert closed(world, "train", 1) == cycle_pb2.CLOSE_CAUSE_DEADLINE
    assert list(opened(world, "commit", 1).expected) == ["ma"]
    world.committed("ma", 1)
    assert closed(world, "commit", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED


def test_a_run_below_quorum_is_paused_and_uses_up_no_cycle(world: World) -> None:
    """A whole day without network; then enough of them come back, a newcomer among them, and the cycle goes on."""
    deadline = opened(world, "train", 1).deadline_unix_ms
    world.trained("ma", 1)
    world.now = deadline
    assert nothing(world) is None, "whoever comes is a fact"
    world.now += 24 * 3600 * 1000
    assert nothing(world) is None
    for validator in ("va", "vb"):
        world.seed_committed(validator, 1)
        assert nothing(world) is None
    world.miners("new")
    assert nothing(world) is None
    world.trained("new", 1)
    assert closed(world, "train", 1) == cycle_pb2.CLOSE_CAUSE_DEADLINE
    assert list(opened(world, "commit", 1).expected) == ["ma", "new"]
    taught = window_ms(world.facts, world.facts.window("train", 1))
    assert taught is not None
    assert taught <= 100_000, "a pause does not teach the deadline of the next cycle"


def test_a_banned_miner_does_not_make_up_the_number(world: World) -> None:
    deadline = opened(world, "train", 1).deadline_unix_ms
    for key in ("a", "b"):
        world.trained(f"m{key}", 1)
        world.seed_committed(f"v{key}", 1)
    world.banned("mb")
    world.now = deadline
    assert nothing(world) is None
    world.banned("mb", 2, lifted=True)
    assert closed(world, "train", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED


def test_those_who_are_expected_having_acted_is_not_enough_below_quorum(world: World) -> None:
    """After an outage only those who were there at its end are named; the others make up the number all the same."""
    opened(world, "train", 1)
    world.trained("ma", 1).trained("mb", 1)
    finish_cycle(world, 1, ["ma"])
    assert list(opened(world, "train", 2).expected) == ["ma", "va", "vb"]
    for who in ("a", "b"):
        world.seed_committed(f"v{who}", 2)
    world.trained("ma", 2)
    assert nothing(world) is not None
    world.trained("mb", 2)
    assert closed(world, "train", 2) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED


def test_a_refused_commitment_is_an_act(world: World) -> None:
    to_window(world, "commit", 1)
    world = fresh_at(world, "commit")
    world.committed("ma", 1)
    refused = cycle_pb2.Refused(run=RUN, cycle=1, miner="mb", ingress_sequence=9)
    assert nothing(world) is not None
    world.publish("commit", 1, "refused", refused, "mb-9")
    assert closed(world, "commit", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED


def fresh_at(world: World, window: str) -> World:
    """The same run with nobody having acted in `window` yet."""
    fresh = World(min_miners=2, min_validators=2, now=world.now)
    for stored in world.log:
        if stored.key.section == window and stored.key.kind != "opened":
            continue
        if stored.key.kind == {"commit": "commitment", "submit": "reveal"}.get(window):
            continue
        fresh.log.append(stored)
        fresh.facts.add(stored)
        fresh.sequences[stored.stream] = stored.sequence
    return fresh


def test_commit_and_submit_wait_for_the_committer_to_settle(world: World) -> None:
    to_window(world, "commit", 1)
    everybody_acts(world)
    assert closed(world, "commit", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    assert nothing(world) is None
    world.settled("commit", 1)
    assert list(opened(world, "submit", 1).expected) == ["ma", "mb"]
    world.submitted("ma", 1)
    assert nothing(world) is not None
    world.submitted("mb", 1)
    assert closed(world, "submit", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    assert nothing(world) is None
    world.settled("submit", 1)
    assert list(opened(world, "validate", 1).expected) == ["va", "vb"]


def test_the_seed_is_drawn_from_all_reveals_and_reports_close_the_window(world: World) -> None:
    to_window(world, "validate", 1)
    world = fresh_at(world, "validate")
    world.seed_revealed("va", 1)
    assert nothing(world) is not None
    world.seed_revealed("vb", 1)
    action = step(world)
    assert isinstance(action, PublishFact)
    assert action.message == cycle_pb2.SeedDrawn(
        run=RUN,
        cycle=1,
        seed=draw_seed(RUN, 1, {v: secret_of(v, 1) for v in ("va", "vb")}),
        last_sequence=3,
        validators=["va", "vb"],
    )
    world.reported("va", 1)
    assert nothing(world) is not None
    world.reported("vb", 1)
    assert closed(world, "validate", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    assert world.facts.window("validate", 1).closed.stream == "VALIDATE"  # type: ignore[union-attr]


def quorum_of_one(validators: int) -> World:
    world = World(min_miners=1, min_validators=1)
    world.created()
    world.selected()
    world.miners("ma")
    for index in range(validators):
        world.validators(f"v{index}")
    to_window(world, "validate", 1)
    fresh = fresh_at(world, "validate")
    fresh.min_validators = 1
    return fresh


def test_half_way_the_seed_is_drawn_without_the_silent() -> None:
    world = quorum_of_one(validators=3)
    start = world.facts.window("validate", 1).opened_fact
    assert start is not None
    assert isinstance(start.message, cycle_pb2.WindowOpened)
    world.seed_revealed("v0", 1).seed_revealed("v1", 1)
    half = start.time_unix_ms + (start.message.deadline_unix_ms - start.time_unix_ms) // 2
    assert nothing(world) == half
    world.now = half
    action = step(world)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, cycle_pb2.SeedDrawn)
    assert (list(action.message.validators), list(action.message.omitted)) == (["v0", "v1"], ["v2"])


def test_a_reveal_that_was_not_committed_to_is_left_out() -> None:
    world = quorum_of_one(validators=3)
    world.seed_revealed("v0", 1).seed_revealed("v1", 1)
    world.seed_revealed("v2", 1, b"x" * 32)
    action = step(world)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, cycle_pb2.SeedDrawn)
    assert (list(action.message.validators), list(action.message.omitted)) == (["v0", "v1"], ["v2"])


def test_a_seed_committed_after_the_reveals_began_cannot_enter_the_draw() -> None:
    world = quorum_of_one(validators=1)
    world.validators("v9")
    world.seed_committed("v9", 1)
    world.seed_revealed("v9", 1)
    assert nothing(world) is not None, "v0 has not revealed, and v9 is no substitute"
    world.seed_revealed("v0", 1)
    action = step(world)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, cycle_pb2.SeedDrawn)
    assert list(action.message.validators) == ["v0"]


def test_below_quorum_the_window_closes_at_the_deadline_without_a_draw(world: World) -> None:
    to_window(world, "validate", 1)
    world = fresh_at(world, "validate")
    world.seed_revealed("va", 1)
    deadline = deadline_ms(world.facts, world.facts.window("validate", 1))
    world.now = deadline - 1
    assert nothing(world) == deadline
    world.now = deadline
    assert closed(world, "validate", 1) == cycle_pb2.CLOSE_CAUSE_DEADLINE
    assert world.facts.drawn(1) is None
    opened(world, "merge", 1)


def test_a_quorum_that_has_become_impossible_is_not_waited_for(world: World) -> None:
    to_window(world, "validate", 1)
    world = fresh_at(world, "validate")
    world.seed_revealed("va", 1)
    world.seed_revealed("vb", 1, b"x" * 32)
    assert closed(world, "validate", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED


def test_a_draw_after_an_outage_leaves_time_to_score() -> None:
    world = quorum_of_one(validators=1)
    start = world.facts.window("validate", 1).opened_fact
    assert start is not None
    assert isinstance(start.message, cycle_pb2.WindowOpened)
    span = start.message.deadline_unix_ms - start.time_unix_ms
    world.seed_revealed("v0", 1)
    world.now = start.message.deadline_unix_ms + 5 * span
    assert step(world).kind == "drawn"  # type: ignore[union-attr]
    assert nothing(world) == world.now + span // 2


def test_merge_has_no_deadline_and_the_next_cycle_starts_from_the_version(world: World) -> None:
    to_window(world, "merge", 1)
    world = fresh_at(world, "merge")
    assert world.facts.window("merge", 1).opened.deadline_unix_ms == 0  # type: ignore[union-attr]
    world.now += 10**9
    assert nothing(world) is None
    world.merged(1)
    assert closed(world, "merge", 1) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    message = opened(world, "train", 2)
    assert (message.version, message.state) == (1, theta(1))


def test_after_the_last_cycle_the_run_is_completed(world: World) -> None:
    to_window(world, "merge", 2)
    everybody_acts(world)
    assert closed(world, "merge", 2) == cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    action = step(world)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, run_pb2.RunEnded)
    assert (action.message.outcome, action.message.final_version) == (run_pb2.RUN_OUTCOME_COMPLETED, 2)
    assert action.message.detail == "2 of 2 cycles done"
    headed(world)
    assert nothing(world) is None


def ended_after_one_cycle(world: World) -> run_pb2.RunEnded:
    world.created()
    world.selected()
    world.miners("ma")
    world.validators("va")
    to_window(world, "merge", 1)
    everybody_acts(world)
    closed(world, "merge", 1)
    action = step(world)
    assert isinstance(action, PublishFact)
    assert isinstance(action.message, run_pb2.RunEnded)
    return action.message


def test_one_cycle_is_not_cycles() -> None:
    assert ended_after_one_cycle(World(cycles=1)).detail == "1 of 1 cycle done"


def test_a_run_ends_when_its_objective_is_met() -> None:
    message = ended_after_one_cycle(World(improvement=0.5))
    assert (message.outcome, message.final_version) == (run_pb2.RUN_OUTCOME_COMPLETED, 1)
    assert "the objective is met after cycle 1 of 2" in message.detail


def test_a_cancelled_run_is_left_alone(world: World) -> None:
    opened(world, "train", 1)
    world.ended(run_pb2.RUN_OUTCOME_CANCELLED)
    headed(world)
    world.now += 10**9
    assert nothing(world) is None


def test_a_miner_that_went_away_is_waited_for_once_and_a_new_one_is_expected() -> None:
    world = World(cycles=4)
    world.created()
    world.selected()
    for miner in ("gone", "stays"):
        world.miners(miner)
    world.validators("v0")
    assert "gone" in opened(world, "train", 1).expected
    world.miners("new")
    for cycle in (1, 2):
        finish_cycle(world, cycle, ["stays"] if cycle == 1 else ["stays", "new"])
    assert list(world.facts.window("train", 2).opened.expected) == ["new", "stays", "v0"]  # type: ignore[union-attr]
    assert list(opened(world, "train", 3).expected) == ["new", "stays", "v0"]


def finish_cycle(world: World, cycle: int, miners: list[str]) -> None:
    """Run a cycle in which only `miners` act; ends with the merge window closed."""
    for _ in range(100):
        decision = decide(world.facts, world.now, even)
        if world.facts.window("merge", cycle).closed is not None:
            return
        world.perform(decision)
        if decision.actions == [] and decision.wake_at_ms is not None:
            world.now = decision.wake_at_ms
        world.now += 1
        facts = world.facts
        for miner in miners:
            if facts.window("train", cycle).opened:
                world.trained(miner, cycle)
            if facts.window("commit", cycle).opened and not facts.window("commit", cycle).closed:
                world.committed(miner, cycle)
            if facts.window("submit", cycle).opened and not facts.window("submit", cycle).closed:
                world.submitted(miner, cycle)
        for validator in facts.validators:
            if facts.window("train", cycle).opened:
                world.seed_committed(validator, cycle)
            if facts.window("validate", cycle).opened:
                world.seed_revealed(validator, cycle)
            if facts.drawn(cycle) is not None:
                world.reported(validator, cycle)
        world.settled("commit", cycle)
        world.settled("submit", cycle)
        if facts.window("merge", cycle).opened:
            world.merged(cycle)
    raise AssertionError(f"cycle {cycle} did not finish")


def test_when_nobody_would_be_expected_everyone_gets_another_chance() -> None:
    world = World(cycles=3, min_miners=1)
    world.created()
    world.selected()
    world.miners("ma")
    world.validators("v0")
    opened(world, "train", 1)
    world.trained("ma")
    finish_cycle(world, 1, [])
    assert list(opened(world, "train", 2).expected) == ["ma", "v0"]


# Streams are read side by side: a replica may know of a window's opening and not yet of what came before it.


def without(world: World, *streams: str) -> World:
    """The same run as a replica sees it that has not read `streams` beyond what starts a run."""
    lagging = World(min_miners=2, min_validators=2, now=world.now)
    for stored in world.log:
        if stored.stream not in streams or stored.key.kind in ("created", "selected", "opened", "closed"):
            lagging.facts.add(stored)
    return lagging


def test_an_expected_miner_whose_enrolment_was_not_read_yet_has_not_acted(world: World) -> None:
    opened(world, "train", 1)
    assert nothing(without(world, "RUNS")) is not None


def test_a_commit_window_does_not_close_because_nobody_is_known_to_have_trained(world: World) -> None:
    to_window(world, "commit", 1)
    world = fresh_at(world, "commit")
    assert nothing(without(world, "INGRESS")) is not None


def test_a_secret_whose_commitment_was_not_read_yet_is_not_left_out_of_the_draw(world: World) -> None:
    to_window(world, "validate", 1)
    world = fresh_at(world, "validate")
    for validator in ("va", "vb"):
        world.seed_revealed(validator, 1)
    assert nothing(without(world, "TRAIN")) is not None
    assert step(world).kind == "drawn"  # type: ignore[union-attr]


def test_a_newcomer_is_one_whom_no_cycle_named_without_a_look_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    run, looked = Run().created(windows={"min_validators": 1}), list[int]()
    run.selected().miners("a", "b").validators("v")
    for cycle in range(1, 41):
        run.opened("train", cycle, ["a", "v"] if cycle > 1 else ["a", "b", "v"])
        run.closed("commit", cycle).settled("commit", cycle, committed=["a"])
        if cycle == 40:
            run.miners("late")
    run.say("run", 41, "head")
    window = RunFacts.window

    def look(facts: RunFacts, name: str, cycle: int) -> Window:
        looked.append(cycle)
        return window(facts, name, cycle)

    monkeypatch.setattr(RunFacts, "window", look)
    # Who was named once and never came is no newcomer, however long ago that was.
    assert expected.named(run.facts, run.facts.next_train, even) == ["a", "late", "v"]
    assert set(looked) == {40}
    # Of one that was banned for a while, its cycles tell it.
    run.banned("b").banned("b", 2, lifted=True)
    assert expected.named(run.facts, run.facts.next_train, even) == ["a", "late", "v"]
    assert set(looked) == set(range(1, 41))
