"""`connito ledger`: who was paid what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.audit import FromOption
from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.wire.facts import RunFacts


def ledger(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    account: Annotated[str, typer.Option(help="Only this miner or validator: a label or a public key.")] = "",
    folder: FromOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what every cycle of a run paid to whom, from its log. Exits with 6 where a cycle does not come to its emission."""
    from connito.errors import VerificationFailed
    from connito.views.ledger import balances, check, entries

    facts = asyncio.run(_read(folder, data_dir, run))
    book = entries(facts)
    wrong = check(facts, book)
    shown = [entry for entry in book if not account or account in (entry.account, entry.name)]
    document = {
        "run": run,
        "emission": facts.spec.emission if facts.spec is not None else 0,
        "payout": facts.spec.rewards.payout if facts.spec is not None else "",
        "entries": [entry.to_json() for entry in shown],
        "balances": {
            entry.account or entry.role: entry.balance
            for entry in balances(book)
            if not account or account in (entry.account, entry.name)
        },
        "conserved": not wrong,
    }
    emit(as_json, document, lambda: _text(document))
    if wrong:
        raise VerificationFailed(
            f"the ledger of {run} does not add up: {'; '.join(wrong)}; `connito audit {run}` says what was changed"
        )


async def _read(folder: Path | None, data_dir: Path | None, run: str) -> RunFacts:
    from connito.errors import NotFound
    from connito.platform.log import read_log
    from connito.platform.session import Session

    if folder is not None:
        from connito.audit.access import opened

        async with opened(folder, data_dir) as access:
            return (await access.evidence(run)).facts
    session = Session.open(data_dir, role="customer")
    async with session.bus() as bus:
        log = await read_log(bus, session.roster, run)
    if run not in log.runs:
        raise NotFound(f"the log holds nothing of a run {run!r}; `connito job list` shows the runs")
    return log.runs[run]


def _text(document: dict[str, Any]) -> str:
    headers = ("cycle", "role", "name", "units", "balance", "why")
    rows = [[entry[header] for header in headers] for entry in document["entries"]]
    return (
        table(headers, rows, "no cycle has been paid yet")
        + f"\n\n{document['emission']} units a cycle, by {document['payout'] or 'rank-table'}"
        + ("; every unit is accounted for" if document["conserved"] else "")
    )
