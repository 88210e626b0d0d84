"""The broker's streams, consumers and buckets, declared and listed. For an operator's session."""

from __future__ import annotations

from typing import Any

from connito.bus import streams
from connito.platform.session import Session
from connito.runtime.tasks import blocking


def ensure(session: Session, replicas: int = 1) -> list[str]:
    """Create or update every stream, consumer and bucket, and return their names. Safe to repeat."""

    async def declare() -> list[str]:
        async with session.bus() as bus:
            return await streams.ensure(bus.js, replicas)

    return blocking(declare())


def ls(session: Session) -> list[dict[str, Any]]:
    """Return what the streams hold and who reads them."""

    async def describe() -> list[dict[str, Any]]:
        async with session.bus() as bus:
            return await streams.describe(bus.js)

    return blocking(describe())
