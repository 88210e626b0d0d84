"""Who is here in a paused run, as `connito status` reads it: what miners say of their training is in INGRESS alone."""

from __future__ import annotations

import pytest
from connito.client import runs
from connito.protocol.policy.check import complete
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration.conftest import BusFactory
from tests.integration.test_coordinator import spec
from tests.support.run import enrolment

pytestmark = pytest.mark.integration


class Session:
    """A session of an operator elsewhere."""

    data = None

    def __init__(self, bus: object, roster: Roster) -> None:
        self._bus, self.roster = bus, roster

    def bus(self) -> Session:
        return self

    async def __aenter__(self) -> object:
        return self._bus

    async def __aexit__(self, *_: object) -> None:
        pass


async def test_miners_that_trained_are_here(
    bus_factory: BusFactory, identities: dict[str, Identity], roster: Roster, run_id: str
) -> None:
    buses = {name: await bus_factory(identities[name]) for name in ("coordinator", "validator", "selector", "miner")}
    miner, validator = identities["miner"].public, identities["validator"].public
    publish = buses["coordinator"].publish_fact
    full = complete(spec(run_id, min_validators=2), identities["customer"].public)
    await publish(run_id, "run", 0, "created", run_pb2.RunCreated(spec=full))
    await publish(run_id, "run", 0, "miner", enrolment(run_id, identities["miner"]), miner)
    joined = run_pb2.ValidatorJoined(run=run_id, validator=validator)
    await buses["validator"].publish_fact(run_id, "run", 0, "validator", joined, validator)
    selected = run_pb2.SelectionMade(run=run_id, initial_state=full.base.manifest)
    await buses["selector"].publish_fact(run_id, "run", 0, "selected", selected)
    opened = cycle_pb2.WindowOpened(
        run=run_id, cycle=1, window=cycle_pb2.WINDOW_TRAIN, deadline_unix_ms=1, expected=[miner, validator]
    )
    await publish(run_id, "train", 1, "opened", opened)
    await buses["miner"].publish_ingress(run_id, "trained", cycle_pb2.TrainingFinished(run=run_id, cycle=1))
    facts = await runs._newest(Session(buses["coordinator"], roster), run_id)  # type: ignore[arg-type]
    assert facts is not None
    shown = runs._run(facts, roster.stake)
    assert shown["phase"] == "cycle 1 of 1: paused, 1 of 1 miner and 0 of 2 validators here"
