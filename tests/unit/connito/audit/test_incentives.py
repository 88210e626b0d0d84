"""Trust, bonds, ratings, probation and the quota are recomputed; whoever changes one and signs it is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from connito.v1 import cycle_pb2 as c
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import RewardPolicy
from connito.views.ledger import check, entries

from tests.unit.connito.audit.test_audit import look
from tests.unit.connito.audit.world import MINERS, World, tell

POLICY = RewardPolicy(payout="proportional", bond_rate=0.1, validator_share=0.1, probation_cycles=1, probation_pay=0.5)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("incentives"), POLICY)


@pytest.fixture
def world(told: World) -> World:
    return told.copy()


async def test_an_untouched_run_is_the_same(world: World, tmp_path: Path) -> None:
    assert (await look(world, tmp_path)).differences == []


def test_the_story_has_something_of_everything(world: World) -> None:
    facts = world.evidence().facts
    first, second = (facts.scored(cycle) for cycle in (1, 2))
    assert first is not None
    assert second is not None
    assert [v.withheld > 0 for v in first.verdicts if v.reward] == [True, True]
    assert sum(s.reward for s in first.validators) == 100
    assert second.bonded
    assert len(second.miners) == 4
    assert {s.judged for s in second.miners} == {1, 2}
    assert next(s.useful for s in second.miners if s.miner == MINERS["L"]) == 1
    assert [v.withheld for v in second.verdicts if v.origin_cycle == 2 and v.reward] == [0, 0]
    assert check(facts, entries(facts)) == []


@pytest.mark.parametrize(
    ("cycle", "change"),
    [
        (1, lambda m: setattr(m.validators[0], "trust", 0.5)),
        (1, lambda m: setattr(m.validators[0], "agreement", 0.5)),
        (2, lambda m: setattr(m.validators[0], "weight", 2.0)),
        (2, lambda m: m.validators[1].bonds.__setitem__(0, 0.5)),
        (2, lambda m: m.bonded.pop()),
        (1, lambda m: setattr(m.miners[0], "mu", 40.0)),
        (2, lambda m: setattr(m.miners[0], "useful", 9)),
        (1, lambda m: m.verdicts[0].MergeFrom(c.Verdict(reward=540)) or m.verdicts[0].ClearField("withheld")),
        (1, lambda m: setattr(m.validators[0], "reward", m.validators[0].reward + 1)),
    ],
)
async def test_what_the_aggregator_changes_and_signs_is_found(
    world: World, tmp_path: Path, cycle: int, change: Callable[..., Any]
) -> None:
    world.resign(f"merge.{cycle}.scored", change, c.CycleScored)
    found = await look(world, tmp_path)
    assert found.first is not None
    assert (found.first.check, found.first.cycle) == ("verdicts", cycle)


async def test_a_newcomer_is_not_refused_for_a_quota_that_had_a_place(world: World, tmp_path: Path) -> None:
    def refuse(message: c.Refused) -> None:
        message.reason = reasons_pb2.REASON_NEWCOMER_QUOTA

    world.resign("submit.1.refused.{L}-0", refuse, c.Refused)
    found = await look(world, tmp_path)
    assert any("the quota had a place" in difference.what for difference in found.differences)
