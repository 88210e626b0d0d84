"""The frame around every service: settings, logs, connections, probes, and an orderly end.

`python -m services.<name>` calls `run_service`. Liveness says that the event loop turns; it never depends on the broker,
or a broker outage would become a restart storm. Readiness says that the service said `ready()` and the broker is there.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from connito.bus import Bus
from connito.errors import ConnitoError, Fatal, Invalid, Retry
from connito.files import write_durably
from connito.runtime import scratch, tracing
from connito.runtime.logs import Logger, get_logger, setup_logging
from connito.runtime.programs import service_module
from connito.runtime.settings import ServiceSettings
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import here_and_now
from connito.service import certificates, security
from connito.service.probes import Probes
from connito.store import ArtifactStore
from connito.store.credentials import provider
from connito.store.owner import claim
from connito.wire.identity import Identity
from connito.wire.kept import Kept
from connito.wire.roster import Roster

S = TypeVar("S", bound=ServiceSettings)

PORT_FILE = "CONNITO_PORT_FILE"
CONNECT_EVERY = 1.0
ROSTER_EVERY = 2.0
OWNER_EVERY = 30.0
# Objects, and collections of the generation before.
COLLECTED_AFTER = (50_000, 20, 20)


@dataclass
class ServiceContext(Generic[S]):
    """The connections and settings that a service's `main` gets."""

    name: str
    settings: S
    identity: Identity
    bus: Bus
    log: Logger
    stop: asyncio.Event
    ports: dict[str, int]
    loaded_roster: Roster | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def ready(self) -> None:
        """Say that the service does its work; readiness is true from now on while the broker is there."""
        if not self._ready.is_set():
            self._ready.set()
            self.log.info("ready")

    def announce_port(self, kind: str, port: int) -> None:
        """Log a port that was chosen, and write it to `CONNITO_PORT_FILE` if that is set."""
        self.ports[kind] = port
        _write_ports(self.ports)
        self.log.info("listening", kind=kind, port=port)

    @cached_property
    def store(self) -> ArtifactStore:
        """Return the artifact store. Raises `Fatal` when the service was given no credentials for it."""
        return ArtifactStore.from_settings(self.settings, self.identity)

    def kept(self, streams: Sequence[str], folder: Path | None = None) -> Kept:
        """Return what this service kept of these streams in its folder for that; nothing yet where it has none.

        Under another roster, run or version other messages may be valid: then everything is read again.
        """
        folder = folder or self.settings.state_dir
        if folder is None:
            return Kept()
        run, key = self.settings.run, self.identity.public
        binding = [self.name, key, run, *streams, version("connito"), self.roster.to_json()]
        path = folder / f"log-{self.name}-{key[:16]}{run and '-'}{run}.sqlite"
        kept = Kept(path, json.dumps(binding).encode(), self.identity.derive("connito.v1.kept", self.name))
        if kept.fileless:
            self.log.warning(
                "nothing can be kept here, so the next start reads everything", file=str(path), why=kept.fileless
            )
        return kept

    @cached_property
    def roster(self) -> Roster:
        """Return the operator's roster; it follows the file. Raises `Fatal` when the service was given none."""
        if self.settings.roster is None:
            raise Fatal("this service needs the operator's roster: set CONNITO_ROSTER")
        return self.loaded_roster or Roster.load(self.settings.roster)


