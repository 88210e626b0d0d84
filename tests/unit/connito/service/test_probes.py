"""The probe port as kubelet, Prometheus and a hostile client see it."""

from __future__ import annotations

import asyncio
import http.client
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from connito.errors import Fatal
from connito.service import probes
from connito.service.probes import Probes
from prometheus_client import CONTENT_TYPE_LATEST


def get(port: int, path: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read()
    finally:
        connection.close()


async def ask(port: int, path: str) -> tuple[int, str, bytes]:
    return await asyncio.to_thread(get, port, path)


@contextmanager
def half_a_request(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX-Never-Ending: ")
        yield client


@pytest.fixture
def missing() -> list[str]:
    """What the service says it is not ready for, if anything."""
    return []


@pytest.fixture
async def port(missing: list[str]) -> AsyncIterator[int]:
    server = Probes("127.0.0.1", 0, lambda: "".join(missing))
    yield server.port
    await server.close()


async def test_paths_status_codes_and_content_types(port: int, missing: list[str]) -> None:
    assert await ask(port, "/healthz") == (200, "text/plain", b"alive\n")
    assert await ask(port, "/readyz?verbose=1") == (200, "text/plain", b"ready\n")
    missing.append("no broker")
    assert await ask(port, "/readyz") == (503, "text/plain", b"not ready: no broker\n")
    assert await ask(port, "/healthz") == (200, "text/plain", b"alive\n")
    status, kind, body = await ask(port, "/metrics")
    assert (status, kind) == (200, CONTENT_TYPE_LATEST)
    assert b"python_info" in body
    assert await ask(port, "/elsewhere") == (404, "text/plain", b"/metrics, /waiting, /healthz and /readyz are here\n")


async def test_a_loop_that_hangs_is_not_healthy(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CONNECTION_SECONDS", 0.2)
    asked = asyncio.get_running_loop().run_in_executor(None, get, port, "/healthz")
    time.sleep(1.0)  # noqa: ASYNC251 - the hang is the test
    assert await asked == (503, "text/plain", b"the event loop hangs\n")
    assert (await ask(port, "/healthz"))[0] == 200


async def test_slow_clients_hold_nobody_up_and_are_cut_off(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CONNECTION_SECONDS", 0.0)
    with ExitStack() as stack:
        slow = [stack.enter_context(half_a_request(port)) for _ in range(20)]
        assert (await ask(port, "/metrics"))[0] == 200

        def drip(client: socket.socket) -> None:
            """Send a byte now and then until the other side has had enough."""
            for _ in range(300):
                client.sendall(b"x")
                time.sleep(0.05)

        with pytest.raises(OSError):
            await asyncio.to_thread(drip, slow[0])
        assert (await ask(port, "/metrics"))[0] == 200


async def test_beyond_so_many_connections_the_next_is_hung_up_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_CONNECTIONS", 3)
    crowded = Probes("127.0.0.1", 0, lambda: "")
    try:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(half_a_request(crowded.port))
            with pytest.raises((http.client.HTTPException, OSError)):
                await ask(crowded.port, "/healthz")
        async with asyncio.timeout(20):
            while True:
                try:
                    assert (await ask(crowded.port, "/healthz"))[0] == 200
                except (http.client.HTTPException, OSError):
                    await asyncio.sleep(0.05)
                else:
                    break
    finally:
        await crowded.close()


async def test_a_taken_port_says_what_to_set(port: int) -> None:
    with pytest.raises(Fatal, match=f"cannot listen on 127.0.0.1:{port}: .*set CONNITO_HTTP_PORT"):
        Probes("127.0.0.1", port, lambda: "")


async def test_an_address_that_is_not_here_says_what_to_set() -> None:
    with pytest.raises(Fatal, match=r"cannot listen on 192\.0\.2\.7:0: .*set CONNITO_HTTP_HOST"):
        Probes("192.0.2.7", 0, lambda: "")
