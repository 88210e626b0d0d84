"""Do again what the machine has no room for, until somebody makes room, and what needs a server that is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container
from typing import TypeVar

from connito.runtime.waiting import here_and_now, of_rights

T = TypeVar("T")
AGAIN_SECONDS = 1.0
ROOM = frozenset({"disk", "memory"})
SERVERS = ROOM | {"broker", "store"}


async def patiently(
    what: str, attempt: Callable[[], Awaitable[T]], announce: Callable[[str], None], lacks: Container[str] = ROOM
) -> T:
    """Return what `attempt` does; while the disk or the memory has no room for it, or whatever else it `lacks` is away, say so
    once and try again.

    Where this user may not write, no wait helps: that is raised, like everything else.
    """
    told = False
    while True:
        try:
            return await attempt()
        except Exception as error:
            fault = here_and_now(error)
            if fault is None or fault.dependency not in lacks or of_rights(error):
                raise
            if not told:
                announce(f"{what} waits: {fault}")
            told = True
            await asyncio.sleep(AGAIN_SECONDS)
