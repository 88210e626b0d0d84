"""`connito replay`: play a run's log back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit


def replay(
    run: Annotated[str, typer.Argument(help="The run's id, as `connito job list` shows it.")],
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Read every message of a run in the order of its time, verify it, and say what it did."""
    rows = asyncio.run(_rows(data_dir, run))
    document = {"run": run, "messages": rows, "invalid": sum(1 for row in rows if row["error"])}
    emit(
        as_json,
        document,
        lambda: "\n".join([*map(_line, rows), f"{len(rows)} messages, {document['invalid']} invalid"]),
    )


async def _rows(data_dir: Any, run: str) -> list[dict[str, Any]]:
    from contextlib import aclosing

    from connito.bus import CaughtUp
    from connito.bus.streams import FACT_STREAMS
    from connito.errors import NotFound
    from connito.platform.session import Session
    from connito.wire.log import Log

    session = Session.open(data_dir, role="customer")
    records = []
    async with session.bus() as bus, aclosing(bus.follow((*FACT_STREAMS, "INGRESS"), run)) as stored:
        async for item in stored:
            if isinstance(item, CaughtUp):
                break
            records.append(item)
    if not records:
        raise NotFound(f"there is no run {run!r}; `connito job list` shows the runs")
    log = Log(session.roster)
    ordered = sorted(records, key=lambda record: (record.time_unix_ms, record.stream, record.sequence))
    first = ordered[0].time_unix_ms
    return [_row(log, record, first) for record in ordered]


def _row(log: Any, record: Any, first_ms: int) -> dict[str, Any]:
    from connito.errors import Invalid
    from connito.views.live import announce

    row = {
        "seconds": (record.time_unix_ms - first_ms) / 1000,
        "stream": record.stream,
        "sequence": record.sequence,
        "subject": record.subject,
        "signer": "",
        "text": "",
        "error": "",
    }
    try:
        fact = log.apply(record)
    except Invalid as error:
        return {**row, "error": str(error)}
    if fact is None:
        return {**row, "text": "known already"}
    return {**row, "signer": fact.signer, "text": announce(fact, log.runs[fact.run], {}) or ""}


def _line(row: dict[str, Any]) -> str:
    what = row["subject"].split(".", 3)[-1]
    return f"{row['seconds']:8.3f}  {row['stream']:<8} {row['sequence']:>5}  {what}  {row['error'] or row['text']}".rstrip()
