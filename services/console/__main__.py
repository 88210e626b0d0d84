"""`python -m services.console`: show every run on a web page."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from connito.errors import Fatal
from connito.service.lifecycle import Lifecycle
from connito.service.runner import ServiceContext, run_service

from .settings import ConsoleSettings


async def main(context: ServiceContext[ConsoleSettings]) -> None:
    """Run until told to stop. The page is there at once; until the log has been read, it says so."""
    settings, token = context.settings, context.settings.check_access()
    try:
        import uvicorn

        from .artifacts import Artifacts
        from .figures import ExpertFigures
        from .pages import Console
        from .readers import access_of, trial_of
        from .state import Feed
    except ImportError as error:
        raise Fatal(f"{error.name} is not installed; `pip install 'connito[console]'` brings it") from error

    class Server(uvicorn.Server):
        """The runner handles signals."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    feed = Feed(context.bus, context.roster, settings.run)
    # Without a store there are no cards and no bytes to verify.
    store = context.store if settings.s3_access_key or settings.s3_credentials != "keys" else None
    figures, trial = ExpertFigures(store, feed.move), trial_of(settings)
    access = access_of(settings, context.roster, context.bus.identity, token)
    console = Console(feed, access, Artifacts(store), figures, trial, secure_cookie=settings.console_secure_cookie)
    config = uvicorn.Config(
        console.app(), log_config=None, access_log=False, lifespan="off", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=2, ws="none",
    )  # fmt: skip
    listener, server = _listen(settings.console_host, settings.console_port), Server(config)
    context.announce_port("console", listener.getsockname()[1])
    try:
        async with Lifecycle(context.stop) as life:
            life.start(feed.follow())
            serving = life.start(server.serve([listener]))
            try:
                if await life.finishes(feed.caught_up.wait()):
                    context.ready()
                await life.over()
            finally:
                feed.close()
                server.should_exit = True
                await asyncio.wait((serving,), timeout=settings.drain_seconds)
    finally:
        trial.close()
        await figures.close()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise Fatal(
            f"cannot listen on {host}:{port}: {error.strerror}; set CONNITO_CONSOLE_HOST and CONNITO_CONSOLE_PORT to "
            "an address of this machine and a free port"
        ) from error


if __name__ == "__main__":
    run_service("console", main, ConsoleSettings)
