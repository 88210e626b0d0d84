"""`connito streams`: declare what the services need in the broker, and look at it."""

from __future__ import annotations

from typing import Annotated

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render import formats

app = typer.Typer(no_args_is_help=True, help="Declare and list streams, consumers and buckets.")


@app.command("ensure")
def ensure(
    replicas: Annotated[int, typer.Option(min=1, max=5, help="Copies of each stream; 3 in a cluster.")] = 1,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Create or update every stream, consumer and bucket. Safe to repeat."""
    from connito.client import streams
    from connito.platform.session import Session

    names = streams.ensure(Session.open(data_dir, role="operator"), replicas)
    emit(as_json, {"ensured": names}, lambda: f"ensured {', '.join(names)}")


@app.command("ls")
def ls(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """List the streams with their messages, bytes and consumers."""
    from connito.client import streams
    from connito.platform.session import Session

    rows = streams.ls(Session.open(data_dir, role="operator", wake=True))
    headers = ("name", "messages", "bytes", "consumers", "subject")
    emit(
        as_json,
        {"streams": rows},
        lambda: table(
            headers,
            [
                (
                    r["name"],
                    r.get("messages", "missing"),
                    formats.size(r.get("bytes", 0)),
                    r.get("consumers", ""),
                    r["subject"],
                )
                for r in rows
            ],
        ),
    )
