"""`python -m services.trainer`: a miner."""

from __future__ import annotations

from functools import partial

from connito.runtime.compute import ComputeBudget
from connito.service.engine import Decision, Engine
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service
from connito.v1.run_pb2 import IngressHead
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.log import Log

from .actions import Miner
from .adapters import Downloads, Services
from .adversary import choose
from .handlers import STREAMS, decide
from .own import Own
from .settings import TrainerSettings
from .state import Ledger
from .strategy import Strategy
from .training import LocalTrainer


async def main(context: ServiceContext[TrainerSettings]) -> None:
    """Take part until told to stop."""
    settings, me = context.settings, context.identity.public
    strategy = choose(settings)
    if strategy.name:
        context.log.warning(
            f"THIS MINER MISBEHAVES ON PURPOSE ({strategy.name}): for drills on a network of your own only", miner=me
        )
    ledger, services = Ledger(settings.work_dir, me, context.bus.host.disk), Services(context.bus)
    downloads = Downloads(services, settings.cache_dir, settings.cache_max_bytes)
    trainer = LocalTrainer(me, downloads, ComputeBudget(settings.compute_dir, settings.compute_slots), settings)
    log = Log(context.roster)

    miner = Miner(
        context.bus,
        services,
        downloads,
        ledger,
        trainer,
        strategy,
        lambda run: log.runs[run],
        settings.label,
        settings.invite,
    )

    # Who misbehaves looks at what others do.
    own = Own(context.bus, me, log, ledger) if not strategy.name else None

    def on_fact(fact: Fact) -> None:
        if isinstance(fact.message, IngressHead):
            ledger.keep_receipt(fact.run, fact.message)
        if own is not None:
            own.notice(fact)

    engine = Engine(
        context.bus, log, STREAMS, partial(decide_with, me, ledger, strategy, own), miner.perform, run=settings.run,
        on_fact=on_fact, kept=context.kept(STREAMS, settings.state_dir or settings.work_dir), of_all=own is not None,
    )  # fmt: skip
    context.log.info("miner", key=me, label=settings.label, work_dir=str(settings.work_dir))
    try:
        async with Lifecycle(context.stop) as life:
            life.start(engine.run())
            if await life.finishes(engine.caught_up.wait()):
                if own is not None:
                    life.start(own.follow(engine.take, engine.wake))
                context.ready()
            await life.over()
    finally:
        await services.close()
        ledger.close()


def decide_with(
    me: str, ledger: Ledger, strategy: Strategy, own: Own | None, facts: RunFacts, _now_ms: int
) -> Decision:
    """Return the decision of `decide` on the content of the work folder; nothing before this miner's own answers are known."""
    if own is not None and not own.knows(facts.run):
        return Decision()
    return decide(facts, me, ledger.progress(facts.run), strategy)


if __name__ == "__main__":
    run_service("trainer", main, TrainerSettings)
