"""Faults that were once found, each as the run in which it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim import scenarios
from tests.sim.checks import wrong_with
from tests.sim.world import Scenario, carry_out, forget

FINDINGS: dict[str, Callable[[int], Scenario]] = {
    "the norm of a submission is measured from its own cycle": scenarios.drift,
    "an object that comes back is no verdict": scenarios.lost_object,
    "a full disk is no verdict": scenarios.full_disk,
    "an acknowledged reveal outlives any outage of the store": scenarios.long_outage,
    "clocks decide nothing": scenarios.clocks_apart,
    "a standby outlives elections": scenarios.elections,
    "an address leads to who lives": scenarios.api_gone,
    "a run waits for its miners": scenarios.nobody_there,
    "a stake that changes changes no judge of a run": scenarios.stakes_change,
    "a cache gives out what was put in": scenarios.cached_rot,
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_was_found_stays_cured(name: str) -> None:
    world = carry_out(1, FINDINGS[name](1))
    try:
        assert wrong_with(world) == []
    finally:
        forget(world)
