"""`python -m services.library`: deposits experts and serves the catalogue."""

from __future__ import annotations

import asyncio

from connito.bus import CaughtUp
from connito.errors import Invalid
from connito.facts import verify_fact
from connito.rpc import serve
from connito.runner import ServiceContext, run_service
from connito.v1 import services_pb2_grpc

from services.library.actions import Depositor
from services.library.projection import Catalogue
from services.library.servicer import Library
from services.library.settings import LibrarySettings

SERVICE = "connito.v1.LibraryService"


async def main(context: ServiceContext[LibrarySettings]) -> None:
    """Run until told to stop. The API opens when the catalogue is complete."""
    settings = context.settings
    catalogue, complete = Catalogue(), asyncio.Event()
    depositor = Depositor(context.bus, context.store, context.roster, context.log)
    servicer = (services_pb2_grpc.add_LibraryServiceServicer_to_server, Library(catalogue, context.store), SERVICE)
    work: set[asyncio.Task[None]] = {
        asyncio.create_task(_read_catalogue(context, catalogue, complete)),
        asyncio.create_task(context.bus.consume("library", depositor.handle)),
    }
    stopping, opening = asyncio.create_task(context.stop.wait()), asyncio.create_task(complete.wait())
    try:
        await asyncio.wait({*work, opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            async with serve([servicer], settings.grpc_host, settings.grpc_port) as port:
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


async def _read_catalogue(
    context: ServiceContext[LibrarySettings], catalogue: Catalogue, complete: asyncio.Event
) -> None:
    async for item in context.bus.follow(["LIBRARY"]):
        if isinstance(item, CaughtUp):
            complete.set()
            continue
        try:
            catalogue.add(verify_fact(item, context.roster))
        except Invalid as error:
            context.log.warning("security", subject=item.subject, sequence=item.sequence, error=str(error))


if __name__ == "__main__":
    run_service("library", main, LibrarySettings)
