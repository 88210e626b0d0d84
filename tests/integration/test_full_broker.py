"""A broker whose disk was full: it says so, and writes again once there is room, by itself."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.bus.lease import Lease
from connito.local import supervisor as supervising
from connito.local.supervisor import Supervisor
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir
from connito.platform.servers import NatsServer
from connito.runtime.waiting import WAITING
from connito.wire.identity import Identity

from tests.support.waiting import PATIENCE, declared, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are set on Linux only"),
]
NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


async def test_a_broker_that_could_not_write_writes_again_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that failed once leaves a stream of this server unwritable, for ever, though there is room again."""
    monkeypatch.setattr(supervising, "_ASK_EVERY", 0.2)
    full, said = True, list[str]()
    monkeypatch.setattr(supervising, "_full", lambda _: full)
    data = DataDir.open(tmp_path / "data")
    accounts = Accounts(data.root)
    accounts.make()
    operator = accounts.welcome("operator", Identity.generate())
    server = NatsServer(data.root / "nats", accounts=accounts)
    supervisor = Supervisor(data, said.append)
    await supervisor.serve(server)
    try:
        async with await Bus.connect(server.url, operator, "test") as bus:
            await declared(bus.js)
            pid = server.pid
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            leading = asyncio.create_task(Lease(bus, "leader").__aenter__())
            await until(lambda: any("cannot write" in line for line in said))
            await until(lambda: any(wait.dependency == "broker" for wait in WAITING.entries()))
            assert "waits: the disk of" in said[-1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, NO_LIMIT)
            assert (server.pid, leading.done()) == (pid, False), "it is not ended before there is room"
            full = False
            async with asyncio.timeout(PATIENCE):
                lease = await leading
            assert server.pid != pid
            assert not [wait for wait in WAITING.entries() if wait.dependency == "broker"]
            await lease.__aexit__(None, None, None)
    finally:
        await supervisor.stop()
