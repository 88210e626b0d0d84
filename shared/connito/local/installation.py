"""Servers, keys, permissions and services of one machine: everything that runs while `connito up` does."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from connito.bus import Bus, streams
from connito.errors import Retry
from connito.files import write_durably
from connito.local.defaults import Machine
from connito.local.display import Display
from connito.local.hindered import Group
from connito.local.identities import SERVICES, Member, load_members, write_roster
from connito.local.patience import patiently
from connito.local.processes import ForkLauncher, PlainLauncher, Program
from connito.local.supervisor import Supervisor
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir, Platform
from connito.platform.servers import NatsServer, ObjectStore
from connito.platform.session import BUCKET, REGION, local_store
from connito.platform.store_rights import Holder, holders, identities
from connito.runtime.compute import machine_folder
from connito.runtime.programs import service_module
from connito.store import ArtifactStore
from connito.v1.run_pb2 import RunSpec

T = TypeVar("T")
PATIENCE_SECONDS, ASK_EVERY = 60.0, 0.2
# Services that compute with a model are forked from the preloaded process. While one of `ALONE` computes, the others wait for it:
# a validator that measures with all cores leaves the others nothing to measure, and hidden states are computed once.
MODEL_SIDE = ("selector", "trainer", "validator", "aggregator")
ALONE = ("selector", "validator", "aggregator")


@dataclass(frozen=True)
class Role:
    """Specification of a service process: its identity, service, and settings of its own."""

    member: Member
    service: str
    settings: Mapping[str, str]


class Installation:
    """`async with Installation(...)`: servers are up inside, streams and bucket exist; all of it is gone outside."""

    def __init__(
        self,
        data: DataDir,
        participants: Iterable[tuple[str, str]],
        machine: Machine,
        seed: int | None,
        display: Display,
    ):
        self.data, self.machine, self.display = data, machine, display
        self.accounts = Accounts(data.root)
        self.accounts.make()
        self.members = load_members(data, self.accounts, list(participants), seed)
        self.roster = write_roster(data, self.accounts, self.members)
        self._stack = AsyncExitStack()
        self.holders: dict[str, Holder] = {}
        self.platform: Platform
        self.bus: Bus
        self.store: ArtifactStore
        self.fork_server: ForkLauncher
        self.supervisor: Supervisor

    @property
    def names(self) -> dict[str, str]:
        """Return the display names by public key."""
        return {member.identity.public: member.name for member in self.members.values()}

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        # Everything that is written from here on, by this process and by those that it starts, is its owner's alone.
        self._stack.callback(os.umask, os.umask(0o077))
        self.data.close_to_others()
        self.supervisor = Supervisor(self.data, self.display.say)
        log = self.data.logs / "fork-server.log"
        self.fork_server = await ForkLauncher.open(
            log, self._environment(), begun=lambda pid: self.supervisor.note("fork server", pid, log)
        )
        self._stack.push_async_callback(self.fork_server.close)
        secret = self._store_secret()
        nats = NatsServer(self.data.root / "nats", accounts=self.accounts, log_file=self.data.logs / "nats-server.log")
        self.holders = holders(
            ObjectStore.ACCESS_KEY, secret, {name: member.role for name, member in self.members.items()}
        )
        weed = ObjectStore(
            self.data.root / "objects",
            secret_key=secret,
            log_file=self.data.logs / "weed.log",
            identities=identities(self.holders),
        )
        self._stack.push_async_callback(self.supervisor.stop)
        await asyncio.gather(self.supervisor.serve(nats), self.supervisor.serve(weed))
        self.platform = Platform(os.getpid(), nats.url, weed.url, weed.access_key, secret)
        await self.note(partial(self.data.keep_threads, self.machine.alone))
        self._stack.callback(self.data.forget, self.data.platform_file)
        await self.publish()
        operator = self.members["operator"].identity
        bus = await _asking(lambda: Bus.connect(nats.url, operator, "up", self.roster))
        self.bus, self.store = await self._stack.enter_async_context(bus), local_store(self.platform, self.data)
        await asyncio.gather(_asking(lambda: streams.ensure(self.bus.js)), _asking(self.store.ensure_bucket))

    async def publish(self, **changes: Any) -> None:
        """Publish properties of the platform to other commands."""
        self.platform = replace(self.platform, **changes)
        await self.note(lambda: self.data.write_platform(self.platform))

    async def note(self, write: Callable[[], object]) -> None:
        """Write a small file of the folder, as soon as its disk takes it."""

        async def attempt() -> None:
            write()

        await patiently("a note of this run", attempt, self.display.say)

    async def start(self, roles: Iterable[Role]) -> None:
        """Start services and keep them running."""
        plain = PlainLauncher()
        for role in roles:
            launcher = self.fork_server if role.service in MODEL_SIDE else plain
            await self.supervisor.start(self._program(role), launcher, spare=role.service == "trainer")

    def services(self) -> list[Role]:
        """Return one process for each service of the control plane."""
        # Whoever holds an invite to this platform is let in by its coordinator.
        own = {"coordinator": {"admission": str(self.data.root)}}
        return [Role(self.members[name], name, own.get(name, {})) for name in SERVICES]

    def validators(self) -> list[Role]:
        """Return one process for each validator."""
        shared = {"losses_dir": str(self.data.root / "losses")}
        return [
            Role(m, "validator", shared | {"label": m.name}) for m in self.members.values() if m.role == "validator"
        ]

    def miners(self) -> list[Role]:
        """Return one process for each miner. An adversary is a trainer with a setting that makes it misbehave."""
        return [Role(m, "trainer", self._miner_settings(m)) for m in self.members.values() if m.role == "miner"]

    def groups(self, spec: RunSpec) -> list[Group]:
        """Return which processes a run needs how many of: each service, and of miners and validators what its policy asks for."""
        votes = {role: [m.name for m in self.members.values() if m.role == role] for role in ("miner", "validator")}
        most = len(votes["validator"]) // 2 + 1
        return [
            *(Group(frozenset((name,)), 1) for name in SERVICES),
            Group(frozenset(votes["miner"]), spec.windows.min_miners),
            Group(frozenset(votes["validator"]), max(spec.windows.min_validators, most)),
        ]

    def _miner_settings(self, member: Member) -> dict[str, str]:
        work = self.data.root / "miners"
        kind = member.name.rpartition("-")[0]
        half = str(self.machine.bf16).lower()
        settings = {"work_dir": str(work / member.name), "label": member.name, "bf16_parameters": half}
        if kind != "miner":
            settings |= {"trainer_adversary": kind, "trainer_victim_dir": str(work / "miner-1")}
            second = "miner-2" if "miner-2" in self.members else "miner-1"
            settings |= {"trainer_second_victim_dir": str(work / second)}
        return settings

    def _program(self, role: Role) -> Program:
        return Program(
            name=role.member.name,
            module=service_module(role.service),
            env=self._service_environment(role),
            log=self.data.logs / f"{role.member.name}.log",
            cwd=self.data.root,
        )

    def _service_environment(self, role: Role) -> dict[str, str]:
        ports = self.data.root / "ports"
        ports.mkdir(exist_ok=True)
        settings = {
            "nats_url": self.platform.nats_url,
            "key_file": str(self.data.keys / f"{role.member.name}.nk"),
            "roster": str(self.data.roster),
            "cache_dir": str(self.data.cache),
            "state_dir": str(self.data.root / "state"),
            "compute_dir": str(machine_folder()),
            "compute_slots": str(self.machine.slots),
            "torch_threads": str(self.machine.threads),
            "port_file": str(ports / f"{role.member.name}.json"),
        }
        if role.service in ALONE and self.machine.alone > 1:
            settings |= {"compute_slots": "1", "torch_threads": str(self.machine.alone)}
        holder = self.holders.get(role.member.name)
        if role.member.role == "miner":
            # As anywhere else, a miner has no bucket credentials; and no cache in which held-out text could lie.
            settings["cache_dir"] = str(self.miner_cache)
        elif holder is not None:
            settings |= {
                "s3_endpoint": self.platform.s3_endpoint,
                "s3_access_key": holder.access,
                "s3_secret_key": holder.secret,
                "s3_bucket": BUCKET,
                "s3_region": REGION,
            }
        extra = {f"CONNITO_{name.upper()}": value for name, value in {**settings, **role.settings}.items()}
        return {**self._environment(), **extra}

    @property
    def miner_cache(self) -> Path:
        """Return the cache of the miners, with public artifacts only."""
        return self.data.root / "cache-miners"

    def task_environment(self) -> dict[str, str]:
        """Return the environment of a task: its cache folder, and the threads of what computes alone."""
        cache = {name: value for name, value in os.environ.items() if name == "CONNITO_CACHE_DIR"}
        return {**self._environment(), **cache, "CONNITO_TORCH_THREADS": str(self.machine.alone)}

    def _environment(self) -> dict[str, str]:
        """Return the surrounding environment without Connito's settings, and with the threads of this machine."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}
        threads = str(self.machine.threads)
        return {
            **inherited,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # A thread that waits for another one sleeps instead of spinning: where the cores are shared with anything
            # else, spinning made the same work three to five times slower.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def _store_secret(self) -> str:
        """Return the store's secret key, made once for this data directory, and anew when its file is damaged."""
        path = self.data.keys / "store.secret"
        known = path.read_bytes() if path.exists() else b""
        if not re.fullmatch(rb"[0-9a-f]{40}", known):
            known = secrets.token_hex(20).encode()
            write_durably(path, known, 0o600)
        return known.decode()


async def _asking(attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what `attempt` does. A server that ended since it was ready is started anew, and asked again until then."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await attempt()
        except Retry:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(ASK_EVERY)
