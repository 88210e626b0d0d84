"""Certificate expiry, read from a TLS server and from one that speaks first as NATS does."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from connito.runtime import metrics
from connito.service import certificates
from connito.wire.tls import Tls

from tests.authority import Authority


@pytest.fixture
def server_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A certificate for `localhost` that is good for ten days and trusted by this process."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "10", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def test_only_addresses_with_tls_are_watched() -> None:
    urls = ("tls://a:4222,tls://b", "nats://c:4222", "http://d:8333", "https://e", "")
    assert certificates.endpoints(urls) == [("tls", "a", 4222), ("tls", "b", 4222), ("https", "e", 443)]


async def test_nothing_to_watch_returns() -> None:
    await asyncio.wait_for(certificates.watch(["nats://127.0.0.1:4222"]), 1)


async def test_the_gauge_says_when_a_certificate_ends(server_context: ssl.SSLContext) -> None:
    async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"tls_required":true}\r\n')
        await writer.start_tls(server_context)
        await idle(reader, writer)

    async with (
        await asyncio.start_server(idle, "127.0.0.1", 0, ssl=server_context) as https,
        await asyncio.start_server(greet, "127.0.0.1", 0) as nats,
    ):
        ports = [server.sockets[0].getsockname()[1] for server in (https, nats)]
        context = ssl.create_default_context()
        for scheme, port in zip(("https", "tls"), ports, strict=True):
            ends = await certificates.expiry(scheme, "localhost", port, context)
            assert 9 * 86400 < ends - time.time() <= 10 * 86400
            await certificates.look([(scheme, "localhost", port)], Tls())
            assert metrics.CERTIFICATE_EXPIRY.labels(f"localhost:{port}")._value.get() == ends


async def test_a_store_of_a_public_authority_is_watched_beside_a_bus_of_a_private_one(
    server_context: ssl.SSLContext, tmp_path: Path
) -> None:
    """CONNITO_TLS_CA is for bus and APIs; the store's client trusts what this machine does."""

    async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    private = Authority.make(tmp_path / "private")
    async with await asyncio.start_server(idle, "127.0.0.1", 0, ssl=server_context) as https:
        port = https.sockets[0].getsockname()[1]
        await certificates.look([("https", "localhost", port)], Tls(ca=private.certificate))
    assert metrics.CERTIFICATE_EXPIRY.labels(f"localhost:{port}")._value.get() > time.time()


async def test_an_endpoint_that_is_away_keeps_the_last_value() -> None:
    gauge = metrics.CERTIFICATE_EXPIRY.labels("127.0.0.1:1")
    gauge.set(42)
    await certificates.look([("https", "127.0.0.1", 1)])
    assert gauge._value.get() == 42


async def test_files_that_are_being_replaced_end_no_watch(server_context: ssl.SSLContext, tmp_path: Path) -> None:
    """The watch ended in silence, and the alert kept the last date it had."""
    await certificates.look([("tls", "localhost", 1)], Tls(ca=tmp_path / "away.pem"))
