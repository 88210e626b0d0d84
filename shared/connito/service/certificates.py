"""Monitoring of the expiry of certificates of the endpoints that a service depends on."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from connito.errors import Fatal
from connito.runtime import metrics
from connito.wire.tls import PLAIN, Tls

INTERVAL_S = 3600.0
# The NATS protocol speaks first in clear text and turns to TLS after the server's INFO line.
_INFO_FIRST = {"tls": 4222, "nats": 4222}
_TLS_AT_ONCE = {"https": 443, "wss": 443}


def endpoints(urls: Iterable[str]) -> list[tuple[str, str, int]]:
    """Return (scheme, host, port) of those addresses among `urls` (each possibly a comma-separated list) that use TLS."""
    found = []
    for url in (part.strip() for several in urls for part in several.split(",")):
        split = urlsplit(url)
        if split.hostname and (split.scheme in _TLS_AT_ONCE or split.scheme == "tls"):
            found.append((split.scheme, split.hostname, split.port or (_TLS_AT_ONCE | _INFO_FIRST)[split.scheme]))
    return found


def context_of(scheme: str, tls: Tls) -> ssl.SSLContext:
    """Return what trusts an endpoint as its client does: the bus by `tls`, the store by the authorities of this machine."""
    return ssl.create_default_context() if scheme in _TLS_AT_ONCE else tls.context()


async def expiry(scheme: str, host: str, port: int, context: ssl.SSLContext, timeout_s: float = 10.0) -> float:
    """Return Unix seconds at which the certificate that `host` shows stops being valid. Raises `OSError` when it shows
    none.
    """
    async with asyncio.timeout(timeout_s):
        at_once = scheme in _TLS_AT_ONCE
        reader, writer = await asyncio.open_connection(host, port, ssl=context if at_once else None)
        try:
            if not at_once:
                await reader.readline()
                await writer.start_tls(context, server_hostname=host)
            certificate = writer.get_extra_info("peercert")
        finally:
            writer.close()
            with suppress(OSError, ssl.SSLError):
                await writer.wait_closed()
    if not certificate:
        raise OSError(f"{host}:{port} showed no certificate")
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))


async def look(watched: Iterable[tuple[str, str, int]], tls: Tls = PLAIN) -> None:
    """Set `connito_certificate_expiry_timestamp_seconds` for each endpoint, once.

    A certificate that is refused because it has expired counts as expiring now. One that cannot be fetched keeps
    its last value: that the endpoint is away is another metric's story.
    """
    for scheme, host, port in watched:
        gauge = metrics.CERTIFICATE_EXPIRY.labels(f"{host}:{port}")
        try:
            gauge.set(await expiry(scheme, host, port, context_of(scheme, tls)))
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
                gauge.set(time.time())
        except (OSError, TimeoutError, Fatal):  # Files that are just being replaced are read at the next look.
            continue


async def watch(urls: Iterable[str], interval_s: float = INTERVAL_S, tls: Tls = PLAIN) -> None:
    """Run `look` forever; return at once where nothing uses TLS."""
    watched = endpoints(urls)
    while watched:
        await look(watched, tls)
        await asyncio.sleep(interval_s)
