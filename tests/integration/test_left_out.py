"""A miner's own actions, a real broker, and an operator that leaves out what a miner says: unstored, or behind its receipt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.bus.streams import STREAMS
from connito.platform.servers import NatsServer
from connito.service.engine import Action
from connito.v1 import run_pb2
from connito.wire.checkpoint import Checkpoint
from connito.wire.heads import ingress_origin_of, leaf_of
from connito.wire.identity import Identity
from connito.wire.merkle import Tree
from connito.wire.roster import Roster
from connito.wire.subjects import ingress

from services.trainer.actions import Miner
from services.trainer.handlers import Commit, KeepReceipt, ReportTrained
from services.trainer.state import Ledger
from services.trainer.strategy import HONEST
from tests.integration.tiny_run import Teller, telling
from tests.support.run import Run, ordered

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CUSTOMER = Identity.generate()


async def give_receipt(teller: Teller, number: int, last: int) -> None:
    """What the committer signs: everything in INGRESS, up to a sequence that it claims to have read."""
    bus, said = teller.buses["committer"], Tree()
    async for record in bus.stored(["INGRESS"], teller.run):
        said.append(leaf_of(record))
    checkpoint = Checkpoint(ingress_origin_of(teller.facts), said.size, said.root).signed(bus.identity)
    given = run_pb2.IngressHead(run=teller.run, cycle=number, checkpoint=checkpoint.note, last_sequence=last)
    await teller.say("run", number, "received", given, role="committer")


async def acknowledge_and_store_nothing(bus: Bus, subject: str) -> Any:
    """Take a subject out of the stream, and answer who publishes there as the broker does."""

    async def answer(msg: Any) -> None:
        if msg.reply:
            await nc.publish(msg.reply, json.dumps({"stream": "INGRESS", "seq": 1}).encode())

    kinds = [STREAMS["INGRESS"].filter().removesuffix("*") + kind for kind in ("commitment", "reveal")]
    nc = bus.connection.nc
    told = json.loads((await nc.request("$JS.API.STREAM.INFO.INGRESS", b"")).data)["config"]
    changed = await nc.request("$JS.API.STREAM.UPDATE.INGRESS", json.dumps({**told, "subjects": kinds}).encode())
    assert "error" not in json.loads(changed.data)
    return await nc.subscribe(subject, cb=answer)


def audit(run: str, receipt: Path, url: str, home: Path) -> tuple[int, list[dict[str, Any]]]:
    """Look with the miner's own key at the log that is there."""
    env = {
        **os.environ,
        "CONNITO_NATS_URL": url,
        "CONNITO_KEY_FILE": f"{home}/key",
        "CONNITO_ROSTER": f"{home}/roster.json",
    }
    command = [
        str(Path(sys.executable).parent / "connito"),
        "audit",
        run,
        "--log-only",
        "--json",
        "--receipt",
        str(receipt),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, json.JSONDecoder().raw_decode(done.stdout)[0]["differences"]


async def test_no_receipt_for_what_was_not_stored_and_one_that_proves_what_was_lost(
    own_nats: NatsServer, bus_factory: Any, identities: dict[str, Identity], roster: Roster, run_id: str, tmp_path: Path
) -> None:
    buses = {role: await bus_factory(identities[role], own_nats.url) for role in ("coordinator", "committer")}
    me, ledger = Identity.generate(), Ledger(tmp_path / "work", "of this miner")
    me.save(tmp_path / "key")
    roster.save(tmp_path / "roster.json")
    kept = tmp_path / "work" / run_id / "receipts"
    async with telling(run_id, buses, roster) as teller:
        nobody = cast(Any, None)
        miner = Miner(
            await bus_factory(me, own_nats.url), nobody, nobody, ledger, nobody, HONEST, lambda run: teller.facts
        )

        async def do(step: object) -> None:
            await miner.perform(Action("", run_id, step))

        ledger.update(run_id, 1, steps=1, tokens=1, commitment="ab" * 32)
        await teller.say("run", 0, "created", ordered(Run(name=run_id).spec(), CUSTOMER))
        await teller.until(lambda facts: facts.spec, "the run")
        deaf = await acknowledge_and_store_nothing(buses["committer"], ingress(run_id, me.public, "trained"))
        await do(ReportTrained(1))
        assert ledger.cycle(run_id, 1).unreceipted == (1,)
        await give_receipt(teller, 1, 1)
        await teller.has("run", 1, "received")
        await do(KeepReceipt())
        assert not kept.exists()
        assert ledger.cycle(run_id, 1).told == ("left-out-1",)
        await deaf.unsubscribe()

        await do(Commit(1))
        facts = await teller.until(lambda facts: facts.has("ingress", 1, "commitment", me.public), "the commitment")
        said = facts.fact("ingress", 1, "commitment", me.public)
        assert said is not None
        await give_receipt(teller, 2, said.sequence)
        await teller.has("run", 2, "received")
        await do(KeepReceipt())
        (receipt,) = kept.iterdir()
        # A run of no cycle has other faults in an audit too.
        found = audit(run_id, receipt, own_nats.url, tmp_path)[1]
        assert "history" not in {one["check"] for one in found}
        await buses["committer"].js.purge_stream("INGRESS", subject=ingress(run_id, me.public, "commitment"))
        code, found = audit(run_id, receipt, own_nats.url, tmp_path)
        assert (code, [one["by"] for one in found if one["check"] == "history"]) == (6, ["operator"])
