"""The broker's clock: the one by which facts are stamped, and so the one by which deadlines are decided.

Clocks of machines differ by any amount and jump. What is compared with the time of a fact is compared on this clock, which
goes on by the steady clock of this machine and is set anew all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from connito.errors import Retry
from connito.runtime.logs import get_logger

log = get_logger("bus.clock")

EVERY_SECONDS = 5.0


class BrokerClock:
    """`now_ms()` is the broker's time, once `known` is set; `keep` keeps it set. `ask` returns the broker's time in Unix
    seconds (`Bus.time`), `steady` never jumps. Wrong by half the time that an answer takes at most.
    """

    def __init__(self, ask: Callable[[], Awaitable[float]], steady: Callable[[], float]) -> None:
        self.known = asyncio.Event()
        self._ask, self._steady = ask, steady
        self._ahead = 0.0

    def now_ms(self) -> int:
        """Return the broker's time in Unix milliseconds."""
        assert self.known.is_set(), "the clock has not been set yet"
        return round((self._steady() + self._ahead) * 1000)

    async def read(self) -> None:
        """Set the clock. Raises `Retry` when the broker does not answer."""
        asked = self._steady()
        broker = await self._ask()
        self._ahead = broker - (asked + self._steady()) / 2
        self.known.set()

    async def keep(self) -> None:
        """Set the clock every few seconds, until cancelled; while the broker is away it goes on as it was."""
        while True:
            try:
                await self.read()
            except Retry as error:
                log.debug("the broker's clock cannot be read", error=str(error))
                await asyncio.sleep(error.after)
            else:
                await asyncio.sleep(EVERY_SECONDS)
