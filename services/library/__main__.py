"""`python -m services.library`: deposit experts and serve the catalogue."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path

from connito.bus.clock import BrokerClock
from connito.library.index import Index
from connito.runtime.limits import RateLimit
from connito.service import rpc
from connito.service.lifecycle import Lifecycle
from connito.service.oidc import tokens_of
from connito.service.runner import ServiceContext, run_service
from connito.v1 import services_pb2_grpc

from .actions import CatalogueReader, Depositor
from .api import NAME, Library
from .settings import LibrarySettings
from .state import Catalogue


async def main(ctx: ServiceContext[LibrarySettings]) -> None:
    """Run until told to stop. The API opens when the catalogue is complete."""
    with tempfile.TemporaryDirectory(prefix="connito-library-") as scratch:
        index = Index(Path(ctx.settings.index_path or f"{scratch}/index.sqlite"))
        with closing(index):
            await _serve(ctx, Catalogue(index))


async def _serve(ctx: ServiceContext[LibrarySettings], catalogue: Catalogue) -> None:
    depositor = Depositor(ctx.bus, ctx.store, ctx.roster, ctx.log)
    reader = CatalogueReader(ctx.bus, ctx.store, ctx.roster, catalogue, ctx.log)
    clock = BrokerClock(ctx.bus.time, ctx.bus.host.monotonic)
    limit = RateLimit(ctx.settings.requests_per_second, ctx.settings.requests_burst, time.monotonic)
    tokens = tokens_of(ctx.settings, ctx.roster)
    library = Library(catalogue, ctx.store, ctx.bus, ctx.roster, reader.current, clock.now_ms, limit, tokens)
    async with Lifecycle(ctx.stop) as life:
        life.start(clock.keep())
        life.start(reader.follow())
        life.start(depositor.work())
        if not (await life.finishes(clock.known.wait()) and await life.finishes(reader.complete.wait())):
            return
        servicer = (services_pb2_grpc.add_LibraryServiceServicer_to_server, library, NAME)
        async with rpc.serve_api(ctx, servicer) as address:
            if await life.finishes(rpc.register(ctx.bus, "library", address)):
                ctx.ready()
                life.start(rpc.stay_registered(ctx.bus, "library", address, ctx.settings.tls))
            await life.over()


if __name__ == "__main__":
    run_service("library", main, LibrarySettings)
