"""`python -m services.aggregator`: follow the log, stand by for the lease, score and merge while holding it."""

from __future__ import annotations

import asyncio

from connito.bus.lease import LeaseKeeper
from connito.library.deposit_plan import lacks_scores
from connito.moe.device import device_of
from connito.runtime.compute import ComputeBudget, load_torch
from connito.service.engine import Decision, Engine
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service
from connito.v1.run_pb2 import BenchmarksMeasured, ExpertDeposited, RunEnded, RunPaused
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.log import Log

from .actions import Aggregator
from .handlers import STREAMS, decide, drop_losses
from .settings import AggregatorSettings


async def main(ctx: ServiceContext[AggregatorSettings]) -> None:
    """Run until told to stop. Raises whatever the engine or the lease died of."""
    settings, log = ctx.settings, Log(ctx.roster)
    await asyncio.to_thread(load_torch, settings.torch_threads)
    await asyncio.to_thread(device_of, settings.device)
    keeper = LeaseKeeper(ctx.bus, "aggregator", settings.lease_seconds)
    budget = ComputeBudget(settings.compute_dir, settings.compute_slots)
    aggregator = Aggregator(ctx.bus, ctx.store, ctx.roster, budget, log.runs.__getitem__, lambda: keeper.leading)

    def on_fact(fact: Fact) -> None:
        drop_losses(log.runs[fact.run], fact)
        facts, closing = log.runs[fact.run], (RunEnded, RunPaused, BenchmarksMeasured, ExpertDeposited)
        if isinstance(fact.message, closing) and facts.ended is not None and not lacks_scores(facts):
            aggregator.forget(fact.run)

    def decide_while_leading(facts: RunFacts, _now_ms: int) -> Decision:
        return decide(facts, aggregator.evaluators) if keeper.leading else Decision()

    engine = Engine(
        ctx.bus,
        log,
        STREAMS,
        decide_while_leading,
        aggregator.perform,
        run=settings.run,
        on_fact=on_fact,
        service="aggregator",
        kept=ctx.kept(STREAMS),
    )

    async def begin() -> None:
        engine.wake()

    async with Lifecycle(ctx.stop) as life:
        life.start(engine.run())
        life.start(keeper.keep(begin))
        ctx.ready()
        await life.over()


if __name__ == "__main__":
    run_service("aggregator", main, AggregatorSettings)
