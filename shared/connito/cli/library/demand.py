"""`connito library demand`: which domains most need training next, and what it would gain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.library.experts import ShelfOption, open_shelf
from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.library.training_demand import Demand, Training


def demand(
    cycles: Annotated[int, typer.Option(help="Further cycles that the gain is estimated for.")] = 4,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List which domains most need training next, from runs, uses and searches that found nothing."""
    from connito.library.searches import recall
    from connito.library.training_demand import demand as rank

    local = open_shelf(shelf, data_dir)
    trained, used = _of_platform(data_dir)
    trainings = {training.expert_id or f"run {training.at}": training for training in trained}
    uses: dict[str, int] = {}
    domains = {training.expert_id: training.domain for training in trainings.values()}
    with local.index():
        for event in local.events():
            if event.kind == "deposited":
                _shelved(event.body, event.sequence, trainings)
                domains[event.subject] = str(event.body["domain"])
            elif event.kind == "used":
                used.append((event.subject, int(event.body.get("units", 1))))
    for expert_id, units in used:
        domain = domains.get(expert_id, expert_id)
        uses[domain] = uses.get(domain, 0) + units
    rows = rank(list(trainings.values()), uses, recall(local.root), cycles=cycles)
    document = {"cycles": cycles, "formula": FORMULA, "domains": [row.to_json() for row in rows]}
    emit(as_json, document, lambda: _text(rows, cycles))


FORMULA = "score = (1 + uses + searches that found nothing) × expected gain in nats per token"


def _shelved(record: Mapping[str, Any], at: int, trainings: dict[str, Training]) -> None:
    """Add an expert whose run's log is missing; composed or pruned experts are skipped, since they were not trained."""
    from connito.library.training_demand import training_of_record

    name = str(record["expert_id"])
    if name not in trainings and record.get("run"):
        trainings[name] = training_of_record(record, at)


def _of_platform(data_dir: Path | None) -> tuple[list[Training], list[tuple[str, int]]]:
    """Return every run of the platform that runs here, and the metered uses (expert id, units); nothing without one."""
    import asyncio

    from connito.errors import NotFound
    from connito.library.training_demand import training_of
    from connito.platform.log import read_log
    from connito.platform.session import Session
    from connito.v1.run_pb2 import ExpertUsed

    try:
        session = Session.open(data_dir, role="customer")
    except NotFound:
        return [], []

    async def read() -> tuple[list[Training], list[tuple[str, int]]]:
        async with session.bus() as bus:
            log = await read_log(bus, session.roster)
        found = [training_of(facts) for facts in log.runs.values()]
        used = [
            (fact.message.expert_id, int(fact.message.units))
            for facts in log.runs.values()
            for fact in facts.uses.values()
            if isinstance(fact.message, ExpertUsed)
        ]
        return [training for training in found if training is not None], used

    return asyncio.run(read())


def _text(rows: list[Demand], cycles: int) -> str:
    headers = ("domain", "experts", "uses", "missed", "saved", "last cycle", "expected", "score", "from")
    cells = [
        (row.domain, row.experts, row.uses, row.misses, row.saved, row.last_cycle, row.expected, row.score, row.basis)
        for row in rows
    ]
    listing = table(headers, cells, "nothing was trained, used or searched for yet")
    note = f"{FORMULA}, over {cycles} further cycles; an extrapolation that ranks and promises nothing"
    return f"{listing}\n{note}" if rows else listing
