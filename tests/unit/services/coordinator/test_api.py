"""What the API refuses before it writes anything."""

from __future__ import annotations

from typing import cast

import pytest
from connito.bus import Bus
from connito.errors import Invalid
from connito.protocol.findings import PROTOCOL_VERSION
from connito.v1 import services_pb2
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from services.coordinator.api import RunApi
from services.coordinator.state import State
from tests.support.run import RUN, Run


async def test_nobody_enrols_in_a_run_under_newer_rules() -> None:
    state, roster, miner = State(Roster({})), Roster({}), Identity.generate(b"miner".ljust(32))
    state.runs[RUN] = Run().created(protocol_version=PROTOCOL_VERSION + 1).facts
    command = services_pb2.EnrolMinerCommand(run=RUN)
    request = services_pb2.EnrolMinerRequest(envelope=seal(miner, "rpc.EnrolMiner", command))

    with pytest.raises(Invalid, match="upgrade"):
        await RunApi(cast(Bus, None), state, roster, state.changes).EnrolMiner(request, None)
