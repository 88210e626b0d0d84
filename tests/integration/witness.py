"""Somebody who reads along: waits for facts instead of for time. And services as the processes that they are."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

from connito.bus import Bus, CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import Roster

from tests.support.waiting import PATIENCE


class Witness:
    """The facts of one run as they come in."""

    def __init__(self, bus: Bus, roster: Roster, run: str) -> None:
        self.bus, self.log, self.run = bus, Log(roster), run
        self._moved = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def reading(cls, bus: Bus, roster: Roster, run: str) -> AsyncIterator[Self]:
        witness = cls(bus, roster, run)
        witness._reading = asyncio.create_task(witness._read())
        try:
            yield witness
        finally:
            witness._reading.cancel()
            await asyncio.gather(witness._reading, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async for item in self.bus.follow((*FACT_STREAMS, "INGRESS"), self.run):
                if not isinstance(item, CaughtUp):
                    with suppress(Invalid):  # every reader ignores what does not verify
                        self.log.apply(item)
                    self._moved.set()
        finally:
            self._moved.set()

    @property
    def facts(self) -> RunFacts:
        return self.log.runs.get(self.run) or RunFacts(self.run)

    async def until(
        self, satisfied: Callable[[RunFacts], object], what: str = "what was not told", timeout: float = PATIENCE
    ) -> RunFacts:
        """Wait until the facts satisfy."""
        try:
            async with asyncio.timeout(timeout):
                while not satisfied(self.facts):
                    if self._reading is not None and self._reading.done():
                        self._reading.result()
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            keys = [f"{k.section}.{k.cycle}.{k.kind}.{k.id[:6]}" for k in self.facts.facts]
            raise AssertionError(f"waited {timeout:.0f} s for {what}; the facts are {keys}") from None
        return self.facts

    async def has(self, section: str, cycle: int, kind: str, id_: str = "", timeout: float = PATIENCE) -> RunFacts:
        """Wait for one fact."""
        return await self.until(
            lambda facts: facts.has(section, cycle, kind, id_), f"{section}.{cycle}.{kind}", timeout
        )


def guard(server: NatsServer, people: dict[str, Identity], miners: list[Identity] | None = None) -> None:
    """Let only these keys in, each with the rights that its role has in production: they get their passes."""
    server.stop()
    server.accounts = Accounts(server.data_dir / "accounts")
    server.accounts.make()
    for role, identity in people.items():
        people[role] = server.accounts.welcome(role, identity)
    if miners is not None:
        miners[:] = [server.accounts.welcome("miner", miner) for miner in miners]
    server.start()


class ServiceProcess:
    """`python -m services.<name>` with its own key, log and port file."""

    def __init__(self, name: str, folder: Path, identity: Identity, roster: Roster, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.log, self.ports_file = name, folder / f"{name}.log", folder / f"{name}.ports.json"
        identity.save(folder / f"{name}.key")
        roster.save(folder / "roster.json")
        self._env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("CONNITO_")},
            "CONNITO_KEY_FILE": str(folder / f"{name}.key"),
            "CONNITO_ROSTER": str(folder / "roster.json"),
            "CONNITO_CACHE_DIR": str(folder / "cache"),
            "CONNITO_PORT_FILE": str(self.ports_file),
            **env,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        self.ports_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", f"services.{self.name}"], env=self._env, stderr=log)
        return self

    async def ready(self, timeout: float = PATIENCE) -> Self:
        """Wait until the API listens, which is when the service has read the log."""
        try:
            async with asyncio.timeout(timeout):
                while "grpc" not in self.ports:
                    assert self.process is not None
                    assert self.process.poll() is None, self.log.read_text()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.name} is not ready:\n{self.log.read_text()}") from None
        return self

    @property
    def ports(self) -> dict[str, int]:
        with suppress(OSError, ValueError):
            return dict(json.loads(self.ports_file.read_text()))
        return {}

    def wait_for_log(self, text: str, timeout: float = PATIENCE) -> None:
        """Block until the service has logged `text`."""
        give_up = time.monotonic() + timeout
        while text not in self.log.read_text():
            assert time.monotonic() < give_up, f"{text!r} is not in the log of {self.name}:\n{self.log.read_text()}"
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def drain(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE)
