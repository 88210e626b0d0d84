"""A whole platform in virtual time: the product's services on simulated machines, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import hashlib
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

from connito.bus import Bus
from connito.bus.connection import Connection
from connito.bus.lease import LeaseKeeper
from connito.errors import Retry
from connito.runtime.compute import ComputeBudget
from connito.runtime.host import Disk, Host
from connito.runtime.logs import get_logger
from connito.runtime.settings import ServiceSettings
from connito.runtime.waiting import WAITING, Waiting
from connito.service.engine import Decision, Engine
from connito.service.runner import ServiceContext
from connito.store import ArtifactStore, key_of
from connito.store.cache import Cache
from connito.v1 import services_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import fact
from connito.wire.tls import Tls
from minio.datatypes import Object
from minio.error import S3Error
from urllib3.exceptions import HTTPError

import services.aggregator.handlers as merging
from services.aggregator.actions import Aggregator
from services.committer.__main__ import main as committer_main
from services.committer.settings import CommitterSettings
from services.coordinator.__main__ import main as coordinator_main
from services.coordinator.settings import CoordinatorSettings
from services.trainer.actions import Miner
from services.trainer.adapters import Services
from services.trainer.handlers import STREAMS as MINER_STREAMS
from services.trainer.own import Own, decide_with
from services.trainer.state import Ledger
from services.trainer.strategy import HONEST
from services.validator.__main__ import main as validator_main
from services.validator.settings import ValidatorSettings
from tests.sim import toy
from tests.sim.broker import Broker, Client, Weather
from tests.sim.clockwork import EPOCH, PROCESS, Process, VirtualLoop
from tests.support.run import ordered
from tests.unit.connito.audit.world import RUN

Main = Callable[["Node", ServiceContext[Any]], Awaitable[None]]
LEASE = 3.0


class Store:
    """Objects by key, for everybody; `away` while nobody reaches them."""

    def __init__(self, objects: dict[str, bytes], loop: VirtualLoop) -> None:
        self.objects, self.away, self._loop = objects, False, loop

    def leave(self, seconds: float) -> bool:
        self.away = True
        self._loop.call_later(seconds, setattr, self, "away", False, context=self._loop.between)
        return self.away

    def read(self, key: str) -> bytes:
        if self.away:
            raise HTTPError("the store is away")
        if key not in self.objects:
            raise S3Error(cast(Any, None), "NoSuchKey", "no such key", key, "", "")
        return self.objects[key]


class StoreClient:
    """One process's way to the store, in place of `minio.Minio`."""

    def __init__(self, store: Store, node: Node) -> None:
        self._store, self._node = store, node

    def stat_object(self, bucket: str, key: str) -> Any:
        size = len(self._store.read(key))
        return Object(bucket, key, datetime.now(UTC), size=size, content_type="application/octet-stream")

    def get_object(self, bucket: str, key: str, offset: int = 0, length: int = 0) -> Any:
        data = self._store.read(key)
        if self._node.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        body = BytesIO(data[offset : offset + length] if length else data)
        return SimpleNamespace(read=body.read, close=body.close, release_conn=lambda: None)

    def put_object(self, bucket: str, key: str, body: Any, size: int, content_type: str = "") -> None:
        data = body.read()
        if self._store.away:
            raise HTTPError("the store is away")
        self._store.objects.setdefault(key, data)


