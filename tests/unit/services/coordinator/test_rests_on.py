"""What a fact says does not depend on streams that are not looked up before it, however far behind they were read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
from connito.service.engine import Action
from connito.wire.facts import RunFacts

from services.coordinator.actions import RESTS_ON, STREAMS, rests_on
from services.coordinator.handlers import CloseWindow, PublishFact, WriteHead, decide
from tests.support.run import even
from tests.unit.services.coordinator.test_handlers import everybody_acts
from tests.unit.services.coordinator.world import World


def lagging(world: World, streams: Sequence[str], by: int) -> RunFacts:
    """Return the facts without the last `by` of each of these streams."""
    facts = RunFacts(world.name)
    for stored in world.log:
        if stored.stream not in streams or stored.sequence <= world.last(stored.stream) - by:
            facts.add(stored)
    return facts


def differing(world: World, action: Action, looked_up: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield which stream, read how far behind, would have another fact be written in the same place."""
    others = [stream for stream in STREAMS if stream not in looked_up]
    for behind, by in product([*([one] for one in others), others], (1, 2, 3, 5, 1000)):
        for again in decide(lagging(world, behind, by), world.now, even).actions:
            if again.key == action.key and again.payload != action.payload:
                yield "+".join(behind), by


def whole_run(world: World, absent: bool) -> Iterator[Action]:
    """Yield every action of a run of three cycles before it is performed; `absent`: somebody is away, and comes late."""
    world.created()
    world.selected()
    for name in ("a", "b", "c"):
        world.miners(f"m{name}")
        world.say("run", 0, "validator", validator=f"v{name}")
    for _ in range(400):
        world.now += 10
        decision = decide(world.facts, world.now, even)
        yield from decision.actions
        world.perform(decision)
        if world.facts.ended is not None:
            return
        if absent and world.facts.cycle == 2:
            # Nobody acts in this step: windows run into their deadlines.
            world.now += 40_000
            decision = decide(world.facts, world.now, even)
            yield from decision.actions
            world.perform(decision)
        everybody_acts(world)
    raise AssertionError("the run does not end")


@pytest.mark.parametrize("absent", [False, True])
def test_a_fact_is_the_same_however_far_the_other_streams_were_read(absent: bool) -> None:
    world, seen = World(cycles=3, min_miners=2, min_validators=2), set[tuple[str, str]]()
    for action in whole_run(world, absent):
        assert list(differing(world, action, rests_on(action.payload))) == [], action.key
        match action.payload:
            case PublishFact(section, _, kind):
                seen.add((section, kind))
            case CloseWindow(window, _, _, _):
                seen.add((window, "closed"))
    assert set(RESTS_ON) <= seen


def test_too_few_streams_would_be_noticed() -> None:
    world, noticed = World(cycles=3, min_miners=2, min_validators=2), set[str]()
    for action in whole_run(world, absent=True):
        if list(differing(world, action, ())):
            noticed.add(type(action.payload).__name__)
    assert noticed >= {"PublishFact"}


def test_a_close_looks_up_the_stream_that_it_cuts() -> None:
    for window, stream in {
        "train": "INGRESS",
        "commit": "INGRESS",
        "submit": "INGRESS",
        "validate": "VALIDATE",
    }.items():
        assert {stream, "RUNS"} <= set(RESTS_ON[window, "closed"])


def test_whatever_covers_the_whole_log_looks_up_all_of_it() -> None:
    assert rests_on(WriteHead(1)) == STREAMS
