"""`connito witness`: follow the logs of runs from outside, cosign their heads, refuse a second history."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats
from connito.runtime.progress import silent

if TYPE_CHECKING:
    from connito.bus import Bus, CaughtUp
    from connito.wire.fact import Record

    Items = AsyncGenerator[Record | CaughtUp, None]


def witness(
    run: Annotated[str, typer.Argument(help="The run to follow; every run without it.")] = "",
    folder: Annotated[Path, typer.Option("--folder", help="Where this witness remembers what it cosigned.")] = Path(
        "witness"
    ),
    key: Annotated[
        Path | None, typer.Option("--key", help="Key file to cosign with; the one to read with if not given.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when everything that is stored now was read.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Read the log, check that each signed head extends what was seen before, cosign it and remember it.

    Needs a key that may read. Goes on until it is interrupted or terminated. Of a run with a second history, or less of it than
    was cosigned, it says so, goes on with the others, and exits with 6 at the end; what the operator released into an
    archive is said and left. What it keeps, FOLDER/RUN.checkpoint, is for `connito audit --checkpoint`.
    """
    from connito.audit.witness import Witness, held
    from connito.bus.streams import FACT_STREAMS
    from connito.cli.audit import tell
    from connito.platform.session import Session
    from connito.runtime.host import now_ms
    from connito.wire.identity import Identity
    from connito.wire.subjects import check_token

    session = Session.open(data_dir, role="customer")
    signer = session.identity if key is None else Identity.load(key)
    only = check_token(run, "run id") if run else ""
    with held(folder):
        seen = Witness(folder, signer, session.roster, silent if as_json else tell, now_ms, only)

        async def follow() -> None:
            async with session.bus() as bus:
                await _follow(bus, partial(bus.follow, FACT_STREAMS, only), partial(seen.watch, once=once))

        asyncio.run(_until_told(follow))
    document = {
        "witness": signer.public,
        "cosigned": seen.cosigned,
        "refused": sorted(seen.refused),
        "folder": str(folder),
    }
    emit(
        as_json,
        document,
        lambda: (
            f"{signer.public} cosigned {formats.count(seen.cosigned, 'new head')}; what it remembers is in {folder}"
        ),
    )
    seen.check()


async def _follow(bus: Bus, items: Callable[[], Items], watch: Callable[[Items], Coroutine[Any, Any, None]]) -> None:
    """Watch the log from its start, and anew each time that the broker was away: another log may answer then, with other
    messages where those lie that were read already.
    """
    from connito.runtime.tasks import end_tasks

    again = asyncio.Event()
    bus.connection.on_reconnect.append(again.set)
    while True:
        again.clear()
        tasks: list[asyncio.Future[Any]] = [*map(asyncio.ensure_future, (watch(items()), again.wait()))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
                return
        finally:
            await end_tasks(tasks)


async def _until_told(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do the work until it is done, or SIGINT or SIGTERM end it: that is how a witness ends."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task
