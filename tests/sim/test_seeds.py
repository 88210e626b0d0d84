"""Two hundred runs that everything possible happens to: each ends, loses nothing, does nothing twice, and audits as the same."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.sim.checks import trace, wrong_with
from tests.sim.scenarios import storm_of
from tests.sim.world import carry_out, forget


@pytest.mark.parametrize("seed", range(200))
def test_a_storm_loses_nothing(seed: int) -> None:
    world = carry_out(seed, storm_of(seed))
    try:
        assert wrong_with(world) == [], world.faults
    finally:
        forget(world)


@pytest.mark.parametrize("seed", [3, 8])
def test_the_same_seed_is_the_same_run(seed: int) -> None:
    traces = []
    for _ in range(2):
        world = carry_out(seed, storm_of(seed))
        traces.append((trace(world), world.faults, world.kills, world.loop.now))
        forget(world)
    assert traces[0] == traces[1]


def test_processes_that_were_killed_leave_no_file_open() -> None:
    """A thousand storms in one process would run out of them."""
    opened = []
    for seed in (3, 8, 3):
        forget(carry_out(seed, storm_of(seed)))
        gc.collect()
        opened.append(len([*Path("/proc/self/fd").iterdir()]))
    assert opened[0] == opened[1] == opened[2]
