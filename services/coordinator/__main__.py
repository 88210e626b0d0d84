"""`python -m services.coordinator`: follow the log, stand by for the lease, serve the API."""

from __future__ import annotations

import time

from connito.bus.clock import BrokerClock
from connito.bus.lease import LeaseKeeper
from connito.runtime.limits import RateLimit
from connito.runtime.tasks import end_tasks
from connito.service import rpc
from connito.service.engine import Engine
from connito.service.lifecycle import Lifecycle
from connito.service.oidc import tokens_of
from connito.service.runner import ServiceContext, run_service
from connito.v1 import services_pb2_grpc

from .actions import STREAMS, Coordinator
from .admission import Admission
from .api import NAME, RunApi
from .settings import CoordinatorSettings
from .state import State


async def main(ctx: ServiceContext[CoordinatorSettings], serve: rpc.ServeApi = rpc.serve_api) -> None:
    """Run until told to stop. Raises whatever the engine or the lease died of."""
    settings, state = ctx.settings, State(ctx.roster)
    keeper = LeaseKeeper(ctx.bus, "coordinator", settings.lease_seconds)
    clock = BrokerClock(ctx.bus.time, ctx.bus.host.monotonic)
    coordinator = Coordinator(ctx.bus, state, lambda: keeper.leading, clock.now_ms, settings.run, state.paused)
    engine = Engine(
        ctx.bus, state, STREAMS, coordinator.decide, coordinator.perform,
        clock=clock.now_ms, on_fact=lambda fact: state.notice(fact, live=engine.caught_up.is_set()),
        service="coordinator", kept=ctx.kept(STREAMS),
    )  # fmt: skip
    limit = RateLimit(settings.requests_per_second, settings.requests_burst, time.monotonic)
    admission = Admission(settings.admission, settings.admission_bus or settings.nats_url, ctx.roster)
    api = RunApi(
        ctx.bus, state, ctx.roster, state.changes, limit, clock.now_ms, admission, tokens_of(settings, ctx.roster)
    )
    async with Lifecycle(ctx.stop) as life:
        life.start(clock.keep())
        if not await life.finishes(clock.known.wait()):
            return
        life.start(engine.run())
        if not await life.finishes(engine.caught_up.wait()):
            return
        async with serve(ctx, (services_pb2_grpc.add_RunServiceServicer_to_server, api, NAME)) as address:

            async def begin() -> None:
                # The leader's address is the one that others find the API at: it is known to be alive.
                await rpc.register(ctx.bus, "coordinator", address, lambda: keeper.leading)
                engine.wake()

            leading = life.start(keeper.keep(begin))
            ctx.ready()
            await life.over()
            # A standby takes over while calls in flight are finished here.
            await end_tasks([leading])


if __name__ == "__main__":
    run_service("coordinator", main, CoordinatorSettings)
