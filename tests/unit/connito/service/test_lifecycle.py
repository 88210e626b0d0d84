"""One lifecycle for every service: it ends with the first task that ends, and leaves no task behind."""

from __future__ import annotations

import asyncio

import pytest
from connito.errors import Fatal
from connito.service.lifecycle import Lifecycle


class Stubborn:
    """Loses its first cancellation, as `asyncio.wait_for` does before Python 3.12."""

    def __init__(self) -> None:
        self.lost = 0
        self.ended = False

    async def run(self) -> None:
        try:
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.lost += 1
                    if self.lost == 2:
                        raise
        finally:
            self.ended = True


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_task_that_loses_its_first_cancellation_ends_with_the_service() -> None:
    stop, stubborn = asyncio.Event(), Stubborn()
    async with asyncio.timeout(5):
        async with Lifecycle(stop) as life:
            life.start(stubborn.run())
            asyncio.get_running_loop().call_soon(stop.set)
            await life.over()
    assert (stubborn.lost, stubborn.ended) == (2, True)


async def test_a_step_that_loses_its_first_cancellation_ends_when_the_service_is_told_to_stop() -> None:
    stop, stubborn = asyncio.Event(), Stubborn()
    async with asyncio.timeout(5), Lifecycle(stop) as life:
        asyncio.get_running_loop().call_later(0.01, stop.set)
        assert not await life.finishes(stubborn.run())
    assert stubborn.ended


async def test_what_a_lasting_task_died_of_ends_the_service_and_its_other_tasks() -> None:
    async def dies() -> None:
        raise Fatal("the lease is gone")

    others = []

    async def serve() -> None:
        async with Lifecycle(asyncio.Event()) as life:
            others.append(life.start(forever()))
            life.start(dies())
            await life.over()

    with pytest.raises(Fatal, match="the lease is gone"):
        await serve()
    assert others[0].cancelled()


async def test_a_lasting_task_that_returns_ends_the_service_without_an_error() -> None:
    async with asyncio.timeout(5), Lifecycle(asyncio.Event()) as life:
        life.start(asyncio.sleep(0))
        assert not await life.finishes(forever())


async def test_a_step_that_finishes_leaves_the_service_running() -> None:
    stop = asyncio.Event()
    async with asyncio.timeout(5), Lifecycle(stop) as life:
        lasting = life.start(forever())
        assert await life.finishes(asyncio.sleep(0))
        assert not lasting.done()
        stop.set()
        assert not await life.finishes(asyncio.sleep(0)), "no further step once the service is told to stop"


async def test_what_a_step_raises_comes_out() -> None:
    async def refused() -> None:
        raise Fatal("the address is taken")

    async with Lifecycle(asyncio.Event()) as life:
        with pytest.raises(Fatal, match="the address is taken"):
            await life.finishes(refused())
