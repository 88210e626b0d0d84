"""Faults that befall a run in `bench.chaos`: a seed chooses them, one after the other."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from connito.errors import ConnitoError
from connito.platform.datadir import DataDir
from connito.platform.session import local_store
from connito.store import ArtifactStore
from connito.store.named import ref_of_key
from connito.v1.artifacts_pb2 import ArtifactRef

from bench.chaos_cluster import lag

# How often each comes, and for how many seconds what passes by itself lasts.
SHARES = {"kill": 0.74, "stop": 0.14, "everything": 0.03, "full": 0.03, "rot": 0.03, "lost": 0.03}
LASTS = (1.0, 4.0)
DISK_BYTES = 1 << 30


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make `folder` a file system of its own, in memory; yield whether that could be done, which root only may."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "connito-chaos", str(folder)]
    done = shutil.which("mount") is not None and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Faults:
    """Faults of one run by a seed; `again` starts what runs it after everything was killed."""

    def __init__(self, data: DataDir, seed: int, kill_everything: Callable[[], None], *, own_disk: bool) -> None:
        self.data, self.rng, self._kill_everything = data, random.Random(seed), kill_everything
        self.counts: Counter[str] = Counter()
        self.kills: list[float] = []
        self.killed: list[str] = []
        self._restoring: list[asyncio.Task[None]] = []
        self._rotten: dict[Path, bytes] = {}
        shares = {kind: share for kind, share in SHARES.items() if own_disk or kind != "full"}
        self._kinds, self._weights = list(shares), list(shares.values())

    async def node(self, *, wait: bool) -> None:
        """Kill a node of the cluster; with `wait`, as soon as all of them have caught up."""
        path = self.data.root / "nats" / "nodes.json"
        if wait:
            await asyncio.to_thread(self._wait_until_current, path)
        self._signal(self.rng.choice(json.loads(path.read_text()))["pid"], signal.SIGKILL)

    def _wait_until_current(self, path: Path) -> None:
        while any(lag(row["monitor"]) for row in json.loads(path.read_text())):
            time.sleep(0.1)

    def one(self) -> None:
        """Kill one process, any."""
        rows = self.data.read_pids()
        name = self.rng.choice(sorted(rows))
        if self._signal(rows[name]["pid"], signal.SIGKILL):
            self.killed.append(name)

    async def strike(self) -> None:
        """Let one fault happen; what passes by itself passes later."""
        kind = self.rng.choices(self._kinds, self._weights)[0]
        if kind == "everything":
            self._kill_everything()
            self._count(kind, killed=True)
        elif kind == "full":
            self._fill()
        elif kind == "rot":
            self._rot()
        elif kind == "lost":
            await self._lose()
        elif rows := self.data.read_pids():
            pid = rows[self.rng.choice(sorted(rows))]["pid"]
            if kind == "stop" and self._signal(pid, signal.SIGSTOP):
                self._later(lambda: self._signal(pid, signal.SIGCONT))
            elif kind == "kill":
                self._signal(pid, signal.SIGKILL)

    async def away(self, programs: Sequence[str], seconds: float) -> None:
        """Kill servers, and hold a port of each, so that none comes back before so many seconds are over."""
        with ExitStack() as held:
            for name in programs:
                pid = self.data.read_pids()[name]["pid"]
                port = min(one.laddr.port for one in psutil.Process(pid).net_connections() if one.status == "LISTEN")
                self._signal(pid, signal.SIGKILL)
                taken = held.enter_context(socket.socket())
                while True:
                    with suppress(OSError):
                        # Bound and not listening: whoever calls is refused.
                        taken.bind(("127.0.0.1", port))
                        break
                    await asyncio.sleep(0.001)
            await asyncio.sleep(seconds)
        # The wait for what was told first after it is over counts from here.
        self.kills.append(time.monotonic())

    def _later(self, undo: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_later(self.rng.uniform(*LASTS), undo)

    def _count(self, kind: str, *, killed: bool = False) -> None:
        self.counts[kind] += 1
        if killed:
            self.kills.append(time.monotonic())

    def _signal(self, pid: int, number: signal.Signals) -> bool:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            if number in (signal.SIGKILL, signal.SIGSTOP):
                self._count("kill" if number == signal.SIGKILL else "stop", killed=number == signal.SIGKILL)
            return True
        return False

    def _fill(self) -> None:
        """Leave no room on the disk for a while."""
        ballast = self.data.root / "ballast"
        if not ballast.exists():
            with ballast.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            self._count("full")
            self._later(ballast.unlink)

    def _rot(self) -> None:
        """Flip a bit of a cached file under the same size and time, as whoever opens it next would find it."""
        files = sorted(
            path for path in self.data.root.glob("cache*/sha256/*/*") if not path.suffix and path.stat().st_size
        )
        if not files:
            return
        path = self.rng.choice(files)
        content, times = bytearray(path.read_bytes()), path.stat()
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        draft = path.with_name(f"{path.name}.rot")
        draft.write_bytes(content)
        draft.chmod(times.st_mode & 0o777)
        os.utime(draft, ns=(times.st_atime_ns, times.st_mtime_ns))
        draft.replace(path)
        self._rotten[path] = bytes(content)
        self._count("rot")

    async def _lose(self) -> None:
        """Take an object out of the store for a while."""
        if (store := self._store()) is None:
            return
        with suppress(ConnitoError, StopIteration):
            found = self.rng.choice(sorted(await store.objects(), key=lambda one: one.key))
            ref = ref_of_key(found.key, found.size, await store.media_type(found.key))
            content = await store.get_bytes(ref)
            # Before it is gone: whatever happens meanwhile, it comes back.
            self._restoring.append(asyncio.create_task(self._restore(ref, content, self.rng.uniform(*LASTS))))
            await store.remove(found.key, 0)
            self._count("lost")

    async def _restore(self, ref: ArtifactRef, content: bytes, after: float) -> None:
        await asyncio.sleep(after)
        while True:
            with suppress(ConnitoError):
                if (store := self._store()) is not None:
                    await store.put_bytes(content, ref.media_type, ref.realm)
                    return
            await asyncio.sleep(0.5)

    def _store(self) -> ArtifactStore | None:
        platform = self.data.read_platform()
        return None if platform is None else local_store(platform, self.data)

    async def over(self) -> None:
        """Wait until everything that was taken out is back, and remove the flipped copies that nobody has asked for since."""
        await asyncio.gather(*self._restoring)
        for path, content in self._rotten.items():
            if path.exists() and path.read_bytes() == content:
                path.unlink()
