"""A coordinator on a machine whose clock is half an hour wrong: deadlines are the broker's.

Needs libfaketime (Debian's `libfaketime`), and says so where it is not installed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.platform.servers import NatsServer
from connito.v1 import run_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.integration.test_coordinator import Stage, spec
from tests.integration.witness import ServiceProcess, Witness, guard

LIBRARY = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime to set a process's clock: apt-get install faketime"),
]


@pytest.mark.parametrize("skew", ["-30m", "+30m"])
async def test_a_run_goes_its_way_whatever_the_coordinator_s_clock_says(
    skew: str, own_nats: NatsServer, identities: dict[str, Identity], roster: Roster, tmp_path: Path, run_id: str
) -> None:
    await asyncio.to_thread(guard, own_nats, identities)
    names = ("miner", "selector", "validator", "committer", "aggregator")
    buses = {name: await Bus.connect(own_nats.url, identities[name], name, roster) for name in names}
    env = {
        "CONNITO_NATS_URL": own_nats.url, "LD_PRELOAD": str(LIBRARY), "FAKETIME": skew,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "CONNITO_LOG_FORMAT": "json",
    }  # fmt: skip
    service = ServiceProcess("coordinator", tmp_path / "coordinator", identities["coordinator"], roster, env)
    stage = Stage(buses["committer"], identities, roster, buses)
    try:
        await service.start().ready()
        began = await stage.bus.time()
        # Half an hour of waiting for miners, or for somebody in a window, is over at once on one of these clocks.
        await stage.create(spec(run_id, assemble_seconds=600))
        await stage.assemble(run_id)
        async with Witness.reading(stage.bus, roster, run_id) as witness:
            opened = (await witness.has("train", 1, "opened")).window("train", 1).opened
            assert opened is not None
            assert 0 <= opened.deadline_unix_ms / 1000 - began - 60 <= 30, "the ceiling of 60 s, by the broker's clock"
            await stage.play(witness, run_id, 1)
            facts = await witness.has("run", 0, "ended")
        assert facts.ended is not None
        assert facts.ended.outcome == run_pb2.RUN_OUTCOME_COMPLETED
    finally:
        service.kill()
        for bus in buses.values():
            await bus.close()
