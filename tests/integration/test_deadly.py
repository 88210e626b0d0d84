"""A message whose handling ends the process, against a real broker and processes that really end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from connito.bus import streams
from connito.bus.suspects import DEATHS
from connito.platform.servers import NatsServer
from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.envelope import open_bytes
from connito.wire.identity import Identity

from tests.integration.conftest import BusFactory
from tests.support.waiting import PATIENCE, declared

pytestmark = pytest.mark.integration

# Writes down what began and what ended. The message `deadly` ends the process; `victim` waits for the process to be killed.
WORKER = """
import asyncio, dataclasses, json, os, sys
from pathlib import Path
from connito.bus import Bus, streams
from connito.errors import Invalid
from connito.wire.identity import Identity

url, seed, journal, durable, deadly, victim, lanes = json.loads(sys.argv[1])
streams.DURABLES[durable] = dataclasses.replace(streams.DURABLES[durable], ack_wait=0.6)

def note(what, record):
    with open(journal, "a") as file:
        print(what, record.sequence, file=file, flush=True)

async def handle(record):
    note("began", record)
    if record.sequence == deadly:
        await asyncio.sleep(0.05)
        os._exit(137)
    if record.sequence == victim:
        await asyncio.sleep(60)
    # Long enough to be under way when `deadly` ends the process, where that is handled beside it.
    await asyncio.sleep(0.1)
    note("ended", record)

async def aside(record, error):
    note("aside", record)

async def main():
    bus = await Bus.connect(url, Identity.generate(bytes.fromhex(seed)), "worker")
    lane = (lambda record: record.subject.split(".")[2]) if lanes else None
    await bus.consume(durable, handle, concurrency=8 if lanes else 1, lane=lane, aside=aside)

asyncio.run(main())
"""


class Machine:
    """Starts the worker again and again, as a supervisor would."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.journal, self.lives = url, folder / "journal", 0
        self.journal.touch()
        self.seed = bytes(range(32)).hex()

    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines()

    async def start(self, deadly: int = 0, victim: int = 0, lanes: bool = True) -> asyncio.subprocess.Process:
        self.lives += 1
        task = json.dumps([self.url, self.seed, str(self.journal), "committer", deadly, victim, lanes])
        return await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, task)

    async def until(self, line: str, count: int = 1) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.lines().count(line) < count:  # noqa: ASYNC110 - what another process writes
                await asyncio.sleep(0.01)

    async def kill(self, process: asyncio.subprocess.Process) -> None:
        process.send_signal(signal.SIGKILL)
        await process.wait()


@pytest.fixture
async def machine(
    own_nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bus_factory: BusFactory
) -> Machine:
    monkeypatch.setitem(streams.DURABLES, "committer", replace(streams.DURABLES["committer"], ack_wait=0.6))
    bus = await bus_factory(None, own_nats.url)
    await declared(bus.js)
    return Machine(own_nats.url, tmp_path)


async def say(machine: Machine, bus_factory: BusFactory, runs: list[str]) -> None:
    bus = await bus_factory(Identity.generate(bytes(range(32))), machine.url)
    for run in runs:
        await bus.publish_ingress(run, "reveal", cycle_pb2.Reveal(run=run, cycle=len(machine.seed)))


@pytest.mark.parametrize("lanes", [True, False])
async def test_it_is_put_aside_by_name_and_everything_else_is_handled(
    machine: Machine, bus_factory: BusFactory, lanes: bool
) -> None:
    await say(machine, bus_factory, ["a", "b", "c", "d"])
    # The second of four that are handled at once.
    while "aside 2" not in machine.lines():
        process = await machine.start(deadly=2, lanes=lanes)
        ended, seen = asyncio.create_task(process.wait()), asyncio.create_task(machine.until("aside 2"))
        await asyncio.wait((ended, seen), return_when=asyncio.FIRST_COMPLETED)
        seen.cancel()
        assert machine.lives <= DEATHS + 3
    for sequence in (1, 3, 4):
        await machine.until(f"ended {sequence}")
    bus = await bus_factory(None, machine.url)
    async with asyncio.timeout(PATIENCE):
        while await bus.ack_floor("committer") < 4:  # noqa: ASYNC110 - the broker's state, asked for
            await asyncio.sleep(0.02)
    await machine.kill(process)
    letters = [await bus.last_record(f"connito.dlq.v1.INGRESS.{sequence}") for sequence in range(1, 5)]
    assert [letter is None for letter in letters] == [True, False, True, True]
    assert letters[1] is not None
    letter = open_bytes(letters[1].data, letters[1].subject).read(cycle_pb2.DeadLetter)
    assert letter.reason == reasons_pb2.REASON_FAULT
    assert f"ended the process {DEATHS} times" in letter.detail
    # Once for the first time, once beside others that had been delivered before, and alone.
    assert machine.lines().count("began 2") == DEATHS + 2
    assert machine.lines().count("aside 2") == 1


async def test_who_was_merely_under_way_when_processes_were_killed_is_handled(
    machine: Machine, bus_factory: BusFactory
) -> None:
    runs = ["a", "b", "c", "d"]
    await say(machine, bus_factory, runs)
    for life in range(1, DEATHS + 4):
        # Each time another one is under way, with whatever is handled beside it.
        victim = 1 + life % len(runs)
        process = await machine.start(victim=victim)
        await machine.until(f"began {victim}")
        await machine.kill(process)
        await say(machine, bus_factory, ["e"])
    process = await machine.start()
    bus = await bus_factory(None, machine.url)
    async with asyncio.timeout(PATIENCE):
        while await bus.ack_floor("committer") < len(runs) + DEATHS + 3:  # noqa: ASYNC110 - the broker's state, asked for
            await asyncio.sleep(0.02)
    await machine.kill(process)
    assert not [line for line in machine.lines() if line.startswith("aside")]
    assert await bus.last_sequence("DLQ") == 0
