"""What the API refuses before it writes anything."""

from __future__ import annotations

from typing import cast

import pytest
from connito.bus import Bus
from connito.errors import Invalid
from connito.protocol.findings import PROTOCOL_VERSION
from connito.runtime.limits import RateLimit
from connito.v1 import reasons_pb2, services_pb2
from connito.wire import passes
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


async def test_nobody_enrols_whom_nobody_admitted() -> None:
    """However many fresh keys somebody makes: each is refused before anything is kept about it."""
    admits = passes.Authority.generate(passes.ACCOUNT)
    state, roster = State(Roster({})), Roster({}, admits={admits.public})
    state.runs[RUN] = Run().created(protocol_version=PROTOCOL_VERSION + 1).facts
    limit = RateLimit(1.0, 1.0, lambda: 0.0)
    api = RunApi(cast(Bus, None), state, roster, state.changes, limit)
    command = services_pb2.EnrolMinerCommand(run=RUN)
    for number in range(20):
        miner, other = Identity.generate(bytes([number + 1]) * 32), Identity.generate(bytes([100 + number]) * 32)
        for token in ("", "x.y.z", admits.sign(other.public, "miners-say", "user", {}, 1)):
            envelope = seal(miner, "rpc.EnrolMiner", command)
            request = services_pb2.EnrolMinerRequest(envelope=envelope, admission=token)
            with pytest.raises(Invalid, match="has no pass of this installation") as caught:
                await api.EnrolMiner(request, None)
            assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED
    admitted = services_pb2.EnrolMinerRequest(
        envelope=seal(miner, "rpc.EnrolMiner", command),
        admission=admits.sign(miner.public, "miners-say", "user", {}, 1),
    )
    with pytest.raises(Invalid, match="upgrade"):
        await api.EnrolMiner(admitted, None)
