"""`python -m services.aggregator`: follow the log, stand by for the lease, score and merge while holding it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from connito.bus import Bus
from connito.bus.lease import Lease
from connito.runtime.compute import ComputeBudget
from connito.service.engine import Action, Decision, Engine
from connito.service.runner import ServiceContext, run_service
from connito.v1.run_pb2 import RunEnded
from connito.wire.facts import Fact, RunFacts
from connito.wire.log import Log

from .actions import Aggregator
from .handlers import STREAMS, decide, drop_losses
from .settings import AggregatorSettings

LEASE = "aggregator"


class Leadership:
    """The lease, when this replica holds it."""

    def __init__(self, bus: Bus, seconds: float) -> None:
        self._bus, self._seconds = bus, seconds
        self._lease: Lease | None = None

    def lease(self) -> Lease | None:
        """The lease if it is held right now."""
        return self._lease if self._lease is not None and self._lease.held else None

    async def keep(self, wake: Callable[[], None]) -> None:
        """Acquire the lease, and again whenever it is lost; until cancelled."""
        while True:
            async with Lease(self._bus, LEASE, self._seconds) as lease:
                self._lease = lease
                try:
                    wake()
                    await lease.lost.wait()
                finally:
                    self._lease = None


async def main(context: ServiceContext[AggregatorSettings]) -> None:
    """Run until told to stop. Raises whatever the engine or the lease died of."""
    settings = context.settings
    budget = ComputeBudget(settings.compute_dir, settings.compute_slots)
    await asyncio.to_thread(_load_torch, settings.torch_threads)
    leadership = Leadership(context.bus, settings.lease_seconds)

    def on_fact(fact: Fact) -> None:
        drop_losses(engine.facts(fact.run), fact)
        if isinstance(fact.message, RunEnded):
            aggregator.forget(fact.run)

    def decide_while_leading(facts: RunFacts, _now_ms: int) -> Decision:
        return Decision() if leadership.lease() is None else decide(facts, aggregator.evaluators)

    async def perform(action: Action) -> None:
        await aggregator.perform(action)

    engine = Engine(
        context.bus, Log(context.roster), STREAMS, decide_while_leading, perform, run=settings.run, on_fact=on_fact
    )
    aggregator = Aggregator(context.bus, context.store, context.roster, budget, engine.facts, leadership.lease)
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(context.stop.wait()),
        asyncio.create_task(engine.run()),
        asyncio.create_task(leadership.keep(engine.wake)),
    ]
    context.ready()
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _load_torch(threads: int) -> None:
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401 - imported ahead of the first run

    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_service("aggregator", main, AggregatorSettings)
