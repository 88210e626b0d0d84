"""`connito status`: what runs here and how far it is."""

from __future__ import annotations

import asyncio
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.platform.session import Session


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing the status until the run ends.")] = False,
    run: Annotated[str, typer.Option(help="Run to show instead of the newest.")] = "",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the services, what they wait for, the newest run's phase, losses and miners."""
    from connito.client import runs
    from connito.platform.session import Session

    session = Session.open(data_dir, role="customer")
    if watch and not as_json:
        asyncio.run(_watch(session, run))
        return
    document = runs.status(session, run)
    emit(as_json, document, lambda: _text(document))


async def _watch(session: Session, run: str) -> None:
    from connito.local.display import choose_display
    from connito.local.log import follow_run
    from connito.platform.log import newest, read_log

    async with session.bus() as bus:
        if not run:
            facts = newest(await read_log(bus, session.roster, ""))
            run = facts.run if facts is not None else ""
        names: dict[str, str] = {}
        with choose_display(as_json=False) as display:
            await follow_run(bus, session.roster, run, names, display, until=lambda facts: facts.ended is not None)


def _text(document: dict[str, Any]) -> str:
    parts = [
        table(("service", "pid", "restarts"), [(s["name"], s["pid"], s["restarts"]) for s in document["services"]])
    ]
    if document["security_events"]:
        seen = ", ".join(f"{count} × {kind}" for kind, count in sorted(document["security_events"].items()))
        parts += ["", f"security: {seen} in the last day; `connito advisories` shows them"]
    for name, waits in groupby(document["waiting"], key=itemgetter("run")):
        rows = list(waits)
        what = ", ".join(f"{row['dependency']} ({row['count']})" for row in rows)
        parts += ["", f"{name or 'the platform'} waits for {what}"]
        parts += [f"  {', '.join(row['services'])}: {' '.join(row['error'].split())}" for row in rows]
    run = document["run"]
    if run is None:
        return "\n".join([*parts, "", "no run yet"])
    parts += ["", f"{run['run']}: {run['phase']}"]
    for cycle in run["cycles"]:
        rows = [
            (row["miner"], row["status"], row["reason"], row["utility"], row["rank"], row["reward"])
            for row in cycle["submissions"]
        ]
        losses = f"loss {cycle['target_loss_before']:.4f} → {cycle['target_loss_after']:.4f} nats per token"
        merged = ", ".join(cycle["merged"]) or "nobody"
        parts += ["", f"cycle {cycle['cycle']}: {losses}, gate {cycle['gate']}, merged {merged}"]
        parts.append(table(("miner", "status", "reason", "utility", "rank", "reward"), rows))
    return "\n".join(parts)
