"""Wait for what comes at once on an idle machine, and late on a busy one.

A limit says that something will never happen, so it is far beyond what a loaded machine needs; a test that measures
speed measures the processor time of a process or the best of many tries, never how long the test itself had to wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from connito.bus import streams
from connito.errors import Retry
from nats.js import JetStreamContext

PATIENCE = 90.0  # seconds


async def until(holds: Callable[[], object], what: str = "the condition", seconds: float = PATIENCE) -> None:
    """Poll what no event announces; fail with `what`."""
    try:
        async with asyncio.timeout(seconds):
            while not holds():  # noqa: ASYNC110 - the condition has no event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {seconds:.0f} s for {what}") from None


def wait_until(holds: Callable[[], object], what: str = "the condition", seconds: float = PATIENCE) -> None:
    """`until` outside of a coroutine; a process that cannot be reached yet counts as no."""
    give_up = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if holds():
                return
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


async def until_logged(log: Path, text: str, times: int = 1) -> None:
    """Wait until a log holds `text` so often."""
    try:
        await until(lambda: log.exists() and log.read_text().count(text) >= times)
    except AssertionError:
        raise AssertionError(f"{text!r} is not {times} times in {log}:\n{log.read_text()[-4000:]}") from None


async def declared(js: JetStreamContext) -> list[str]:
    """Declare the streams of a broker, and return their names. While others write to its disk it answers late."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return await streams.ensure(js)
        except Retry:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.05)
