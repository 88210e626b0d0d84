"""`connito status`: what runs here and how far it is."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.platform.session import Session
    from connito.wire.facts import RunFacts


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and show what happens, until the run ends.")] = False,
    run: Annotated[str, typer.Option(help="Another run than the newest.")] = "",
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the services, the newest run's phase, losses and miners."""
    from connito.platform.session import Session

    session = Session.open(data_dir, role="customer")
    if watch and not as_json:
        asyncio.run(_watch(session, run))
        return
    facts = asyncio.run(_read(session, run))
    document = {
        "services": _services(session),
        "security_events": _security(session),
        "run": None if facts is None else _document(facts),
    }
    emit(as_json, document, lambda: _text(document))


def _security(session: Session) -> dict[str, int]:
    """Return security events of the last day by kind; only who may read them is shown any."""
    from connito.cli.advisories import gather
    from connito.errors import ConnitoError
    from connito.platform.session import Session

    counts: dict[str, int] = {}
    if session.data is None:
        return counts
    try:
        for row in gather(Session.open(session.data.root, role="operator"), time.time() - 86400, None):
            counts[row["kind"]] = counts.get(row["kind"], 0) + row["count"]
    except ConnitoError:
        return counts
    return counts


async def _read(session: Session, run: str) -> RunFacts | None:
    """Return the facts of one run: the one named, or the one created last."""
    from connito.platform.log import newest, read_log

    async with session.bus() as bus:
        log = await read_log(bus, session.roster, run)
    return newest(log) if not run else log.runs.get(run)


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


def _document(facts: RunFacts) -> dict[str, Any]:
    from connito.views.live import phase
    from connito.views.run_report import run_report

    window = facts.open_window
    now = time.time_ns() // 1_000_000
    return {
        **run_report(facts),
        "phase": phase(facts, now),
        "window": "" if window is None else window.name,
        "cycle": facts.cycle,
        "miners": len(facts.miners),
        "validators": len(facts.validators),
    }


def _services(session: Session) -> list[dict[str, Any]]:
    rows = {} if session.data is None else session.data.read_pids()
    return [{"name": name, "pid": row["pid"], "restarts": row["restarts"]} for name, row in sorted(rows.items())]


def _text(document: dict[str, Any]) -> str:
    parts = [
        table(("service", "pid", "restarts"), [(s["name"], s["pid"], s["restarts"]) for s in document["services"]])
    ]
    if document["security_events"]:
        seen = ", ".join(f"{count} × {kind}" for kind, count in sorted(document["security_events"].items()))
        parts += ["", f"security: {seen} in the last day; `connito advisories` shows them"]
    run = document["run"]
    if run is None:
        return "\n".join([*parts, "", "no run yet"])
    parts += ["", f"{run['run']}: {run['phase']}"]
    for cycle in run["cycles"]:
        rows = [
            (row["miner"], row["status"], row["reason"], row["utility"], row["rank"], row["reward"])
            for row in cycle["submissions"]
        ]
        losses = f"target {cycle['target_loss_before']:.4f} → {cycle['target_loss_after']:.4f}"
        merged = ", ".join(cycle["merged"]) or "nobody"
        parts += ["", f"cycle {cycle['cycle']}: {losses}, gate {cycle['gate']}, merged {merged}"]
        parts.append(table(("miner", "status", "reason", "utility", "rank", "reward"), rows))
    return "\n".join(parts)
