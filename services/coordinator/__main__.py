"""`python -m services.coordinator`: follow the log, stand by for the lease, serve the API."""

from __future__ import annotations

import asyncio
import time

from connito.bus.position import PositionedLog
from connito.runtime.limits import RateLimit
from connito.service import rpc
from connito.service.engine import Engine
from connito.service.runner import ServiceContext, run_service
from connito.v1 import services_pb2_grpc
from connito.v1.cycle_pb2 import ScoreReport
from connito.wire.facts import Fact

from .api import NAME, RunApi
from .changes import Changes
from .leader import STREAMS, Leader, observe
from .settings import CoordinatorSettings
from .watch import OpenWindows


async def main(ctx: ServiceContext[CoordinatorSettings]) -> None:
    """Run until told to stop. Raises whatever the engine or the leader died of."""
    settings, facts, changes, windows = ctx.settings, PositionedLog(ctx.roster), Changes(), OpenWindows()

    def on_fact(fact: Fact) -> None:
        if isinstance(fact.message, ScoreReport):
            # The losses are for the aggregator; here it matters only who reported.
            fact.message.ClearField("scores")
        changes.notice(fact)
        if fact.key.kind in ("opened", "closed", "ended"):
            windows.notice(facts.runs[fact.run])
        if fact.key.kind == "closed" and engine.caught_up.is_set():
            observe(engine.facts(fact.run), fact.key.section, fact.key.cycle)

    leader = Leader(ctx.bus, facts, run=settings.run)
    engine = Engine(ctx.bus, facts, STREAMS, leader.decide, leader.perform, on_fact=on_fact)
    stopping, running = asyncio.create_task(ctx.stop.wait()), asyncio.create_task(engine.run())
    caught_up = asyncio.create_task(engine.caught_up.wait())
    tasks: list[asyncio.Task[object]] = [stopping, running, caught_up]
    try:
        await _first(*tasks)
        if ctx.stop.is_set():
            return
        limit = RateLimit(settings.requests_per_second, settings.requests_burst, time.monotonic)
        api = RunApi(ctx.bus, facts, ctx.roster, changes, limit)
        servicer = (services_pb2_grpc.add_RunServiceServicer_to_server, api, NAME)
        async with rpc.serve([servicer], settings.grpc_host, settings.grpc_port, tls=settings.tls) as port:
            ctx.announce_port("grpc", port)
            address = settings.grpc_advertise or f"{settings.grpc_host}:{port}"
            leading = asyncio.create_task(leader.lead(settings.lease_seconds, address, engine.wake))
            tasks.append(leading)
            ctx.ready()
            await _first(stopping, running, leading)
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(*tasks: asyncio.Task[object]) -> None:
    """Wait for the first of `tasks`; raises what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


if __name__ == "__main__":
    run_service("coordinator", main, CoordinatorSettings)
