"""Views of a run's log: replay, ledger and status, as the commands of these names print them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from connito.bus.streams import FACT_STREAMS
from connito.client.security import advisories
from connito.client.waiting import waiting
from connito.errors import ConnitoError, Invalid, NotFound
from connito.platform.log import hear_trained, newest, read_log, read_runs
from connito.platform.session import Session
from connito.protocol.quorum import pause
from connito.protocol.rules import Stake
from connito.runtime.tasks import blocking
from connito.v1.services_pb2 import RunStatus
from connito.views.leaderboard import Place, leaderboard
from connito.views.ledger import Entry, balances, entries
from connito.views.ledger import check as unbalanced
from connito.views.live import announce, phase
from connito.views.run_report import run_report, submission_rows
from connito.views.status import status as shown
from connito.wire.facts import RunFacts
from connito.wire.log import Log


def replay(session: Session, run: str) -> list[dict[str, Any]]:
    """Return every message of a run in the order of its time, verified, with what it did. Raises `NotFound`."""
    return blocking(_replay(session, run))


def status(session: Session, run: str = "") -> dict[str, Any]:
    """Return the services here and what they wait for, security events of the last day, and the newest run or the one named."""
    facts = blocking(_newest(session, run))
    return {
        "services": _services(session),
        "waiting": [] if session.data is None else waiting(session.data),
        "security_events": _security(session),
        "run": None if facts is None else _run(facts, session.roster.stake),
    }


def statuses(data_dir: Path | None, run: str | None = None) -> list[RunStatus]:
    """Return where every run stands that is shown to this key, or the one named; where nothing runs, what the log of the
    platform that rests there says. Raises `NotFound`."""
    from connito.client import Client

    session = Session.open(data_dir, role="customer", wake=True)
    if session.resting:
        return blocking(_resting(session, run))
    with Client.local(data_dir) as client:
        return [*client.job.list()] if run is None else [client.job.show(run)]


def ledger(
    run: str, account: str = "", folder: Path | None = None, data_dir: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return what every cycle of a run paid to whom, and where a cycle does not come to its emission.

    `folder`: what an ended `connito up` left; `account`: a label or a public key. Raises `NotFound`.
    """
    facts, book, wrong = book_of(run, folder, data_dir)
    shown = [entry for entry in book if not account or account in (entry.account, entry.name)]
    return {
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
    }, wrong


def book_of(run: str, folder: Path | None, data_dir: Path | None) -> tuple[RunFacts, list[Entry], list[str]]:
    """Return a run, every entry of its ledger, and where a cycle does not come to its emission. Raises `NotFound`."""
    facts = blocking(_facts(run, folder, data_dir))
    book = entries(facts)
    return facts, book, unbalanced(facts, book)


def miner(session: Session, key: str) -> list[dict[str, Any]]:
    """Return what became of a miner's submissions, a row a run and cycle. `key`: its public key."""
    return [row for facts in blocking(_all(session)) for row in _cycles(facts, key)]


def top(session: Session) -> list[Place]:
    """Return miners by what they earned, over every run that this key may read."""
    return leaderboard(blocking(_all(session)))


async def _replay(session: Session, run: str) -> list[dict[str, Any]]:
    async with session.bus() as bus:
        records = [record async for record in bus.stored((*FACT_STREAMS, "INGRESS"), run)]
    if not records:
        raise NotFound(f"there is no run {run!r}; `connito job list` shows the runs")
    log = Log(session.roster)
    ordered = sorted(records, key=lambda record: (record.time_unix_ms, record.stream, record.sequence))
    first = ordered[0].time_unix_ms
    return [_played(log, record, first) for record in ordered]


def _played(log: Any, record: Any, first_ms: int) -> dict[str, Any]:
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


async def _facts(run: str, folder: Path | None, data_dir: Path | None) -> RunFacts:
    from connito.audit.access import opened, refuse_released

    if folder is not None:
        async with opened(folder, data_dir) as access:
            return (await access.evidence(run)).facts
    session = Session.open(data_dir, role="customer", wake=True)
    async with session.bus() as bus:
        facts = _named(await read_log(bus, session.roster, run), run)
    refuse_released(facts)
    return facts


async def _resting(session: Session, run: str | None) -> list[RunStatus]:
    async with session.bus() as bus:
        log = await read_log(bus, session.roster, run or "")
    runs = [facts for facts in log.runs.values() if facts.spec is not None] if run is None else [_named(log, run)]
    now = time.time_ns() // 1_000_000
    return [shown(facts, now, session.roster.stake) for facts in runs]


def _named(log: Log, run: str) -> RunFacts:
    if run not in log.runs or log.runs[run].spec is None:
        raise NotFound(f"the log has no run {run!r}; `connito job list` shows the runs")
    return log.runs[run]


def _security(session: Session) -> dict[str, int]:
    """Return security events of the last day by kind; only who may read them is shown any."""
    counts: dict[str, int] = {}
    if session.data is None:
        return counts
    try:
        for row in advisories(Session.open(session.data.root, role="operator"), time.time() - 86400):
            counts[row["kind"]] = counts.get(row["kind"], 0) + row["count"]
    except ConnitoError:
        return counts
    return counts


async def _newest(session: Session, run: str) -> RunFacts | None:
    """Return the facts of one run: the one named, or the one created last."""
    async with session.bus() as bus:
        log = await read_log(bus, session.roster, run)
        facts = _named(log, run) if run else newest(log)
        if facts is not None:
            await hear_trained(bus, log, facts.run)
    return facts


def _run(facts: RunFacts, stake: Stake) -> dict[str, Any]:
    window = facts.open_window
    now = time.time_ns() // 1_000_000
    return {
        **run_report(facts),
        "phase": phase(facts, now, pause(facts, now, stake)),
        "window": "" if window is None else window.name,
        "cycle": facts.cycle,
        "miners": len(facts.miners),
        "validators": len(facts.validators),
    }


def _services(session: Session) -> list[dict[str, Any]]:
    rows = {} if session.data is None else session.data.read_pids()
    return [{"name": name, "pid": row["pid"], "restarts": row["restarts"]} for name, row in sorted(rows.items())]


async def _all(session: Session) -> list[RunFacts]:
    async with session.bus() as bus:
        return [*(await read_runs(session, bus)).runs.values()]


def _cycles(facts: RunFacts, key: str) -> list[dict[str, Any]]:
    return [
        {"run": facts.run, "cycle": cycle, **row}
        for cycle in facts.cycles()
        for row in submission_rows(facts, cycle)
        if row["key"] == key
    ]
