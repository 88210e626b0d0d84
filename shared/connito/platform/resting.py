"""A platform at rest: what an ended `connito up` left, its broker and store started for somebody who reads.

No service runs, and nothing is written but the servers' own files. Both servers end with this process. Any number may read a
folder at once: whoever is not the first has servers of its own, on a copy.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from connito.bus.desk import Desk
from connito.errors import NotFound, Retry
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir, Platform
from connito.platform.servers import NatsServer, ObjectStore, Server
from connito.wire.identity import Identity
from connito.wire.tls import PLAIN

# The folder of a reader that is not the only one, with the number of its process.
READER = ".reader-"
# Linux' request to share the blocks of another file until either is written to.
_FICLONE = 0x40049409
_SOCKETS = shutil.ignore_patterns("*.sock", "*.pid")

_awake: dict[Path, Platform] = {}


def rests(data: DataDir) -> bool:
    """Return whether the folder holds what is needed to read its runs."""
    needed = ("nats", "objects", "roster.json", "keys/store.secret", "keys/customer.nk")
    return all((data.root / name).exists() for name in needed)


def make_room(data: DataDir) -> None:
    """Let broker and store of a folder that lost them start with nothing, where the keys of them are there."""
    if (data.keys / "store.secret").exists():
        for name in ("nats", "objects"):
            (data.root / name).mkdir(mode=0o700, exist_ok=True)


def wake(data: DataDir) -> Platform:
    """Return the broker and the store of a folder at rest, started once for this process. Raises `NotFound` for a folder
    without, `Retry` while a platform runs in it."""
    root = data.root.resolve()
    if root not in _awake:
        if not rests(data):
            raise NotFound(f"{data.root} holds no platform: nothing was run there; start one with `connito up`")
        stack = ExitStack()
        try:
            _awake[root] = _start(data, stack)
        except BaseException:
            stack.close()
            raise
        # Before what ends servers the hard way, which they registered themselves: last in, first out.
        atexit.register(stack.close)
        stack.callback(_awake.pop, root, None)
    return _awake[root]


def _start(data: DataDir, stack: ExitStack) -> Platform:
    root = data.root if _hold(data, stack) else _copy(data, stack)
    logs = Path(stack.enter_context(TemporaryDirectory(prefix="connito-reader-")))
    secret = (data.root / "keys" / "store.secret").read_text().strip()
    accounts = Accounts(data.root) if (data.root / "accounts").is_dir() else None
    nats = NatsServer(root / "nats", accounts=accounts, log_file=logs / "nats-server.log")
    weed = ObjectStore(root / "objects", secret_key=secret, log_file=logs / "weed.log")
    servers: tuple[Server, ...] = (nats, weed)
    for server in servers:
        stack.callback(server.stop)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda server: server.start(), servers))
    if accounts is not None:
        _serve_desk(nats.url, accounts, stack)
    return Platform(0, nats.url, weed.url, weed.access_key, secret, finished=True)


def _serve_desk(url: str, accounts: Accounts, stack: ExitStack) -> None:
    """Hand on what readers ask, in a thread of this process: no committer is there to do it."""
    desk = Desk(url, accounts.welcome("committer", Identity.generate()), "reader", PLAIN, lambda _: None)
    loop = asyncio.new_event_loop()
    serving = loop.create_task(desk.serve())

    def serve() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)
        loop.close()

    thread = Thread(target=serve, name="desk", daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(lambda: loop.call_soon_threadsafe(serving.cancel))


def _hold(data: DataDir, stack: ExitStack) -> bool:
    """Take the folder, unless another reader has it. Raises `Retry` where a platform runs there."""
    try:
        stack.enter_context(data.lock())
    except Retry:
        # An `up` publishes where it is; a reader does not.
        if data.platform_file.exists():
            raise
        return False
    return True


def _copy(data: DataDir, stack: ExitStack) -> Path:
    """Return a folder with the log and the objects as they are now, for servers of this reader's own; it goes with the reader.

    It lies in the data directory, where many file systems copy without reading: the copies share blocks until one is written
    to. No file is linked. Servers mend what they start from in place, and cut what does not fit.
    """
    for old in data.root.glob(f"{READER}*"):
        if not _lives(old):
            shutil.rmtree(old, ignore_errors=True)
    root = Path(stack.enter_context(TemporaryDirectory(prefix=f"{READER}{os.getpid()}-", dir=data.root)))
    for part in ("nats", "objects"):
        shutil.copytree(data.root / part, root / part, copy_function=_take, symlinks=True, ignore=_SOCKETS)
    return root


def _take(source: str, target: str) -> None:
    # The other reader's servers may put away what they had for themselves.
    with suppress(FileNotFoundError):
        with Path(source).open("rb") as whole, Path(target).open("wb") as copy, suppress(OSError):
            fcntl.ioctl(copy, _FICLONE, whole.fileno())
            return
        shutil.copyfile(source, target)


def _lives(folder: Path) -> bool:
    number = folder.name.removeprefix(READER).partition("-")[0]
    return number.isdigit() and Path("/proc", number).exists()