class FaultyDisk(Disk):
    """The disk of a machine: full, or torn apart by a power cut in the middle of a write."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def write(self, path: Path, data: bytes) -> None:
        if self._node.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._node.tear:
            self._node.tear = False
            self.torn(path, data[: len(data) // 2])
            self._node.kill(1.0)
            raise asyncio.CancelledError
        super().write(path, data)

    def torn(self, path: Path, part: bytes) -> None:
        """What is on the disk of a write that was cut off."""
        path.with_name(path.name + ".tmp").write_bytes(part)

    def keep(self, draft: Path, path: Path) -> None:
        if self._node.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().keep(draft, path)


class Channel:
    """A call to the API of another process, in place of a gRPC channel."""

    def __init__(self, world: World, address: str) -> None:
        self._world, self._address = world, address

    def unary_unary(self, path: str, **_: Any) -> Callable[..., Awaitable[Any]]:
        return lambda request, **_: self._call(path.rsplit("/", 1)[1], request)

    unary_stream = unary_unary

    async def _call(self, method: str, request: Any) -> Any:
        await asyncio.sleep(0.005)
        node, process, servicer = self._world.apis[self._address]
        if process.dead or process.paused or node.cut_until > self._world.loop.now:
            await asyncio.sleep(1.0)
            raise Retry(f"{self._address} does not answer")
        context = copy_context()
        context.run(PROCESS.set, process)
        answer = self._world.loop.create_task(getattr(servicer, method)(request, None), context=context)
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait([answer], timeout=10.0)
        if not done or answer.cancelled():
            raise Retry(f"{self._address} does not answer")
        await asyncio.sleep(0.005)
        return answer.result()

    async def close(self, grace: float | None = None) -> None:
        """Nothing is held."""


class MinersServices(Services):
    """A miner's calls; its uploads go straight into the store."""

    def __init__(self, bus: Bus, world: World) -> None:
        super().__init__(bus, lambda address, _: cast(Any, Channel(world, address)))
        self._store = world.store

    async def upload(self, slot: services_pb2.RequestUploadResponse, path: Path) -> bool:
        if self._store.away:
            raise Retry("the store is away")
        key = urlsplit(slot.url).path.split("/", 2)[2]
        data = path.read_bytes()
        assert key.endswith(hashlib.sha256(data).hexdigest()), "the store compares what comes with what was signed"
        return self._store.objects.setdefault(key, data) is data


class MinersDownloads:
    """Public artifacts through the addresses that the committer gives."""

    def __init__(self, services: MinersServices, world: World, folder: Path) -> None:
        self._services, self._world, self.cache = services, world, Cache(folder)

    async def fetch(self, run: str, ref: ArtifactRef) -> Path:
        answer = await self._services.downloads(run, [ref.digest])
        data = self._world.store.objects[urlsplit(answer.urls[ref.digest]).path.split("/", 2)[2]]

        def download(path: Path) -> None:
            path.write_bytes(data)

        return self.cache.get(ref, download)


class Node:
    """A machine with one service on it, which is started again when it has died."""

    def __init__(self, world: World, name: str, identity: Identity, main: Main) -> None:
        self.world, self.name, self.identity, self.main = world, name, identity, main
        self.folder = world.folder / name
        self.folder.mkdir()
        self.skew, self.cut_until, self.starts = 0.0, 0.0, 0
        self.disk_full = self.tear = False
        self.crashes: list[BaseException] = []
        self.disk: Disk = world.disk(self)
        self.process = Process(name, Random(0))
        self.client: Client | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.starts += 1
        self.process = Process(self.name, Random(f"{self.world.seed}/{self.name}/{self.starts}"))
        context = copy_context()
        context.run(PROCESS.set, self.process)
        self.task = self.world.loop.create_task(self._live(self.process), context=context)

    def kill(self, back_in: float) -> None:
        """SIGKILL: nothing that it would still do has an effect. It is started again after a while."""
        if self.process.dead:
            return
        self.process.dead = True
        self.world.kills += 1
        if self.process.paused:
            self.process.go_on(self.world.loop)
        if self.client is not None:
            self.client._leave()
        self.world.later(0.0, self._bury, back_in)

    async def _bury(self, back_in: float) -> None:
        assert self.task is not None
        while not self.task.done():
            self.task.cancel()
            await asyncio.wait([self.task], timeout=0.1)
        await asyncio.sleep(back_in)
        self.start()

    def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        if not self.process.dead and not self.process.paused:
            self.process.paused = True
            self.world.loop.call_later(seconds, self._go_on, self.process, context=self.world.loop.between)

    def _go_on(self, process: Process) -> None:
        if process.paused:
            process.go_on(self.world.loop)

    def cut(self, seconds: float) -> None:
        """Cut it off from everybody else."""
        self.cut_until = self.world.loop.now + seconds
        if self.client is not None:
            self.client.lose(seconds)

    def now_ms(self) -> int:
        return int((EPOCH + self.world.loop.now + self.skew) * 1000)

    async def _live(self, process: Process) -> None:
        try:
            host = Host(self.now_ms, self.world.loop.time, process.rng.randbytes, self.disk)
            connection = await self._connect(process)
            await self.main(self, self._context(self.world.bus(connection, host)))
        except Exception as error:
            if not process.dead:
                self.crashes.append(error)
                self.kill(1.0)

    async def _connect(self, process: Process) -> Connection:
        while True:
            self.client = self.world.client(process)
            connection = Connection("sim", self.identity, self.name, client=cast(Any, self.client))
            try:
                await connection.open()
            except Retry:
                await asyncio.sleep(1.0)
            else:
                return connection

    def _context(self, bus: Bus) -> ServiceContext[Any]:
        store = self.world.artifacts(self)(
            "http://store", "access", "secret", "connito", "here", self.folder / "cache",
            client=cast(Any, StoreClient(self.world.store, self)),
        )  # fmt: skip
        settings = settings_of(self.name.split("-")[0]).model_copy(update={"state_dir": self.folder / "state"})
        return _Context(
            self.name,
            settings,
            self.identity,
            bus,
            get_logger(self.name),
            asyncio.Event(),
            {},
            self.world.roster,
            store,
        )


