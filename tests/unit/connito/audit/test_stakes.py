"""What votes weigh is in the log: a roster that changes later makes no difference, and nobody counts what is not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from connito.audit.audit import Audit, Options, audit
from connito.audit.evidence import read
from connito.wire.identity import short_key
from connito.wire.roster import Roster

from tests.unit.connito.audit.world import ROSTER, RUN, VALIDATORS, World, tell

QUICK = Options(model=False, tolerance=0.0)
HEAVY = dataclasses.replace(ROSTER, stakes={VALIDATORS["1"]: 5.0})


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


async def look(world: World, folder: Path, roster: Roster = ROSTER) -> Audit:
    return audit(read(RUN, world.records, roster), await world.artifacts(folder), QUICK)


async def test_a_stake_that_changed_since_blames_nobody(told: World, tmp_path: Path) -> None:
    found = await look(told, tmp_path, HEAVY)
    assert (found.differences, found.blame) == ([], [])
    step = next(step for step in found.steps if step.check == "stakes")
    assert step.note == f"the log counts 1 for {short_key(VALIDATORS['1'])}, this roster says 5"


async def test_stakes_as_the_roster_has_them_are_not_worth_a_word(told: World, tmp_path: Path) -> None:
    found = await look(told, tmp_path)
    assert [(step.compared, step.note) for step in found.steps if step.check == "stakes"] == [(3, "")]


async def test_an_operator_that_leaves_a_stake_open_is_named(told: World, tmp_path: Path) -> None:
    world = told.copy()
    del world.records[world.find("run.0.stake.{v2}")]
    found = [one for one in (await look(world, tmp_path)).differences if one.check == "stakes"]
    assert [(one.where, one.by) for one in found] == [(f"run.0.stake.{VALIDATORS['2']}", "operator")]
