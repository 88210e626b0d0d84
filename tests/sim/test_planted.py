"""Every planted bug is found within a few seeds, by a scenario in which the program as it is shows nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim import planted, scenarios
from tests.sim.checks import wrong_with
from tests.sim.planted import handled, with_bus
from tests.sim.world import Scenario, World, carry_out, forget

SEEDS = range(24)
BUGS: dict[str, tuple[type[World], Callable[[int], Scenario]]] = {
    "no compare-and-set": (planted.NoCompare, scenarios.rough),
    "a fact is published twice": (with_bus(planted.PublishTwice), scenarios.rough),
    "acknowledged before it is answered": (planted.AckFirst, scenarios.rough),
    "closed on what happens to be known": (with_bus(planted.StaleEnd), scenarios.rough),
    "gone by the word of a replica": (with_bus(planted.ReplicasWord), scenarios.behind),
    "settled early": (with_bus(planted.SettleEarly), scenarios.outage_once_heard),
    "given up after three deliveries": (with_bus(handled(planted.give_up)), scenarios.outage),
    "a reveal is skipped": (with_bus(handled(planted.skip_one)), scenarios.drift),
    "deadlines by the machine's clock": (with_bus(planted.OwnClock), scenarios.clocks_apart),
    "files are written in their place": (planted.InPlace, scenarios.torn),
    "the ledger is forgotten": (planted.Forgetful, scenarios.brief),
    "records are passed over": (with_bus(planted.Gap), scenarios.rough),
    "the norm is measured from the first state": (planted.FirstState, scenarios.drift),
    "half an upload": (planted.HalfUpload, scenarios.drift),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    world_of, scenario = BUGS[name]
    assert any(found(seed, scenario(seed), world_of) for seed in SEEDS)


def found(seed: int, scenario: Scenario, world_of: type[World]) -> list[str]:
    world = carry_out(seed, scenario, world_of)
    try:
        return wrong_with(world)
    finally:
        forget(world)


@pytest.mark.parametrize(
    "scenario", {scenario for _, scenario in BUGS.values()}, ids=lambda scenario: scenario.__name__
)
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_where_nothing_is_planted(scenario: Callable[[int], Scenario], seed: int) -> None:
    assert found(seed, scenario(seed), World) == []
