"""`python -m services.committer`: answer miners' messages, settle closed windows, serve uploads and downloads."""

from __future__ import annotations

import time
from contextlib import aclosing

from connito.bus.desk import Desk
from connito.bus.guard import Guard
from connito.runtime.limits import RateLimit
from connito.service import rpc
from connito.service.engine import Decision, Engine
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service
from connito.v1 import services_pb2_grpc
from connito.wire.facts import RunFacts

from .actions import Committer
from .api import NAME, SubmissionApi
from .content import ContentCheck
from .handlers import decide
from .settings import CommitterSettings
from .state import STREAMS, State


async def main(
    ctx: ServiceContext[CommitterSettings], serve: rpc.ServeApi = rpc.serve_api, serves: rpc.Serves = rpc.serves_at
) -> None:
    """Run until told to stop. Raises whatever the engine, the consumer or the API died of."""
    settings, state = ctx.settings, State(ctx.roster)
    limit = RateLimit(settings.requests_per_second, settings.requests_burst, time.monotonic)
    api = SubmissionApi(ctx.bus, state, ctx.store, limit, settings.presign_seconds)
    async with aclosing(ContentCheck(ctx.store, settings.examine_slots)) as check, Lifecycle(ctx.stop) as life:
        committer = Committer(ctx.bus, state, check)

        def decide_now(facts: RunFacts, _now_ms: int) -> Decision:
            return decide(facts, state.heard[facts.run])

        engine = Engine(
            ctx.bus, state, STREAMS, decide_now, committer.perform, service="committer", kept=ctx.kept(STREAMS)
        )
        life.start(engine.run())
        guard = Guard(settings.nats_url, ctx.identity, "committer", settings.tls)
        life.start(guard.watch())
        life.start(Desk(settings.nats_url, ctx.identity, "committer", settings.tls, guard.shut_out).serve())
        if not await life.finishes(engine.caught_up.wait()):
            return
        servicer = (services_pb2_grpc.add_SubmissionServiceServicer_to_server, api, NAME)
        async with serve(ctx, servicer) as address:
            life.start(committer.answer(settings.lease_seconds))
            # Any replica serves the API; where there are several, one advertised address leads to all of them.
            if await life.finishes(rpc.register(ctx.bus, "committer", address)):
                ctx.ready()
                life.start(rpc.stay_registered(ctx.bus, "committer", address, ctx.settings.tls, serves=serves))
            await life.over()


if __name__ == "__main__":
    run_service("committer", main, CommitterSettings)
