"""A witness ends in order when it is told to, and keeps what it has done."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from connito.cli.witness import _until_told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_goes_on_until_it_is_told_to_end(number: signal.Signals) -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            done.append("left")

    try:
        await asyncio.wait_for(_until_told(work), 10)
    finally:
        asyncio.get_running_loop().remove_signal_handler(number)
    assert done == ["left"]


async def test_what_fails_is_told() -> None:
    async def work() -> None:
        raise OSError("a full disk")

    with pytest.raises(OSError, match="full disk"):
        await _until_told(work)
