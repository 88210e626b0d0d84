"""A service that finds a broker without the last facts that it had read there names the run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.platform.servers import NatsServer
from connito.runtime.waiting import WAITING, Wait
from connito.service.keeping import Keeping
from connito.v1 import run_pb2
from connito.wire.fact import Fact, Record
from connito.wire.identity import Identity
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey

from .conftest import BusFactory

STREAM = "RUNS"


@pytest.fixture(autouse=True)
def told() -> Iterator[None]:
    yield
    for wait in WAITING.entries():
        WAITING.end(wait.what)


async def written(bus: Bus, run: str, *kinds: str) -> list[Record]:
    """Facts of a run as they stand in the log."""
    found = []
    for kind in kinds:
        await bus.publish_fact(run, "run", 0, kind, run_pb2.RunCreated())
        record = await bus.look(STREAM, seq=await bus.last_sequence(STREAM))
        assert record is not None
        found.append(record)
    return found


def opened(bus: Bus, folder: Path) -> Keeping:
    return Keeping(Kept(folder / "log.sqlite", b"mine", b"s" * 32), Log(Roster()), bus)


async def read_all(bus: Bus, folder: Path, run: str, records: list[Record]) -> None:
    keeping = opened(bus, folder)
    await keeping.begin()
    for record in records:
        key = FactKey("run", 0, record.subject.rpartition(".")[2], "")
        keeping.kept.put(Fact(run, key, run_pb2.RunCreated(), "U", STREAM, record.sequence, record.time_unix_ms))
        keeping.read(record)
    keeping.keep()
    keeping.kept.close()


async def begun_again(bus: Bus, folder: Path) -> tuple[dict[str, int], list[Wait]]:
    keeping = opened(bus, folder)
    try:
        return await keeping.begin(), WAITING.entries()
    finally:
        keeping.kept.close()


async def test_a_lost_fact_is_named_with_its_run_and_the_remedy(
    own_nats: NatsServer, bus_factory: BusFactory, tmp_path: Path
) -> None:
    bus, run = await bus_factory(Identity.generate(), own_nats.url), f"r-{secrets.token_hex(4)}"
    records = await written(bus, run, "created", "completed")
    await read_all(bus, tmp_path, run, records)
    start, waits = await begun_again(bus, tmp_path)
    assert (start, waits) == ({STREAM: records[-1].sequence + 1}, [])
    # No fact can be deleted; a purge of its subject is the nearest that a healthy broker does to losing one.
    await bus.js.purge_stream(STREAM, subject=records[-1].subject)
    start, (wait,) = await begun_again(bus, tmp_path)
    assert start == {}
    assert (wait.run, wait.given_up) == (run, True)
    assert f"message {records[-1].sequence} of {STREAM}" in wait.error
    assert "connito restore" in wait.error


async def test_what_was_archived_or_is_another_log_is_not_lost(
    own_nats: NatsServer, bus_factory: BusFactory, tmp_path: Path
) -> None:
    bus, run = await bus_factory(Identity.generate(), own_nats.url), f"r-{secrets.token_hex(4)}"
    await read_all(bus, tmp_path, run, await written(bus, run, "created", "completed"))
    await bus.js.purge_stream(STREAM, subject=f"connito.v1.{run}.>")
    assert await begun_again(bus, tmp_path) == ({}, [])
    await read_all(bus, tmp_path, run, await written(bus, f"{run}-2", "created", "completed"))
    await bus.js.purge_stream(STREAM)
    await written(bus, f"{run}-3", "created", "completed")
    assert await begun_again(bus, tmp_path) == ({}, [])
