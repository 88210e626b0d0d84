"""Owning real servers: they are ready when they say so, die with their owner, and say what is wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer, ObjectStore
from connito.wire.identity import Identity

from tests.support.waiting import declared, wait_until

pytestmark = pytest.mark.integration

OWNER = """
import sys, time
from pathlib import Path
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer, ObjectStore
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


async def test_streams_of_a_server_without_accounts_go_on_in_one_with_them(tmp_path: Path) -> None:
    """And back: who opens the folder without its accounts reads the same."""
    accounts = Accounts(tmp_path / "accounts")
    accounts.make()
    operator = accounts.welcome("operator", Identity.generate())
    counted = []
    for trusted, key in ((None, None), (accounts, operator), (accounts, operator), (None, None)):
        with NatsServer(tmp_path / "nats", accounts=trusted) as server:
            async with await Bus.connect(server.url, key, "test") as bus:
                await declared(bus.js)
                await bus.js.publish("connito.v1.r.run.0.created", b"x")
                counted.append((await bus.js.stream_info("RUNS")).state.messages)
    assert counted == [1, 2, 3, 4]


def test_a_port_in_use_is_named(own_nats: NatsServer, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=str(own_nats.port)):
        NatsServer(tmp_path / "second", port=own_nats.port).start()


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "bad")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "jetstream").write_text("not a folder")
    with pytest.raises(Invalid, match="storage directory is not a directory"):
        server.start()


@pytest.mark.parametrize("part", ["clients", "s3", "filer.grpc"])
def test_a_port_that_another_took_before_it_listened_is_picked_again(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of two installations that start side by side: both found the port free, and one was faster."""
    server = NatsServer(tmp_path) if part == "clients" else ObjectStore(tmp_path)
    (taken, prepare) = (server._ports()[part], server._prepare)
    with socket.socket() as faster:

        def meanwhile() -> list[str]:
            if server._ports()[part] == taken:
                faster.bind(("127.0.0.1", taken))
                faster.listen()
            return prepare()

        monkeypatch.setattr(server, "_prepare", meanwhile)
        with server.start():
            assert server._ports()[part] != taken


def test_a_port_that_was_asked_for_is_not_picked_again(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(Invalid, match="another program has it"):
            NatsServer(tmp_path, other.getsockname()[1]).start()


def test_anothers_broker_on_the_port_is_not_ones_own(tmp_path: Path) -> None:
    with NatsServer(tmp_path / "other") as other:
        own = NatsServer(tmp_path / "own", other.port)
        own._name = "connito-local-mine"
        assert own._not_ready() == "no greeting of its own"
        assert other._not_ready() == ""
