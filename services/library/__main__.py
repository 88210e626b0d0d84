"""`python -m services.library`: deposits experts and serves the catalogue."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from connito.bus import CaughtUp
from connito.errors import Invalid, Retry, VerificationFailed
from connito.library.index import Index
from connito.service.rpc import serve
from connito.service.runner import ServiceContext, run_service
from connito.v1 import run_pb2, services_pb2_grpc
from connito.wire.facts import Fact
from connito.wire.verification import verify_fact

from .actions import Depositor
from .projection import Catalogue
from .servicer import Library
from .settings import LibrarySettings

SERVICE = "connito.v1.LibraryService"


async def main(context: ServiceContext[LibrarySettings]) -> None:
    """Run until told to stop. The API opens when the catalogue is complete."""
    settings = context.settings
    scratch = tempfile.TemporaryDirectory(prefix="connito-library-")
    path = Path(settings.index_path or f"{scratch.name}/index.sqlite")
    catalogue, complete = Catalogue(Index(path)), asyncio.Event()
    depositor = Depositor(context.bus, context.store, context.roster, context.log)
    library = Library(catalogue, context.store, context.bus, context.roster, lambda: time.time_ns() // 1_000_000)
    servicer = (services_pb2_grpc.add_LibraryServiceServicer_to_server, library, SERVICE)
    work: set[asyncio.Task[None]] = {
        asyncio.create_task(_read_catalogue(context, catalogue, complete)),
        asyncio.create_task(context.bus.consume("library", depositor.handle)),
    }
    stopping, opening = asyncio.create_task(context.stop.wait()), asyncio.create_task(complete.wait())
    try:
        await asyncio.wait({*work, opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            async with serve([servicer], settings.grpc_host, settings.grpc_port, tls=settings.tls) as port:
                context.announce_port("grpc", port)
                address = settings.grpc_advertise or f"{settings.grpc_host}:{port}"
                await context.bus.register_endpoint("library", address)
                context.ready()
                await asyncio.wait({*work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for done in work:
            if done.done():
                done.result()
    finally:
        for task in (*work, opening, stopping):
            task.cancel()
        await asyncio.gather(*work, opening, stopping, return_exceptions=True)
        catalogue.index.close()
        scratch.cleanup()


async def _read_catalogue(
    context: ServiceContext[LibrarySettings], catalogue: Catalogue, complete: asyncio.Event
) -> None:
    async for item in context.bus.follow(["LIBRARY"]):
        if isinstance(item, CaughtUp):
            complete.set()
            continue
        try:
            fact = verify_fact(item, context.roster)
            record = await _record(context, catalogue, fact)
            catalogue.add(fact, record, (item.subject, item.data))
        except (Invalid, VerificationFailed) as error:
            context.log.warning("security", subject=item.subject, sequence=item.sequence, error=str(error))


async def _record(context: ServiceContext[LibrarySettings], catalogue: Catalogue, fact: Fact) -> bytes | None:
    """The record of a deposit; waits while the store is away. None for other facts, and for what a kept index has."""
    if not isinstance(fact.message, run_pb2.ExpertDeposited) or catalogue.index.lookup(fact.message.expert_id):
        return None
    while True:
        try:
            return await context.store.get_bytes(fact.message.record)
        except Retry as error:
            context.log.warning("the store is away", expert=fact.message.expert_id, error=str(error))
            await asyncio.sleep(error.after or 1.0)


if __name__ == "__main__":
    run_service("library", main, LibrarySettings)
