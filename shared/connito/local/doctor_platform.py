"""`connito doctor` over a platform: broker, clock, where runs stand, certificates, store rights and bandwidth."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import ConnitoError, Fatal
from connito.render import formats
from connito.service import certificates

if TYPE_CHECKING:
    from connito.bus import Bus
    from connito.platform.session import Session
    from connito.protocol.rules import Stake
    from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Check:
    """A finding about the machine or the platform. `remedy`: what to do when it is not `ok`; a `warning` does not fail."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    warning: bool = False


# Presigned links and envelopes carry times; a store refuses a request that is a quarter of an hour off.
MAX_SKEW_SECONDS = 5.0
PROBE_BYTES = 4 << 20
SLOW_BYTES_PER_SECOND = 1_000_000
EXPIRY_WARNING_DAYS = 14
_TLS_SECONDS = 5.0
_RUNS = 10  # Named on one line, those that stand still first.
X509_HAS_EXPIRED = 10  # What OpenSSL calls X509_V_ERR_CERT_HAS_EXPIRED.


async def look(session: Session, *, with_store: bool) -> list[Check]:
    """Run every check at once; they come in an order in which the first that fails explains those after it."""
    looks = [_broker(session), _expiries(session), *([_store(session)] if with_store else [])]
    return [check for found in await asyncio.gather(*looks) for check in found]


async def _broker(session: Session) -> list[Check]:
    try:
        async with session.bus() as bus:
            last = await bus.last_sequence("RUNS")
            checks = [Check("broker", True, f"{session.nats_url}, {formats.count(last, 'message')} in its log of runs")]
            # Others may not ask the broker for its time.
            if not session.identity.passes or session.roster.serves(session.identity.public):
                checks.append(await _clock(bus))
            return [*checks, await _resume(session, bus)]
    except ConnitoError as error:
        here = session.platform is not None
        remedy = "`connito down` and `connito up` start it anew" if here else "if it goes on, ask its operator"
        return [Check("broker", False, str(error), f"see the message; {remedy}")]


async def _clock(bus: Bus) -> Check:
    """Check this machine's clock against the broker's, which numbers and dates every message."""
    began = time.time()
    now = await bus.time()
    return clock(now - (began + time.time()) / 2, "broker")


def clock(skew: float, whose: str) -> Check:
    """Return whether this machine's clock is near enough to another's; `skew` in seconds."""
    remedy = "let NTP or chrony set this machine's clock; the store refuses requests that are too far off"
    return Check("clock", abs(skew) <= MAX_SKEW_SECONDS, f"{skew:+.2f} s from the {whose}'s", remedy)


async def _resume(session: Session, bus: Bus) -> Check:
    """Check the runs that have not ended, and what they wait for."""
    from connito.platform.log import hear_trained, read_runs
    from connito.protocol.quorum import overdue

    log = await read_runs(session, bus)
    stake, now = session.roster.stake, int(time.time() * 1000)
    runs = [facts for facts in log.runs.values() if facts.spec is not None and facts.ended is None]
    # Who has trained decides nothing before the deadline, and may be many messages.
    for facts in runs:
        if facts.open_window is not None and facts.open_window.deadline_unix_ms <= now:
            await hear_trained(bus, log, facts.run)
    stuck = [facts for facts in runs if overdue(facts, now, stake)]
    told = [*stuck, *(facts for facts in runs if facts not in stuck)]
    found = "; ".join(f"{facts.run}: {_where(facts, now, stake)}" for facts in told[:_RUNS]) or "no run is under way"
    if more := told[_RUNS:]:
        found += f"; and {len(more)} more"
    remedy = "nothing closed the window: see the coordinator's log, and whether one leads (`connito status`)"
    return Check("runs", not stuck, found, remedy if stuck else "", warning=True)


def _where(facts: RunFacts, now_ms: int, stake: Stake) -> str:
    from connito.protocol.quorum import pause
    from connito.views.live import phase

    return phase(facts, now_ms, pause(facts, now_ms, stake))


async def _expiries(session: Session) -> list[Check]:
    store = session.platform.s3_endpoint if session.platform else os.environ.get("CONNITO_S3_ENDPOINT", "")
    shown = dict.fromkeys(certificates.endpoints([session.nats_url, store]))
    return await asyncio.gather(*(_expiry(session, *endpoint) for endpoint in shown))


async def _expiry(session: Session, scheme: str, host: str, port: int) -> Check:
    name, remedy = f"certificate of {host}:{port}", "renew it, and reload the server that shows it"
    try:
        context = certificates.context_of(scheme, session.tls)
        end = await certificates.expiry(scheme, host, port, context, _TLS_SECONDS)
    except TimeoutError:
        return Check(
            name, False, f"nobody answers there within {_TLS_SECONDS:.0f} s", "start it, or open the way to it"
        )
    except (OSError, Fatal) as error:
        trusted = "CONNITO_TLS_CA" if scheme == "tls" else "SSL_CERT_FILE"
        untrusted = f"see the message; {trusted} names the authority to trust"
        expired = isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == X509_HAS_EXPIRED
        return Check(name, False, str(error), remedy if expired else untrusted)
    days = (end - time.time()) / 86400
    found = f"valid until {formats.day(1000 * end)}, {formats.count(round(days), 'day')}"
    return Check(name, days > EXPIRY_WARNING_DAYS, found, remedy, warning=days > 0)


async def _store(session: Session) -> list[Check]:
    """Check the store's rights and bandwidth with an object that is written and read back."""
    from connito.store.named import ref_of_bytes
    from connito.store.owner import claim
    from connito.v1.artifacts_pb2 import REALM_PUBLIC

    remedy = "check the store's address, keys and the bucket's policy"
    try:
        store: Any = session.store()
        await claim(store, session.roster, first=False)
        # The same bytes each time: a store that has them does not grow.
        data = bytes(range(256)) * (PROBE_BYTES // 256)
        await store.put_bytes(b"connito doctor", "text/plain", REALM_PUBLIC)
        there = await store.stat(ref_of_bytes(data, "application/octet-stream", REALM_PUBLIC)) is not None
        began = time.monotonic()
        ref = await store.put_bytes(data, "application/octet-stream", REALM_PUBLIC)
        written = time.monotonic()
        await store.read_range(ref, 0, ref.size)
        read = time.monotonic()
    except ConnitoError as error:
        return [Check("store rights", False, str(error), remedy)]
    down, up = PROBE_BYTES / max(read - written, 1e-6), PROBE_BYTES / max(written - began, 1e-6)
    slow = "the submit window waits for the slowest uplink: use a closer store, or a faster line"
    # An artifact is uploaded once; what an earlier look measured is not measured again.
    uplink = "up not measured, the probe is there already" if there else f"{formats.size(up)}/s up"
    enough = down >= SLOW_BYTES_PER_SECOND and (there or up >= SLOW_BYTES_PER_SECOND)
    return [
        Check("store rights", True, "an object was written and read back"),
        Check(
            "bandwidth",
            enough,
            f"{formats.size(down)}/s down, {uplink} ({formats.size(PROBE_BYTES)})",
            slow,
            warning=True,
        ),
    ]
