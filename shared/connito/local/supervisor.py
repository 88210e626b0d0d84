"""Supervise servers and services: restart what died, stop everything at the end."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from connito.errors import Fatal, Invalid, Retry
from connito.local.footprint import trim
from connito.local.patience import patiently
from connito.local.processes import Launcher, Process, Program
from connito.platform.datadir import DataDir, start_time
from connito.platform.servers import Server
from connito.platform.spawning import last_lines
from connito.render import formats
from connito.runtime.tasks import end_tasks

# What dies this often within the window will not get better by being started once more.
GIVE_UP_AFTER = 6
GIVE_UP_WITHIN = 30.0
_FIRST_DELAY, _LAST_DELAY = 0.2, 5.0
# One that others can do without is tried again after this long.
_ASIDE_SECONDS = 60.0
_LOOK_EVERY, _TRIM_EVERY = 0.25, 30.0
# How often a server that runs is asked whether it can still write.
_ASK_EVERY = 3.0
# With less than this free nothing that is started can write, which is no fault of its own.
_FULL_BYTES = 16 << 20


@dataclass
class _Supervised:
    """State of a supervised process."""

    name: str
    log: Path
    module: str = ""
    pid: int = 0
    restarts: int = 0
    spare: bool = False
    aside: bool = False
    started: float = 0.0
    process: Process | None = None
    deaths: list[float] = field(default_factory=list)

    def is_aside(self, now: float) -> bool:
        """Return whether it was set aside, and has not lived since for long enough to be one of those that live."""
        return self.aside and (not self.pid or now - self.started < GIVE_UP_WITHIN)

    def died(self, code: int, now: float) -> float:
        """Return the seconds until the next start. Raises `Fatal` when there have been too many."""
        self.aside = self.is_aside(now)
        self.deaths = [*(then for then in self.deaths if now - then < GIVE_UP_WITHIN), now]
        if len(self.deaths) >= (1 if self.aside else GIVE_UP_AFTER):
            raise Fatal(
                f"{self.name} ended {len(self.deaths)} times within {GIVE_UP_WITHIN:.0f} s ({describe_exit(code)}). "
                f"Its log, {self.log}, ends with:\n{last_lines(self.log)}"
            )
        return min(_LAST_DELAY, _FIRST_DELAY * 2.0 ** (len(self.deaths) - 1))


class Supervisor:
    """`start` each service once; `failed` resolves when one cannot be kept alive. Always `stop` at the end."""

    def __init__(self, data: DataDir, announce: Callable[[str], None]) -> None:
        self._data, self._announce = data, announce
        self._kept: dict[str, _Supervised] = {}
        self._servers: list[Server] = []
        self._watchers: set[asyncio.Task[None]] = set()
        self._stopping = False
        # The fewest of those that are spare with which the run goes on.
        self.needed = 1
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keep(self._trim())

    @property
    def restarts(self) -> dict[str, int]:
        """Return restarts by name, of processes that were restarted."""
        return {name: kept.restarts for name, kept in self._kept.items() if kept.restarts}

    def note(self, name: str, pid: int, log: Path) -> None:
        """List a process in pids.json that is not ours to restart; one that takes the place of another was restarted."""
        before = self._kept.get(name)
        self._kept[name] = _Supervised(name, log, pid=pid, restarts=0 if before is None else before.restarts + 1)
        self._write_pids()

    async def serve(self, server: Server) -> None:
        """Start a broker or store, and start it again on the same ports and data when it dies."""
        await patiently(server.program, partial(self._start_server, server), self._announce)
        self._servers.append(server)
        kept = self._kept[server.program] = _Supervised(server.program, server.log_file, pid=server.pid)
        self._write_pids()
        self._keep(self._watch_server(kept, server))

    async def start(self, program: Program, launcher: Launcher, *, spare: bool = False) -> None:
        """Start a service and keep it running. A `spare` one that keeps dying is set aside while others of them live."""
        kept = self._kept[program.name] = _Supervised(program.name, program.log, program.module, spare=spare)
        await patiently(kept.name, partial(self._launch, kept, program, launcher), self._announce)
        self._keep(self._watch_service(kept, program, launcher))

    async def _trim(self) -> None:
        while True:
            await asyncio.sleep(_TRIM_EVERY)
            await asyncio.to_thread(trim, self._data.logs)

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Stop every service, all at the same time; then the servers, which they need until they are done."""
        self._stopping = True
        await end_tasks(self._watchers)
        running = [kept.process for kept in self._kept.values() if kept.process is not None]
        await asyncio.gather(*(process.stop(grace_seconds) for process in running))
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in self._servers))
        if not self.failed.done():
            self.failed.cancel()
        self._data.forget(self._data.pids)

    async def _launch(self, kept: _Supervised, program: Program, launcher: Launcher) -> None:
        kept.process = await launcher.start(program)
        kept.pid, kept.started = kept.process.pid, time.monotonic()
        self._write_pids()

    async def _watch_service(self, kept: _Supervised, program: Program, launcher: Launcher) -> None:
        while True:
            assert kept.process is not None
            code = await asyncio.shield(kept.process.exited)
            try:
                await self._rest(kept, code)
            except Fatal:
                left = sum(
                    one.spare and not one.is_aside(time.monotonic()) for one in self._kept.values() if one is not kept
                )
                if not left or not kept.spare:
                    raise
                if kept.aside and left < self.needed:
                    raise Fatal(self._too_few(kept, code, left)) from None
                await self._set_aside(kept, code, left)
            self._again(kept, code)
            await patiently(kept.name, partial(self._launch, kept, program, launcher), self._announce)

    async def _watch_server(self, kept: _Supervised, server: Server) -> None:
        asked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if server.running:
                if time.monotonic() - asked >= _ASK_EVERY:
                    await self._end_stuck(server)
                    asked = time.monotonic()
                continue
            assert server.process is not None
            code = int(server.process.returncode)
            await self._rest(kept, code, server.data_dir)
            await self._wait_for_ports(server)
            self._again(kept, code)
            try:
                await patiently(server.program, partial(self._start_server, server), self._announce)
            except (Invalid, Retry):
                # One that was killed while it started is started again like any other.
                if server.process.returncode is None or server.process.returncode >= 0:
                    raise
                continue
            kept.pid = server.pid
            self._write_pids()

    async def _end_stuck(self, server: Server) -> None:
        """End a server that runs and cannot write any more, once there is room: started again it can."""
        if (why := await server.stuck()) and server.running:
            self._announce(f"{server.program} cannot write, and is ended to be started again: {why}")
            await self._room(server.program, server.data_dir)
            await asyncio.to_thread(server.stop)

    async def _start_server(self, server: Server) -> None:
        """Start a server; one that starts while everything stops must still be stopped, and so is not left half-way.

        Raises `OSError` when its process began, and ended for want of room.
        """
        before = server.process
        try:
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(server.start)))
        except (Invalid, Retry) as error:
            # One whose port is taken, or that is set up wrongly, has no process yet: that is no want of room.
            if server.process is before or server.running or not _full(server.data_dir):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(server.data_dir)) from error

    async def _rest(self, kept: _Supervised, code: int, folder: Path | None = None) -> None:
        """Wait until what died may start again, on a full disk until there is room. Raises `Fatal` when it died too often."""
        if await self._room(f"{kept.name} ended, and", folder or self._data.root):
            kept.deaths = []
        await asyncio.sleep(kept.died(code, time.monotonic()))

    async def _room(self, who: str, folder: Path) -> bool:
        """Wait until there is room on a disk, and say so; return whether that had to be waited for."""
        told = False
        while _full(folder):
            if not told:
                self._announce(f"{who} waits: the disk of {folder} is full; free space there")
            told = True
            await asyncio.sleep(_FIRST_DELAY)
        return told

    async def _wait_for_ports(self, server: Server) -> None:
        """Wait until nobody else has a server's port: everybody here knows it by that one."""
        told = False
        while True:
            try:
                return server.check_ports()
            except Invalid as error:
                if not told:
                    self._announce(f"{server.program} waits: {error}")
                told = True
                await asyncio.sleep(_LOOK_EVERY)

    async def _set_aside(self, kept: _Supervised, code: int, left: int) -> None:
        kept.pid, kept.aside = 0, True
        self._write_pids()
        waits = (
            f"the run needs {formats.count(self.needed, 'miner')} "
            f"(windows.min_miners): if it ends again then, `connito up` ends, and "
            "the run stays as it is"
        )
        others = "the others go on" if left >= self.needed else waits
        self._announce(
            f"{kept.name} keeps ending ({describe_exit(code)}) and is set aside for {_ASIDE_SECONDS:.0f} s; {others}. "
            f"Its log is {kept.log}"
        )
        await asyncio.sleep(_ASIDE_SECONDS)

    def _too_few(self, kept: _Supervised, code: int, left: int) -> str:
        return (
            f"{kept.name} keeps ending ({describe_exit(code)}), and the run needs {formats.count(self.needed, 'miner')} "
            f"(windows.min_miners), of which {left} live. The run stays as it is: mend this and go on with `connito up`, "
            f"or start another one with `connito up --new`. The log of {kept.name}, {kept.log}, ends with:\n"
            f"{last_lines(kept.log)}"
        )

    def _again(self, kept: _Supervised, code: int) -> None:
        kept.restarts += 1
        self._announce(f"{kept.name} ended ({describe_exit(code)}) and is started again")

    def _keep(self, watching: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(watching)
        self._watchers.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._watchers.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)

    def _write_pids(self) -> None:
        """List what runs. Where the disk is full, go on: what runs ends with this process, listed or not."""
        with suppress(OSError):
            self._data.write_pids(self._rows())

    def _rows(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "pid": kept.pid,
                "module": kept.module,
                "restarts": kept.restarts,
                "started": start_time(kept.pid),
            }
            for name, kept in self._kept.items()
            if kept.pid
        }


def _full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL_BYTES


def describe_exit(code: int) -> str:
    """Return an exit code in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
