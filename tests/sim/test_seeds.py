"""Two hundred runs that everything possible happens to: each ends, loses nothing, does nothing twice, and audits as the same."""

from __future__ import annotations

import pytest

from tests.sim.checks import trace, wrong_with
from tests.sim.scenarios import storm_of
from tests.sim.world import carry_out, forget

# Not cured yet: a reveal is refused as late beside two paused validators; a run goes on for ever after torn and full disks.
OPEN = {
    111: "an honest reveal is refused as out of its window",
    191: "the run has not ended after 1,200 s",
}


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=pytest.mark.xfail(reason=OPEN[seed], strict=True)) if seed in OPEN else seed
        for seed in range(200)
    ],
)
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
