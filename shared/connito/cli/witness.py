"""`connito witness`: follow the logs of runs from outside, cosign their heads, refuse a second history."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit


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

    Needs a key that may read. Exits with 6 where a second history is shown. What it keeps, FOLDER/RUN.checkpoint, is for `connito
    audit --checkpoint`.
    """
    from connito.audit.witness import Witness
    from connito.bus.streams import FACT_STREAMS
    from connito.platform.session import Session
    from connito.runtime.host import now_ms
    from connito.wire.checkpoint import Checkpoint
    from connito.wire.identity import Identity

    session = Session.open(data_dir, role="customer")
    signer = session.identity if key is None else Identity.load(key)

    def tell(name: str, checkpoint: Checkpoint) -> None:
        if not as_json:
            typer.echo(f"{name}: {checkpoint.size} messages, root {checkpoint.root.hex()[:16]}… cosigned", err=True)

    async def follow() -> int:
        async with session.bus() as bus:
            seen = Witness(folder, signer, session.roster, tell, now_ms)
            return await seen.watch(bus.follow(FACT_STREAMS, run), once=once)

    count = asyncio.run(follow())
    document = {"witness": signer.public, "cosigned": count, "folder": str(folder)}
    emit(as_json, document, lambda: f"{signer.public} cosigned {count} new heads; what it remembers is in {folder}")
