"""`python -m services.selector`: fix the target experts of every run that is created."""

from __future__ import annotations

import asyncio

from connito.moe.device import device_of
from connito.runtime.compute import ComputeBudget, load_torch
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service

from .actions import Selector
from .settings import SelectorSettings


async def main(ctx: ServiceContext[SelectorSettings]) -> None:
    """Process the queue until told to stop. Torch is loaded before the first run needs it."""
    settings = ctx.settings
    await asyncio.to_thread(load_torch, settings.torch_threads)
    await asyncio.to_thread(device_of, settings.device)
    budget = ComputeBudget(settings.compute_dir, settings.compute_slots)
    selector = Selector(ctx.bus, ctx.store, ctx.roster, budget, ctx.log)
    async with Lifecycle(ctx.stop) as life:
        life.start(ctx.bus.consume("selector", selector.handle, aside=selector.fail))
        ctx.ready()
        await life.over()


if __name__ == "__main__":
    run_service("selector", main, SelectorSettings)