SETTINGS: dict[str, type[ServiceSettings]] = {
    "coordinator": CoordinatorSettings, "committer": CommitterSettings, "validator": ValidatorSettings,
}  # fmt: skip
# Calls of half a minute come in no time here.
PATIENT = {"requests_per_second": 1e9, "requests_burst": 1e9}


@functools.cache
def settings_of(service: str) -> ServiceSettings:
    return SETTINGS.get(service, ServiceSettings).model_validate({"key_file": "none"}).model_copy(update=PATIENT)


class _Context(ServiceContext[Any]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args[:-1])
        self.__dict__ |= {"roster": args[-2], "store": args[-1]}


@dataclass
class Scenario:
    """A run and what happens to it. `storm` are the kinds of faults, one about every `every` seconds until `seconds`."""

    cycles: int = 2
    miners: int = 2
    validators: int = 2
    quorum: int = 2
    storm: tuple[str, ...] = ()
    every: float = 2.0
    seconds: float = 20.0
    skew: float = 0.0
    # Nobody is away for long: what was committed to is opened.
    brief: bool = False
    # Six numbers have hardly more than their signs in three levels, and would be copies of each other.
    codec: str = "int8"
    weather: Weather = field(default_factory=Weather)
    # What happens at a time of its own.
    script: tuple[tuple[float, Callable[[World], object]], ...] = ()
    limit: float = 1200.0


