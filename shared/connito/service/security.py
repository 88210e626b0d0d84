"""Events of attack or misconfiguration: counted, and reported to the operator over the bus.

Whoever notices something calls `report`; a service's `publish` writes what has gathered to ADVISORIES, one message for
everything of the same kind about the same key, so that a flood of offences is not a flood of reports.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from connito.bus import Bus
from connito.bus.offences import Offence, collect, put_back, report
from connito.errors import ConnitoError, Invalid, Retry
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.v1.cycle_pb2 import SecurityEvent

__all__ = ["event", "publish", "report"]

log = get_logger("security")

EVERY_SECONDS = 1.0


def event(offence: Offence, service: str, reporter: str, at_unix_ms: int) -> SecurityEvent:
    """Return the message about what has gathered."""
    return SecurityEvent(
        kind=offence.kind, service=service, reporter=reporter, key=offence.key, subject=offence.subject,
        reason=offence.reason, detail=offence.detail[:500], at_unix_ms=at_unix_ms, count=offence.count,
    )  # fmt: skip


async def publish(bus: Bus, service: str, every_s: float = EVERY_SECONDS) -> None:
    """Write reports until cancelled. Returns when this key may not: who is not a service only counts."""
    while True:
        await asyncio.sleep(every_s)
        waiting: Sequence[Offence] = collect()
        for position, offence in enumerate(waiting):
            message = event(offence, service, bus.identity.public, time.time_ns() // 1_000_000)
            try:
                await bus.publish_security(message)
            except Retry:
                put_back(waiting[position:])
                break
            except Invalid as error:
                metrics.SECURITY_EVENTS.labels("unreported").inc()
                log.warning("security events are counted here and reported nowhere", error=str(error))
                return
            except ConnitoError:
                return