def run_service(name: str, main: Callable[[ServiceContext[S]], Awaitable[None]], settings_cls: type[S]) -> NoReturn:
    """Run `main` until it returns, fails or SIGTERM comes; then exit: 0 after a drain, the error's code otherwise."""
    os.umask(0o077)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_help(name, settings_cls))
        sys.exit(0)
    if sys.argv[1:]:
        print(
            f"{name}: unknown argument {sys.argv[1]!r}; settings come from the environment, see --help", file=sys.stderr
        )
        sys.exit(2)
    # What is there by now stays; and facts, which stay too, are not to be gone through with every few hundred that come.
    gc.freeze()
    gc.set_threshold(*COLLECTED_AFTER)
    try:
        settings = settings_cls.load()
        with scratch.own(settings.cache_dir, name):
            asyncio.run(_Service(name, main, settings).run())
    except ConnitoError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, MemoryError) as error:
        if (fault := here_and_now(error)) is None:
            raise
        print(f"{name}: {fault}", file=sys.stderr)
        sys.exit(Retry.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _help(name: str, settings_cls: type[ServiceSettings]) -> str:
    rows = settings_cls.describe()
    width = max(len(row[0]) for row in rows)
    lines = [f"usage: python -m {service_module(name)}", "", "Settings, from the environment:", ""]
    for variable, default, description in rows:
        shown = "" if not default else f" [{default}]"
        lines.append(f"  {variable:<{width}}  {description}{shown}")
    return "\n".join(lines)


class _Service(Generic[S]):
    def __init__(self, name: str, main: Callable[[ServiceContext[S]], Awaitable[None]], settings: S) -> None:
        self.name, self.main, self.settings = name, main, settings
        setup_logging(name, settings.log_format, settings.log_level)
        self.log = get_logger(name)
        self.stop = asyncio.Event()
        self.context: ServiceContext[S] | None = None
        self.ports: dict[str, int] = {}
        self.ended_by: Fatal | None = None

    async def run(self) -> None:
        end_tracing = tracing.start(self.name)
        try:
            await self._serve()
        finally:
            # Flushing asks the collector and waits; nothing else is left to do here.
            end_tracing()

    async def _serve(self) -> None:
        identity = Identity.load(self.settings.key_file)
        roster = Roster.load(self.settings.roster) if self.settings.roster is not None else None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        probes = Probes(self.settings.http_host, self.settings.http_port, self._not_ready)
        try:
            self._announce_probes(probes.port)
            bus = await self._connect(identity, roster)
            if bus is None:
                return
            async with bus:
                self.context = ServiceContext(
                    self.name, self.settings, identity, bus, self.log, self.stop, self.ports, roster
                )
                watching = [
                    asyncio.create_task(
                        certificates.watch((self.settings.nats_url, self.settings.s3_endpoint), tls=self.settings.tls)
                    ),
                    asyncio.create_task(self._follow_roster(roster)),
                    asyncio.create_task(security.publish(bus, self.name)),
                    asyncio.create_task(self._own_bucket(self.context)),
                ]
                try:
                    await self._run_main(self.context)
                finally:
                    await end_tasks(watching)
                if self.ended_by is not None:
                    raise self.ended_by
        finally:
            await probes.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        self.log.info("stopped")

    async def _own_bucket(self, context: ServiceContext[S]) -> None:
        """End where the store's bucket is another platform's, as soon as the store answers."""
        roster, unknown = context.loaded_roster, provider(self.settings) is not None
        while roster is not None and unknown:
            try:
                await claim(context.store, roster, first=self.name == "committer")
                unknown = False
            except Fatal as error:
                self.ended_by, unknown = error, False
                self.stop.set()
            except (Invalid, Retry) as error:
                self.log.warning("whose bucket it is cannot be read", error=str(error))
                await asyncio.sleep(OWNER_EVERY)

    async def _follow_roster(self, roster: Roster | None) -> None:
        """Take over what the operator changes, so that keys come and go without a restart."""
        path = self.settings.roster
        if path is None or roster is None:
            return
        known = path.read_bytes()
        while True:
            await asyncio.sleep(ROSTER_EVERY)
            try:
                content = path.read_bytes()
                if content == known:
                    continue
                roster.replace(Roster.load(path))
            except (OSError, ConnitoError) as error:
                # It may be half written; a file that stays wrong is told of at every look.
                self.log.warning("the roster cannot be taken over, keeping the old one", error=str(error))
            else:
                known = content
                self.log.info("took over the changed roster", path=str(path))

    def _on_signal(self, number: int) -> None:
        if self.stop.is_set():
            # The second signal means it: no more waiting.
            os._exit(130 if number == signal.SIGINT else 143)
        self.log.info("draining", signal=signal.Signals(number).name)
        self.stop.set()

    async def _connect(self, identity: Identity, roster: Roster | None) -> Bus | None:
        """Try until the broker is there; None if told to stop before."""
        while not self.stop.is_set():
            try:
                return await Bus.connect(self.settings, identity, self.name, roster)
            except Retry as error:
                self.log.warning("waiting for the broker", error=str(error))
            with suppress(TimeoutError):
                async with asyncio.timeout(CONNECT_EVERY):
                    await self.stop.wait()
        return None

    async def _run_main(self, context: ServiceContext[S]) -> None:
        async def run() -> None:
            await self.main(context)

        work, stopping = asyncio.create_task(run()), asyncio.create_task(self.stop.wait())
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await asyncio.wait((work,), timeout=self.settings.drain_seconds)
        finished = work.done()
        await end_tasks([work, stopping])
        if finished:
            work.result()

    def _announce_probes(self, port: int) -> None:
        self.ports["http"] = port
        _write_ports(self.ports)
        self.log.info("listening", kind="http", port=port)

    def _not_ready(self) -> str:
        if self.stop.is_set():
            return "draining"
        if self.context is None or not self.context.bus.connected:
            return "no broker"
        return "" if self.context._ready.is_set() else "starting"


def _write_ports(ports: dict[str, int]) -> None:
    if target := os.environ.get(PORT_FILE):
        write_durably(Path(target), json.dumps(ports))