class World:
    """One run. A planted bug is a subclass that overrides what the simulated machines are made of."""

    def __init__(self, seed: int, scenario: Scenario, folder: Path) -> None:
        self.seed, self.scenario, self.folder = seed, scenario, folder
        self.loop = VirtualLoop()
        self.rng = Random(f"world {seed}")
        self.broker = self.make_broker()
        spec, selection, objects = toy.materials()
        self.identities = {
            name: Identity.generate(self.rng.randbytes(32))
            for name in ("coordinator", "selector", "committer", "aggregator", "library", "customer")
        }
        validators = [Identity.generate(self.rng.randbytes(32)) for _ in range(scenario.validators)]
        miners = [Identity.generate(self.rng.randbytes(32)) for _ in range(scenario.miners)]
        self.roster = Roster(
            {role: frozenset({who.public}) for role, who in self.identities.items()}
            | {"validator": frozenset(who.public for who in validators)}
        )
        customer = self.identities["customer"].public
        self.spec = toy.spec_for(scenario.cycles, 1, scenario.quorum, customer, scenario.codec)
        self.selection = selection
        holdouts = {corpus.artifact.digest for corpus in (spec.holdout, *spec.general_holdouts)}
        placed = {
            key_of(ArtifactRef(digest=digest, realm=REALM_HOLDOUT if digest in holdouts else REALM_PUBLIC)): data
            for digest, data in objects.items()
        }
        self.store = Store(placed, self.loop)
        self.apis: dict[str, tuple[Node, Process, object]] = {}
        self.kills = 0
        self.faults: list[str] = []
        who = self.identities
        self.nodes = [Node(self, f"coordinator-{k}", who["coordinator"], self.coordinator) for k in range(2)]
        self.nodes += [Node(self, f"committer-{k}", who["committer"], self.committer) for k in range(2)]
        self.nodes += [Node(self, f"aggregator-{k}", who["aggregator"], self.aggregator) for k in range(1)]
        self.nodes += [Node(self, f"validator-{k}", one, self.validator) for k, one in enumerate(validators)]
        self.nodes += [Node(self, f"miner-{k}", one, self.miner) for k, one in enumerate(miners)]

    # What a planted bug replaces

    def make_broker(self) -> Broker:
        return Broker(self.loop, Random(f"broker {self.seed}"), self.scenario.weather)

    def disk(self, node: Node) -> Disk:
        return FaultyDisk(node)

    def bus(self, connection: Connection, host: Host) -> Bus:
        return Bus(connection, connection, self.roster, host)

    def client(self, process: Process) -> Client:
        return Client(self.broker, process)

    def artifacts(self, node: Node) -> type[ArtifactStore]:
        return ArtifactStore

    def services(self, bus: Bus) -> MinersServices:
        return MinersServices(bus, self)

    def later(self, seconds: float, work: Callable[..., Any], *args: Any) -> None:
        """Start a coroutine that belongs to no machine."""
        start = lambda: self.loop.create_task(work(*args), context=self.loop.between)  # noqa: E731
        self.loop.call_later(seconds, start, context=self.loop.between)

    # Services

    def _serve(self, node: Node) -> Any:
        @asynccontextmanager
        async def serve(context: Any, servicer: tuple[Any, object, str]) -> AsyncIterator[str]:
            address = f"{node.name}:{node.starts}"
            self.apis[address] = (node, node.process, servicer[1])
            yield address

        return serve

    async def serves(self, address: str, tls: Tls) -> bool:
        """Tell whether who served at an address lives, and answers."""
        node, process, _ = self.apis[address]
        return node.process is process and not process.dead and not process.paused

    async def coordinator(self, node: Node, context: ServiceContext[Any]) -> None:
        await coordinator_main(context, self._serve(node))

    async def committer(self, node: Node, context: ServiceContext[Any]) -> None:
        await committer_main(context, self._serve(node), self.serves)

    async def validator(self, node: Node, context: ServiceContext[Any]) -> None:
        await validator_main(context, toy.Evaluator)

    async def aggregator(self, node: Node, context: ServiceContext[Any]) -> None:
        log, bus = Log(context.roster), context.bus
        keeper = LeaseKeeper(bus, "aggregator", LEASE)
        aggregator = Aggregator(
            bus, context.store, context.roster, ComputeBudget(None), log.runs.__getitem__, lambda: keeper.leading,
            cast(Any, toy.Gate),
        )  # fmt: skip

        def decide(facts: RunFacts, _: int) -> Decision:
            return merging.decide(facts, aggregator.evaluators) if keeper.leading else Decision()

        engine = Engine(
            bus, log, merging.STREAMS, decide, aggregator.perform, clock=bus.host.now_ms, kept=context.kept(merging.STREAMS)
        )  # fmt: skip

        async def begin() -> None:
            engine.wake()

        async with asyncio.TaskGroup() as group:
            group.create_task(engine.run())
            group.create_task(keeper.keep(begin))

    async def miner(self, node: Node, context: ServiceContext[Any]) -> None:
        bus, me = context.bus, context.identity.public
        ledger, log = self.ledger(node), Log(context.roster)
        try:
            services = self.services(bus)
            downloads = cast(Any, MinersDownloads(services, self, node.folder / "cache"))
            trainer = toy.Trainer(node.process.rng)
            miner = Miner(bus, services, downloads, ledger, trainer, HONEST, lambda run: log.runs[run], node.name, "")
            own = Own(bus, me, log, ledger)
            engine = Engine(
                bus, log, MINER_STREAMS, functools.partial(decide_with, me, ledger, HONEST, own), miner.perform,
                on_fact=own.notice, clock=bus.host.now_ms, kept=context.kept(MINER_STREAMS), of_all=True,
            )  # fmt: skip

            async def look() -> None:
                await engine.caught_up.wait()
                await own.follow(engine.take, engine.wake)

            async with asyncio.TaskGroup() as group:
                group.create_task(engine.run())
                group.create_task(look())
        finally:
            ledger.close()

    def ledger(self, node: Node) -> Ledger:
        return Ledger(node.folder / "work", node.identity.public, node.disk)

    # The run

    async def run(self) -> None:
        """Carry the run out until it has ended, or nothing more is to be expected."""
        weather, self.broker.weather = self.broker.weather, Weather()
        await self._publish("coordinator", "created", ordered(self.spec, self.identities["customer"]))
        await self._publish("selector", "selected", self.selection)
        self.broker.weather = weather
        for node in self.nodes:
            node.skew = self.rng.uniform(-1, 1) * self.scenario.skew
            node.start()
        for at, what in self.scenario.script:
            self.loop.call_later(at, what, self, context=self.loop.between)
        self.later(0.0, self._storm)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self.scenario.limit):
                await self.broker.written_to(fact(RUN, "run", 0, "ended"))
        # Who acts on the end does so, and what was under way arrives.
        await asyncio.sleep(2.0)

    async def _publish(self, who: str, kind: str, message: Any) -> None:
        process = Process("customer", Random(f"customer {self.seed}"))
        client = Client(self.broker, process)
        connection = Connection("sim", self.identities[who], who, client=cast(Any, client))
        await connection.open()
        host = Host(lambda: int(EPOCH * 1000), self.loop.time, process.rng.randbytes)
        await Bus(connection, connection, self.roster, host).publish_fact(RUN, "run", 0, kind, message)
        await connection.close()

    async def _storm(self) -> None:
        rng, kinds = self.rng, self.scenario.storm
        while kinds and self.loop.now < self.scenario.seconds:
            await asyncio.sleep(rng.expovariate(1 / self.scenario.every))
            kind = rng.choice(kinds)
            node = rng.choice([node for node in self.nodes if node.name.startswith(AT.get(kind, ""))])
            self.faults.append(f"{self.loop.now:.2f} {kind} {node.name}")
            FAULTS[kind](self, node, rng)
        self.broker.weather = Weather()

    def close(self) -> None:
        """End every process, in real time at once."""
        for node in self.nodes:
            node.process.dead = True
            node.process.paused = False
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(lambda *_: None)
        for _ in range(20):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            with suppress(BaseException):
                self.loop.run_until_complete(asyncio.sleep(0.6))
        self.loop.close()
        asyncio.set_event_loop(None)


