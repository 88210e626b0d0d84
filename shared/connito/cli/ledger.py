"""`connito ledger`: who was paid what."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from connito.cli.audit import FromOption
from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render import formats


def ledger(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    account: Annotated[str, typer.Option(help="Only this miner or validator: a label or a public key.")] = "",
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the rewards of every cycle of a run, from its log. Exits with 6 if a cycle's rewards do not add up to its emission."""
    from connito.client import runs
    from connito.errors import VerificationFailed

    document, wrong = runs.ledger(run, account, folder, data_dir)
    emit(as_json, document, lambda: _text(document))
    if wrong:
        raise VerificationFailed(
            f"the ledger of {run} does not add up: {'; '.join(wrong)}; `connito audit {run}` says what was changed"
        )


def _text(document: dict[str, Any]) -> str:
    headers = ("cycle", "role", "name", "units", "balance", "why")
    rows = [[entry[header] for header in headers] for entry in document["entries"]]
    return (
        table(headers, rows, "no cycle has been paid yet")
        + f"\n\n{formats.count(document['emission'], 'unit')} a cycle, by {document['payout'] or 'rank-table'}"
        + ("; every unit is accounted for" if document["conserved"] else "")
    )
