"""`connito library`: the experts that runs left behind."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.library.experts import (
    AsOption,
    OrganisationOption,
    ShelfOption,
    open_shelf,
    platform,
    read_folder,
    viewer_of,
)
from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render.formats import moment, size

if TYPE_CHECKING:
    from connito.library.governance import Viewer
    from connito.library.shelf import Shelf
    from connito.v1.services_pb2 import ExpertSummary

app = typer.Typer(no_args_is_help=True, help="The expert library.")


@app.command("list")
def list_(
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List the experts, oldest first: the platform's that runs here and those on the shelf, which needs no platform."""
    client = platform(data_dir) if shelf is None else None
    rows: list[dict[str, Any]] = []
    if client is not None:
        with client:
            rows = [_row(expert) for expert in client.library.list()]
    known = {row["expert_id"] for row in rows}
    local = _on_shelf(open_shelf(shelf, data_dir), viewer_of(who, organisation))
    rows += [row for row in local if row["expert_id"] not in known]
    if not rows and client is None and shelf is None:
        from connito.client import Client

        Client.local(data_dir).close()  # says how to start one
    emit(
        as_json,
        {"experts": rows},
        lambda: table(
            ("expert", "domain", "run", "size", "deposited"),
            [
                (r["expert_id"], r["domain"], r["run"], size(r["bytes"]), moment(r["deposited_at_unix_ms"]))
                for r in rows
            ],
            "the library is empty; a run that completes leaves an expert here",
        ),
    )


@app.command("show")
def show(
    expert_id: Annotated[str, typer.Argument(help="As `connito library list` shows it, or a folder.")],
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one expert's record, as its card."""
    document = _shown(expert_id, who, organisation, shelf, data_dir)
    record = document["record"]
    emit(as_json, document, lambda: _card(record))


def _shown(
    expert_id: str, who: str, organisation: list[str] | None, shelf: Path | None, data_dir: Path | None
) -> dict[str, Any]:
    from connito.errors import NotFound

    client = platform(data_dir) if shelf is None and not Path(expert_id).is_dir() else None
    if client is not None:
        with client, suppress(NotFound):
            summary, record = client.library.show(expert_id)
            return {**_row(summary), "record": record}
    if Path(expert_id).is_dir():
        record = read_folder(Path(expert_id))[1]
    else:
        record = open_shelf(shelf, data_dir).get(expert_id)[1]
        if not viewer_of(who, organisation).sees(record):
            raise NotFound(f"there is no expert {expert_id!r} that you may see")
    return {**_of_record(record), "record": record}


def _on_shelf(shelf: Shelf, viewer: Viewer) -> list[dict[str, Any]]:
    with shelf.index() as index:
        rows = index.select("SELECT expert_id, deposited_at FROM experts ORDER BY sequence")
        records = [(index.record(name), at) for name, at in rows]
    return [{**_of_record(record), "deposited_at_unix_ms": at} for record, at in records if viewer.sees(record)]


def _of_record(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "expert_id": record["expert_id"],
        "run": record["run"],
        "domain": record["domain"],
        "base_digest": record["base"]["manifest"],
        "digest": record["expert"]["digest"],
        "bytes": record["expert"]["bytes"],
    }


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
