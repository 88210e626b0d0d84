"""`connito.library.demand`: which domains most need training next, and what it would gain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connito.curation.holdings import Holdings
from connito.errors import NotFound
from connito.library.governance import Standing
from connito.library.searches import recall
from connito.library.training_demand import Demand, Training, training_of, training_of_record
from connito.library.training_demand import demand as rank
from connito.platform.log import read_log
from connito.platform.session import Session
from connito.runtime.tasks import blocking


def demand(cycles: int = 4, library: Holdings | None = None) -> list[Demand]:
    """Rank domains by need, from runs, uses and searches that found nothing; gains are estimated for `cycles` more."""
    library = library or Holdings()
    local = library.open_shelf()
    trained, used = _of_platform(library.data_dir)
    here: Counter[str] = Counter()
    trainings = {training.expert_id or f"run {training.at}": training for training in trained}
    uses: dict[str, int] = {}
    domains = {training.expert_id: training.domain for training in trainings.values()}
    with local.index() as index:
        for event in local.events():
            if event.kind == "deposited":
                _shelved(event.body, event.sequence, trainings)
                domains[event.subject] = str(event.body["domain"])
            elif event.kind == "used":
                here[event.subject] += int(event.body.get("units", 1))
        withdrawn = {name for name in trainings if index.standing(name).withdrawn} | _withdrawn(library)
    # A use from here is in both, where the platform knew the expert and ran; one by somebody else in its log alone.
    for expert_id, units in (used | here).items():
        domain = domains.get(expert_id, expert_id)
        uses[domain] = uses.get(domain, 0) + units
    return rank([*trainings.values()], uses, recall(local.root), withdrawn, cycles=cycles)


def _withdrawn(library: Holdings) -> set[str]:
    """Return what the library of the platform says may not be used any more."""
    if (client := library.platform()) is None:
        return set()
    with client:
        said = {row.expert_id: Standing(row.status or "good", row.reason) for row in client.library.list()}
    return {name for name, standing in said.items() if standing.withdrawn}


def _shelved(record: Mapping[str, Any], at: int, trainings: dict[str, Training]) -> None:
    """Add an expert whose run's log is not at hand; what was composed or pruned was not trained."""
    name = str(record["expert_id"])
    if name not in trainings and record.get("run"):
        trainings[name] = training_of_record(record, at)


def _of_platform(data_dir: Path | None) -> tuple[list[Training], Counter[str]]:
    """Return every run of the platform that runs here, and the metered uses by expert id; nothing without one."""
    try:
        session = Session.open(data_dir, role="customer", wake=True)
    except NotFound:
        return [], Counter()

    async def read() -> tuple[list[Training], Counter[str]]:
        async with session.bus() as bus:
            log = await read_log(bus, session.roster)
        found = [training_of(facts) for facts in log.runs.values()]
        used: Counter[str] = Counter()
        for facts in log.runs.values():
            for fact in facts.uses.values():
                used[fact.message.expert_id] += int(fact.message.units)
        return [training for training in found if training is not None], used

    return blocking(read())
