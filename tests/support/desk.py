"""The desk at which strangers' questions are counted, for brokers without a committer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from connito.bus.desk import Desk
from connito.runtime.tasks import end_tasks
from connito.wire.identity import Identity
from connito.wire.tls import PLAIN


@asynccontextmanager
async def desk(url: str, committer: Identity, shut_out: Callable[[str], None] = lambda _: None) -> AsyncIterator[Desk]:
    """Answer strangers at a broker with the key of its committer, from here on."""
    found = Desk(url, committer, "committer", PLAIN, shut_out)
    serving = asyncio.create_task(found.serve())
    try:
        async with asyncio.timeout(30):
            await found.open.wait()
        yield found
    finally:
        await end_tasks([serving])
