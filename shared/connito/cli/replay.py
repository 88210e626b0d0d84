"""`connito replay`: play a run's log back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit
from connito.render import formats


def replay(
    run: Annotated[str, typer.Argument(help="The run's id, as `connito job list` shows it.")],
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Read and verify every message of a run in the order of time, and print its effect."""
    from connito.client import runs
    from connito.platform.session import Session

    rows = runs.replay(Session.open(data_dir, role="customer", wake=True), run)
    document = {"run": run, "messages": rows, "invalid": sum(1 for row in rows if row["error"])}
    emit(
        as_json,
        document,
        lambda: "\n".join([*map(_line, rows), f"{formats.count(len(rows), 'message')}, {document['invalid']} invalid"]),
    )


def _line(row: dict[str, Any]) -> str:
    what = row["subject"].split(".", 3)[-1]
    return f"{row['seconds']:8.3f}  {row['stream']:<8} {row['sequence']:>5}  {what}  {row['error'] or row['text']}".rstrip()
