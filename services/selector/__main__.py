"""`python -m services.selector`: fixes the target experts of every run that is created."""

from __future__ import annotations

import asyncio

from connito.runtime.compute import ComputeBudget
from connito.service.runner import ServiceContext, run_service

from .actions import Selector
from .settings import SelectorSettings


async def main(context: ServiceContext[SelectorSettings]) -> None:
    """Work off the queue until told to stop. Torch is loaded before the first run asks for it."""
    settings = context.settings
    budget = ComputeBudget(settings.compute_dir, settings.compute_slots)
    selector = Selector(context.bus, context.store, context.roster, budget, context.log)
    await asyncio.to_thread(_load_torch, settings.torch_threads)
    work = asyncio.create_task(context.bus.consume("selector", selector.handle))
    stopping = asyncio.create_task(context.stop.wait())
    context.ready()
    try:
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        work.cancel()
        stopping.cancel()
        await asyncio.gather(work, stopping, return_exceptions=True)


def _load_torch(threads: int) -> None:
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401 - imported ahead of the first run

    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_service("selector", main, SelectorSettings)
