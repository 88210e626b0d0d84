"""A service stands aside in a run whose rules are newer than itself."""

from __future__ import annotations

from typing import cast

import pytest
from connito.bus import Bus
from connito.protocol.findings import PROTOCOL_VERSION
from connito.service.engine import Action, Decision, Engine
from connito.v1 import run_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey


@pytest.mark.parametrize(("version", "asked"), [(0, 1), (PROTOCOL_VERSION, 1), (PROTOCOL_VERSION + 1, 0)])
def test_a_run_under_newer_rules_is_left_alone(version: int, asked: int) -> None:
    decided = []

    def decide(facts: RunFacts, _now_ms: int) -> Decision:
        decided.append(facts.run)
        return Decision()

    async def perform(action: Action) -> None:
        raise AssertionError(action)

    log = Log(Roster({}))
    spec = run_pb2.RunSpec(run="r", protocol_version=version)
    facts = log.runs.setdefault("r", RunFacts("r"))
    facts.add(Fact("r", FactKey("run", 0, "created"), run_pb2.RunCreated(spec=spec), "K", "RUNS", 1, 0))
    engine = Engine(cast(Bus, None), log, ("RUNS",), decide, perform)

    engine._decide_run("r", 0)
    engine._decide_run("r", 1)

    assert len(decided) == 2 * asked
