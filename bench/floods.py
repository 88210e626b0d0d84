"""Measure what a flood by one key costs others: the time until an honest commitment is stored and answered, with it and without.

A real broker and store, and a committer as a process of its own. Each flood is one key's, at a thousand messages a second over
two connections, until the committer has it shut out or ten seconds are over; honest keys commit meanwhile, one after the
other. `readers`: so many keys connect at once and read all there is. `committer` is its own processor time between saying
and reading the answer: what is beyond it is waiting, for the broker's disk or for the processor.

    python -m bench.floods --quick
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from connito.bus import Bus, CaughtUp
from connito.errors import Retry
from connito.platform.servers import NatsServer, ObjectStore
from connito.store import ArtifactStore
from connito.v1.artifacts_pb2 import REALM_PUBLIC
from connito.wire.identity import Identity
from connito.wire.roster import ROLES, Roster
from safetensors.numpy import save

from bench.harness import Options, Result, main, note
from tests.integration import test_floods as floods
from tests.integration.conftest import declare_streams
from tests.integration.test_committer import STATE, Miner, Stage
from tests.integration.witness import ServiceProcess, guard

HONEST, SECONDS, SIZE = 12, 10.0, 4000
READERS, QUICK_READERS = 500, 50
KINDS = {"miner": floods.as_miner, "validator": floods.as_validator, "reports": floods.telling}


def run(options: Options) -> Result:
    """Measure each kind of flood on a platform of its own."""
    readers = QUICK_READERS if options.quick else READERS
    kinds = [
        kind for kind in ("quiet", *KINDS, "readers") if any(word in kind for word in options.only.split() or [""])
    ]
    rows = [asyncio.run(_row(kind, seed, readers)) for seed in range(options.seeds) for kind in kinds]
    settings = {"honest": HONEST, "rate": floods.RATE, "bytes": SIZE, "seconds": SECONDS, "readers": readers}
    return Result(settings, rows, {row["kind"]: _told(row) for row in rows})


def _told(row: dict[str, Any]) -> str:
    most = max(stored + judged for stored, judged, _ in row["answered"])
    within = sum(stored + judged <= 0.5 for stored, judged, _ in row["answered"])
    worked = max(worked for _, _, worked in row["answered"])
    return f"{within} of {len(row['answered'])} in 0.5 s, the last in {most:.2f} s (committer {worked:.2f} s); {row['did']}"


async def _row(kind: str, seed: int, readers: int) -> dict[str, Any]:
    note(f"{kind}, seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        async with _platform(Path(folder)) as (server, stage, process, miners, keys, validator):
            await stage.begin(*miners)
            await stage.to_commit(1)
            work = asyncio.create_task(_load(kind, server, keys[-readers:], validator))
            await asyncio.sleep(0.5)
            answered = [await floods.accepted(miner, stage.run, process) for miner in miners]
            return {"kind": kind, "seed": seed, "answered": answered, "did": await work}


async def _load(kind: str, server: NatsServer, keys: list[Identity], validator: Identity) -> dict[str, Any]:
    if kind == "quiet":
        return {}
    began = time.monotonic()
    if kind == "readers":
        again = await asyncio.gather(*(_read(server, key) for key in keys))
        return {"came again": sum(again), "over after": round(time.monotonic() - began, 2)}
    loud = keys[-1] if kind == "miner" else validator
    data = [floods.said(KINDS[kind](loud.public, number), bytes(SIZE)) for number in range(1, floods.RATE)]
    orders = floods.ordered(loud, server, data, lines=2, reads=False) | {"seconds": SECONDS, "once": True}
    out, _ = await (await floods.let_loose(orders)).communicate()
    return {**json.loads(out), "over after": round(time.monotonic() - began, 2)}


async def _read(server: NatsServer, key: Identity) -> int:
    """Read all there is, like a miner that starts; return how often the broker let it wait and it came again."""
    for again in itertools.count():
        with suppress(Retry):
            async with await Bus.connect(server.url, key, "miner") as bus, aclosing(bus.follow(["RUNS"])) as items:
                async for item in items:
                    if isinstance(item, CaughtUp):
                        return again
    raise AssertionError("never read")


@asynccontextmanager
async def _platform(
    folder: Path,
) -> AsyncIterator[tuple[NatsServer, Stage, psutil.Process, list[Miner], list[Identity], Identity]]:
    identities = {role: Identity.generate() for role in (*ROLES, "operator")}
    roster = Roster({role: frozenset({identities[role].public}) for role in ROLES})
    keys = [Identity.generate() for _ in range(HONEST + READERS)]
    async with AsyncExitStack() as stack:
        server = await asyncio.to_thread(stack.enter_context, NatsServer(folder / "nats"))
        await declare_streams(server.url)
        await asyncio.to_thread(guard, server, identities, keys)
        objects = await asyncio.to_thread(stack.enter_context, ObjectStore(folder / "weed"))
        store = ArtifactStore(
            objects.url, objects.access_key, objects.secret_key, "bench", "us-east-1", folder / "cache"
        )
        await store.ensure_bucket()
        theta = await store.put_bytes(save(STATE), "application/octet-stream", REALM_PUBLIC)
        env = {"NATS_URL": server.url, "S3_ENDPOINT": objects.url, "S3_ACCESS_KEY": objects.access_key,
               "S3_SECRET_KEY": objects.secret_key, "S3_BUCKET": store.bucket}  # fmt: skip
        named = {f"CONNITO_{name}": value for name, value in env.items()}
        committer = ServiceProcess("committer", folder / "committer", identities["committer"], roster, named).start()
        stack.callback(committer.kill)
        await committer.ready()
        assert committer.process is not None
        coordinator, selector = [
            await stack.enter_async_context(await Bus.connect(server.url, identities[role], role, roster))
            for role in ("coordinator", "selector")
        ]
        stage = Stage("bench", theta, store, coordinator, selector)
        buses = [await stack.enter_async_context(await Bus.connect(server.url, key, "miner")) for key in keys[:HONEST]]
        miners = [Miner(stage, key, bus) for key, bus in zip(keys, buses, strict=False)]
        yield server, stage, psutil.Process(committer.process.pid), miners, keys, identities["validator"]


if __name__ == "__main__":
    main("floods", run, doc=__doc__)
