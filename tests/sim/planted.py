"""Bugs that are put in on purpose, each at a seam: whoever looks for faults has to find every one of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

from connito.bus import Bus
from connito.bus.connection import Connection
from connito.errors import Invalid, Retry
from connito.runtime.host import Disk, Host
from connito.store import ArtifactStore
from connito.v1 import services_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.fact import Record

from services.trainer.state import Ledger
from tests.sim.broker import Broker, Client
from tests.sim.clockwork import Process
from tests.sim.world import FaultyDisk, MinersServices, Node, World

Handler = Callable[[Record], Awaitable[None]]


def with_bus(methods: type[Bus]) -> type[World]:
    class Planted(World):
        def bus(self, connection: Connection, host: Host) -> Bus:
            return methods(connection, connection, self.roster, host)

    return Planted


class NoCompare(World):
    """The broker admits a second fact on a subject."""

    def make_broker(self) -> Broker:
        class Lenient(Broker):
            def admits(self, last: int, expected: int) -> bool:
                return True

        return Lenient(self.loop, Random(f"broker {self.seed}"), self.scenario.weather)


class PublishTwice(Bus):
    """Writes a fact again, as a new message, whenever the first attempt was not acknowledged."""

    async def publish_fact(self, *args: Any) -> bool:
        try:
            return await super().publish_fact(*args)
        except Retry:
            self._expecting = False
            return await super().publish_fact(*args)

    _expecting = True

    async def _publish(self, subject: str, data: bytes, extra: dict[str, str], kind: str) -> dict[str, Any]:
        return await super()._publish(subject, data, extra if self._expecting else {}, kind)


class AckFirst(World):
    """A message is acknowledged before it is answered."""

    def client(self, process: Process) -> Client:
        class Hasty(Client):
            def send(self, inbox: str, parts: Any, subject: str = "", reply: str = "") -> None:
                super().send(inbox, parts, subject, reply)
                if reply.startswith("$JS.ACK."):
                    self.broker.receive(self, reply, b"", "", {})

        return Hasty(self.broker, process)


class StaleEnd(Bus):
    """Believes that a stream still ends where it ended half a minute ago."""

    async def last_sequence(self, stream: str) -> int:
        known = self.__dict__.setdefault("_known", dict[str, tuple[float, int]]())
        now = self.host.monotonic()
        if stream not in known or known[stream][0] < now - 30.0:
            known[stream] = now, await super().last_sequence(stream)
        return int(known[stream][1])


class ReplicasWord(Bus):
    """Takes what the replica that answers has not for gone."""

    async def gone(self, stream: str, **which: Any) -> bool:
        return await self.look(stream, **which) is None


class SettleEarly(Bus):
    """Does not wait until everything inside a window is answered."""

    async def ack_floor(self, durable: str) -> int:
        return 1 << 40


def handled(change: Callable[[Handler], Handler]) -> type[Bus]:
    class Planted(Bus):
        async def consume(self, durable: str, handler: Handler, **options: Any) -> None:
            await super().consume(durable, change(handler), **options)

    return Planted


def give_up(handler: Handler) -> Handler:
    """Dead letters after three deliveries."""
    tries = Counter[int]()

    async def handle(record: Record) -> None:
        tries[record.sequence] += 1
        try:
            await handler(record)
        except Retry as error:
            if tries[record.sequence] >= 3:
                raise Invalid(str(error)) from error
            raise

    return handle


def skip_one(handler: Handler) -> Handler:
    """One reveal of three goes without an answer."""
    count = itertools.count()

    async def handle(record: Record) -> None:
        if not record.subject.endswith(".reveal") or next(count) % 3:
            await handler(record)

    return handle


class OwnClock(Bus):
    """Takes the machine's clock for the broker's."""

    async def time(self) -> float:
        return self.host.now_ms() / 1000


class InPlace(World):
    """A file is written over in its place."""

    def disk(self, node: Node) -> Disk:
        class Planted(FaultyDisk):
            def torn(self, path: Path, part: bytes) -> None:
                path.write_bytes(part)

        return Planted(node)


class Forgetful(World):
    """A miner begins with an empty work folder whenever it is started."""

    def ledger(self, node: Node) -> Ledger:
        return Ledger(node.folder / f"work-{node.starts}", node.identity.public, node.disk)


class Gap(Bus):
    """One record of twenty is passed over."""

    async def follow(self, *args: Any, **options: Any) -> Any:
        async for item in super().follow(*args, **options):
            if not isinstance(item, Record) or item.stream == "RUNS" or item.sequence % 20 != 7:
                yield item


class HalfUpload(World):
    """A broken upload counts as one."""

    def services(self, bus: Bus) -> MinersServices:
        class Planted(MinersServices):
            async def upload(self, slot: services_pb2.RequestUploadResponse, path: Path) -> bool:
                sent = await super().upload(slot, path)
                objects, rng = self._store.objects, Random(path.read_bytes()[-8:])
                for key in [key for key in objects if key.startswith("submissions/")]:
                    if rng.random() < 0.2:
                        objects[key] = objects[key][:-3]
                return sent

        return Planted(bus, self)


class FirstState(World):
    """A submission's norm is measured from the state that the run began with."""

    def artifacts(self, node: Node) -> type[ArtifactStore]:
        first = self.selection.initial_state

        class Planted(ArtifactStore):
            async def fetch(self, ref: ArtifactRef, **options: Any) -> Path:
                return await super().fetch(first if ref.realm == REALM_PUBLIC else ref, **options)

        return Planted if node.name.startswith("committer") else ArtifactStore
