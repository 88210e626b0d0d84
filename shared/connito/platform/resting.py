"""A platform at rest: what an ended `connito up` left, its broker and store started for somebody who reads.

No service runs, and nothing is written but the servers' own files. Both servers end with this process.
"""

from __future__ import annotations

import atexit
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from connito.errors import NotFound, Retry
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir, Platform
from connito.platform.servers import NatsServer, ObjectStore, Server

# Another reader of the same folder is done by then, where it is no console.
WAIT_SECONDS = 20.0

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
    without, `Retry` while another process holds it."""
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
    _hold(data, stack)
    logs = Path(stack.enter_context(TemporaryDirectory(prefix="connito-reader-")))
    secret = (data.root / "keys" / "store.secret").read_text().strip()
    accounts = Accounts(data.root) if (data.root / "accounts").is_dir() else None
    nats = NatsServer(data.root / "nats", accounts=accounts, log_file=logs / "nats-server.log")
    weed = ObjectStore(data.root / "objects", secret_key=secret, log_file=logs / "weed.log")
    servers: tuple[Server, ...] = (nats, weed)
    for server in servers:
        stack.callback(server.stop)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda server: server.start(), servers))
    return Platform(0, nats.url, weed.url, weed.access_key, secret, finished=True)


def _hold(data: DataDir, stack: ExitStack) -> None:
    give_up = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            stack.enter_context(data.lock())
        except Retry:
            # An `up` publishes where it is; a reader does not, and is soon done.
            if data.platform_file.exists():
                raise
            if time.monotonic() > give_up:
                raise Retry(
                    f"another command (process {data.owner() or 'unknown'}), a console perhaps, reads {data.root}, which one "
                    "can do at a time where no platform runs: end it, or wait until it is done"
                ) from None
            time.sleep(0.2)
        else:
            return
