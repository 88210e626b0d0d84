"""`connito advisories`: what services, and the broker, saw that only happens under attack or misconfiguration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table


def advisories(
    since: Annotated[str, typer.Option(help="How far back: 30m, 12h, 7d.")] = "1d",
    broker_log: Annotated[
        Path | None,
        typer.Option(help="The nats-server's log, which also has violations that were not reported."),
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show security events, newest last: denied subjects, bad signatures, banned keys, floods, connections, poisoned ids."""
    from connito.cli.admission import seconds
    from connito.client import security
    from connito.platform.session import Session

    after = time.time() - seconds(since)
    session = Session.open(data_dir, role="operator", wake=True)
    rows = security.advisories(session, after, broker_log)
    headers = ("at", "kind", "count", "key", "reporter", "subject", "detail")
    emit(
        as_json,
        {"events": rows},
        lambda: table(headers, [[row[h] for h in headers] for row in rows], f"nothing in the last {since}"),
    )
