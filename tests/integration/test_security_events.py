"""Offences reach the operator: a denied subject, a bad signature and a poisoned message id, through a real broker."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.bus.offences import collect
from connito.client.security import _violations
from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer
from connito.service import security
from connito.v1 import run_pb2
from connito.v1.cycle_pb2 import SecurityEvent
from connito.wire.envelope import open_bytes
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.support.waiting import PATIENCE, declared

pytestmark = pytest.mark.integration


async def events(bus: Bus, wanted: int) -> list[SecurityEvent]:
    found = []
    async with asyncio.timeout(PATIENCE), aclosing(bus.follow(("ADVISORIES",))) as records:
        async for item in records:
            if isinstance(item, Record):
                found.append(open_bytes(item.data, item.subject).read(SecurityEvent))
                if len(found) == wanted:
                    break
    return found


async def test_offences_are_written_to_advisories(
    tmp_path: Path, identities: dict[str, Identity], roster: Roster, run_id: str
) -> None:
    accounts = Accounts(tmp_path / "accounts")
    accounts.make()
    everybody = {**identities, "operator": Identity.generate()}
    people = {role: accounts.welcome(role, who) for role, who in everybody.items()}
    collect()
    with NatsServer(tmp_path / "nats", accounts=accounts) as server:
        operator = await Bus.connect(server.url, people["operator"], "operator", roster)
        await declared(operator.js)
        committer = await Bus.connect(server.url, people["committer"], "committer", roster)
        miner = await Bus.connect(server.url, people["miner"], "miner", roster)
        created = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run_id))
        # The id is the hash of what is sent: whoever saw it on the wire could say it first.
        subject = f"connito.v1.{run_id}.run.0.created"
        coordinator = await Bus.connect(server.url, people["coordinator"], "coordinator", roster)
        data = coordinator._sealed(subject, created)
        poison = f"connito.v1.{run_id}.run.0.ended"
        header = {"Nats-Msg-Id": hashlib.sha256(data).hexdigest()}
        await operator.connection.request(poison, b"poison", header)
        await coordinator._publish(subject, data, {}, "test")
        stored = await operator.last_record(subject)
        assert stored is not None, "a poisoned id does not keep a message out"
        assert stored.data == data
        reporting = asyncio.create_task(security.publish(committer, "committer", 0.05))
        (poisoned,) = await events(operator, 1)
        assert (poisoned.kind, poisoned.service, poisoned.subject) == ("unexpected_duplicate", "committer", subject)
        for _ in range(3):
            with pytest.raises(Invalid, match="does not let"):
                await committer.publish_fact(run_id, "run", 0, "created", created)
        found = await events(operator, 2)
        assert found[1].kind == "denied"
        assert found[1].key == people["committer"].public
        with pytest.raises(Invalid, match="does not let"):
            await miner.publish_fact(run_id, "run", 0, "created", created)
        with pytest.raises(Invalid, match="does not let"):
            await miner.publish_security(SecurityEvent(kind="denied"))
        reporting.cancel()
        with suppress(asyncio.CancelledError):
            await reporting
        for bus in (committer, coordinator, miner, operator):
            await bus.close()
        rows = _violations(tmp_path / "nats" / "nats-server.log", 0)
    assert {row["key"] for row in rows} == {people["committer"].public, people["miner"].public}
    # To report what others did is no offence of the one who may not report.
    assert not any(str(row["subject"]).startswith("connito.security.") for row in rows), json.dumps(rows)
    assert any(row["subject"] == subject and row["count"] == 3 for row in rows), json.dumps(rows)
