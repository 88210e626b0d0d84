"""`python -m services.committer`: answer what miners say, settle closed windows, serve uploads and downloads."""

from __future__ import annotations

import asyncio
import time

from connito.errors import Retry
from connito.runtime.limits import RateLimit
from connito.service import rpc
from connito.service.engine import Engine
from connito.service.runner import ServiceContext, run_service
from connito.v1 import services_pb2_grpc

from .actions import decide
from .api import NAME, SubmissionApi
from .content import ContentCheck
from .intake import DURABLE, Intake
from .settings import CommitterSettings
from .view import STREAMS, View


async def main(ctx: ServiceContext[CommitterSettings]) -> None:
    """Run until told to stop. Raises whatever the engine, the consumer or the API died of."""
    settings, view = ctx.settings, View(ctx.roster)
    check = ContentCheck(ctx.store, settings.examine_slots)
    intake = Intake(ctx.bus, view, check)
    engine = Engine(ctx.bus, view, STREAMS, decide, intake.perform)
    stopping, running = asyncio.create_task(ctx.stop.wait()), asyncio.create_task(engine.run())
    tasks: list[asyncio.Task[object]] = [stopping, running, asyncio.create_task(engine.caught_up.wait())]
    try:
        await _first(*tasks)
        if ctx.stop.is_set():
            return
        limit = RateLimit(settings.requests_per_second, settings.requests_burst, time.monotonic)
        api = SubmissionApi(ctx.bus, view, ctx.store, limit, settings.presign_seconds)
        servicer = (services_pb2_grpc.add_SubmissionServiceServicer_to_server, api, NAME)
        async with rpc.serve([servicer], settings.grpc_host, settings.grpc_port, tls=settings.tls) as port:
            ctx.announce_port("grpc", port)
            address = settings.grpc_advertise or f"{settings.grpc_host}:{port}"
            consuming = asyncio.create_task(ctx.bus.consume(DURABLE, intake.handle))
            # Any replica serves the API; where there are several, one advertised address leads to all of them.
            registering = asyncio.create_task(_register(ctx, address))
            tasks += [consuming, registering]
            await _first(stopping, running, consuming, registering)
            if registering.done():
                await _first(stopping, running, consuming)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await check.close()


async def _register(ctx: ServiceContext[CommitterSettings], address: str) -> None:
    """Say where the API is, however long the broker is away; from then on the service is ready."""
    while True:
        try:
            await ctx.bus.register_endpoint("committer", address)
        except Retry as error:
            ctx.log.warning("cannot register the API's address, trying again", error=str(error))
            await asyncio.sleep(error.after)
        else:
            return ctx.ready()


async def _first(*tasks: asyncio.Task[object]) -> None:
    """Wait for the first of `tasks`; raises what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


if __name__ == "__main__":
    run_service("committer", main, CommitterSettings)
