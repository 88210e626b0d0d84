"""`python -m services.trainer`: a miner."""

from __future__ import annotations

from functools import partial

from connito.runtime.compute import ComputeBudget
from connito.service.engine import Engine
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service
from connito.wire.log import Log

from .actions import Miner
from .adapters import Downloads, Services
from .adversary import choose
from .handlers import STREAMS
from .own import Own, decide_with
from .settings import TrainerSettings
from .state import Ledger
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
    own = Own(context.bus, me, log, ledger, all_follow=bool(strategy.name))

    engine = Engine(
        context.bus, log, STREAMS, partial(decide_with, me, ledger, strategy, own), miner.perform, run=settings.run,
        on_fact=own.notice, kept=context.kept(STREAMS, settings.state_dir or settings.work_dir), of_all=not strategy.name,
    )  # fmt: skip
    context.log.info("miner", key=me, label=settings.label, work_dir=str(settings.work_dir))
    try:
        async with Lifecycle(context.stop) as life:
            life.start(engine.run())
            if await life.finishes(engine.caught_up.wait()):
                if not strategy.name:
                    life.start(own.follow(engine.take, engine.wake))
                context.ready()
            await life.over()
    finally:
        await services.close()
        ledger.close()


if __name__ == "__main__":
    run_service("trainer", main, TrainerSettings)
