"""Owning real servers: they are ready when they say so, die with their owner, and say what is wrong."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.errors import Invalid, Retry
from connito.platform.servers import NatsServer
from connito.wire.identity import Identity

from tests.support.waiting import wait_until

pytestmark = pytest.mark.integration

OWNER = """
import sys, time
from pathlib import Path
from connito.platform.servers import NatsServer
server = NatsServer(Path(sys.argv[1])).start()
print(server.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie that nobody has reaped counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_dies_with_a_killed_owner(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        assert not gone(server)
        owner.kill()
    wait_until(lambda: gone(server), "the server to end")


def test_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        # Its death signal would have come with the end of the thread.
        with socket.create_connection(("127.0.0.1", server.port), timeout=2) as connection:
            assert connection.recv(5) == b"INFO "
        assert server.running
    finally:
        server.stop()


async def test_users_change_without_a_restart(tmp_path: Path) -> None:
    first, second = Identity.generate(), Identity.generate()
    with NatsServer(tmp_path, users=[{"nkey": first.public}]) as server:
        async with await Bus.connect(server.url, first, "first") as bus:
            with pytest.raises(Invalid):
                await Bus.connect(server.url, second, "second")
            await asyncio.to_thread(server.set_users, [{"nkey": first.public}, {"nkey": second.public}])
            async with await Bus.connect(server.url, second, "second"):
                assert bus.connected


def test_a_reload_that_fails_is_told(tmp_path: Path) -> None:
    with NatsServer(tmp_path, users=[]) as server, pytest.raises(Retry, match="nkey"):
        server.set_users([{"nkey": "not a key"}])


def test_a_port_in_use_is_named(own_nats: NatsServer, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=str(own_nats.port)):
        NatsServer(tmp_path / "second", port=own_nats.port).start()


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "bad", users=[{"nkey": "not a key"}])
    with pytest.raises(Invalid, match="nkey"):
        server.start()
