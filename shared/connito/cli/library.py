"""`connito library`: the experts that runs left behind."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, size, table

if TYPE_CHECKING:
    from connito.v1.services_pb2 import ExpertSummary

app = typer.Typer(no_args_is_help=True, help="The expert library.")


@app.command("list")
def list_(data_dir: DataDirOption = None, as_json: JsonFlag = False) -> None:
    """List the experts, oldest first."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        rows = [_row(expert) for expert in client.experts()]
    emit(
        as_json,
        {"experts": rows},
        lambda: table(
            ("expert", "domain", "run", "size", "deposited"),
            [(r["expert_id"], r["domain"], r["run"], size(r["bytes"]), _day(r["deposited_at_unix_ms"])) for r in rows],
            "the library is empty; a run that completes leaves an expert here",
        ),
    )


@app.command("show")
def show(
    expert_id: Annotated[str, typer.Argument(help="As `connito library list` shows it.")],
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one expert's record."""
    from connito.client import Client

    with Client.local(data_dir) as client:
        summary, record = client.expert(expert_id)
    document = {**_row(summary), "record": record}
    emit(as_json, document, lambda: _card(record))


def _row(expert: ExpertSummary) -> dict[str, Any]:
    return {
        "expert_id": expert.expert_id,
        "run": expert.run,
        "domain": expert.domain,
        "base_digest": expert.base_digest,
        "digest": expert.expert.digest,
        "bytes": expert.expert.size,
        "deposited_at_unix_ms": expert.deposited_at_unix_ms,
    }


def _card(record: dict[str, Any]) -> str:
    from connito.library.card import render

    try:
        return render(record)
    except (KeyError, TypeError):
        return json.dumps(record, indent=2)


def _day(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_ms / 1000))