def _full(world: World, node: Node, rng: Random) -> None:
    node.disk_full = True
    world.loop.call_later(rng.uniform(0.5, 10), setattr, node, "disk_full", False, context=world.loop.between)


FAULTS: dict[str, Callable[[World, Node, Random], object]] = {
    "kill": lambda world, node, rng: node.kill(rng.choice([0.1, 0.5, 2.0, rng.uniform(2, 15)])),
    "pause": lambda world, node, rng: node.pause(rng.choice([0.2, 2.0, rng.uniform(2, 12)])),
    "cut": lambda world, node, rng: node.cut(rng.choice([0.1, 1.0, rng.uniform(2, 12)])),
    "broker": lambda world, node, rng: world.broker.stop(rng.uniform(0.3, 6)),
    "election": lambda world, node, rng: world.broker.elect(
        rng.choice([*world.broker.streams, "KV_LEASES"]), rng.uniform(0.2, 5)
    ),
    "lease": lambda world, node, rng: world.broker.elect("KV_LEASES", rng.uniform(0.1, 2.5)),
    "store": lambda world, node, rng: world.store.leave(rng.uniform(0.5, 15)),
    "full": _full,
    "brief": lambda world, node, rng: node.kill(rng.uniform(0.1, 0.5)),
    "torn": lambda world, node, rng: setattr(node, "tear", True),
    "skew": lambda world, node, rng: setattr(node, "skew", rng.uniform(-1800, 1800)),
}


# Whom a kind of fault befalls, where that is not everybody.
AT: dict[str, str | tuple[str, ...]] = {
    "torn": "miner",
    "brief": "miner",
    "full": "",
}


def folder_for(seed: int) -> Path:
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"connito-sim-{seed}-", dir=shm if shm.is_dir() else None))


def carry_out(seed: int, scenario: Scenario, of: type[World] = World) -> World:
    """Carry out one run; the same seed and scenario give the same run. `close` and remove `folder` afterwards."""
    # Waits before another attempt are drawn from the module's own generator.
    random.seed(seed)
    vars(WAITING).update(vars(Waiting()))
    world = of(seed, scenario, folder_for(seed))
    # What a killed process was in the midst of ends when it is collected, and draws from the numbers of those that live on.
    gc.disable()
    try:
        asyncio.set_event_loop(world.loop)
        world.loop.run_until_complete(world.run())
    finally:
        world.close()
        gc.enable()
    return world


def forget(world: World) -> None:
    shutil.rmtree(world.folder, ignore_errors=True)
