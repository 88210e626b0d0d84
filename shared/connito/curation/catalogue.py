"""`connito.library`: list, show, search, mark, ledger and demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.client import Client
from connito.curation.holdings import Holdings, now_ms, read_folder
from connito.errors import Invalid, NotFound
from connito.library.governance import Standing, attribute
from connito.library.hits import Hit, Ranked
from connito.library.hits import search as find
from connito.library.scores import as_rows
from connito.library.searches import remember
from connito.views.notebook import Card, Rows

if TYPE_CHECKING:
    from connito.v1.services_pb2 import ExpertSummary


@dataclass(frozen=True)
class SearchOptions:
    """A search. `like`: texts to rank by the loss saved on them, on the model in `base`; `measure`: how many
    of the best predicted to measure; `everything`: yanked and opted-out experts too."""

    domain: str = ""
    like: Sequence[Path] = ()
    base: Path | None = None
    measure: int = 5
    limit: int = 20
    everything: bool = False


def list_(library: Holdings | None = None) -> list[dict[str, Any]]:
    """Return the experts, oldest first: the platform's and those on the shelf. Raises `NotFound` with neither."""
    library = library or Holdings()
    rows = Rows[dict[str, Any]]()
    if (client := library.platform()) is not None:
        with client:
            rows += map(_row, client.library.list())
    known = {row["expert_id"] for row in rows}
    rows += [row for row in _on_shelf(library) if row["expert_id"] not in known]
    if not rows and client is None and library.shelf is None:
        with Client.local(library.data_dir) as missing:
            missing.library.reach()  # Raises what says how to start one.
    return rows


def show(expert: str | Path, library: Holdings | None = None) -> dict[str, Any]:
    """Return one expert, by id or folder, with its `record`. Raises `NotFound`."""
    library, folder = library or Holdings(), Path(expert)
    if folder.is_dir():
        record = read_folder(folder)[1]
        return Card(_of_record(record), record=record)
    if (client := library.platform()) is not None:
        with client, suppress(NotFound):
            summary, record = client.library.show(str(expert))
            return Card(_row(summary), record=record)
    record = library.open_shelf().get(str(expert))[1]
    if not library.viewer.sees(record):
        raise NotFound(f"there is no expert {str(expert)!r} that you may see")
    return Card(_of_record(record), record=record)


def search(
    text: str = "", options: SearchOptions | None = None, library: Holdings | None = None
) -> list[Hit] | list[Ranked]:
    """Find experts by words and domain, best first; with `like`, rank them by the loss they save. Imports torch then.

    What is asked for and not found counts as demand.
    """
    options, library = options or SearchOptions(), library or Holdings()
    if options.like and options.base is None:
        raise Invalid("--like measures on a model: add --base DIR")
    hits = _by_words(text, options, library)
    root, words = library.open_shelf().root, text.split()
    if options.like:
        from connito.curation.example import rank_by_example

        assert options.base is not None
        ranked = rank_by_example(hits, options.base, options.like, options.measure, library)[: options.limit]
        best = max((row.measured for row in ranked if row.measured is not None), default=0.0)
        remember(root, words, options.domain, len(ranked), now_ms(), best)
        return Rows(ranked)
    if words or options.domain:
        remember(root, words, options.domain, len(hits), now_ms())
    return Rows(hits)


def _by_words(text: str, options: SearchOptions, library: Holdings) -> list[Hit]:
    limit = max(options.limit, 1000) if options.like else options.limit
    wanted: dict[str, Any] = {"domain": options.domain, "everything": options.everything, "limit": limit}
    with library.open_shelf().index() as index:
        hits = find(index, text, viewer=library.viewer, **wanted)
    client = library.platform()
    if client is None:
        return hits
    # What the platform says of an expert now outweighs what the shelf's copy of it says.
    with client:
        served = {hit.expert_id: hit for hit in client.library.search(text, **wanted)}
        hits = [hit for hit in hits if hit.expert_id in served or _of_the_shelf_alone(client, hit.expert_id)]
    local = {hit.expert_id: hit for hit in hits}
    records = {name: hit.record for name, hit in local.items()}
    both = [replace(hit, record=records.get(name, {})) for name, hit in {**local, **served}.items()]
    return sorted(both, key=_better)[:limit]


def _of_the_shelf_alone(client: Client, expert: str) -> bool:
    """Return whether the platform does not know an expert: of what it knows it says itself what may be found."""
    try:
        client.library.standing(expert)
    except NotFound:
        return True
    return False


def _better(hit: Hit) -> tuple[float, float, str]:
    return (-hit.score, -(hit.saving if hit.saving is not None else float("-inf")), hit.expert_id)


def mark(subject: str, status: str, reason: str, library: Holdings | None = None) -> None:
    """Deprecate, yank or restore an expert, or opt a data source out or in: on the platform that knows it, else on the
    shelf."""
    library, known = library or Holdings(), False
    if (client := library.platform()) is not None:
        with client, suppress(NotFound):
            client.library.mark(subject, status, reason)
            known = True
    shelf = library.open_shelf()
    # What the platform was told goes for the copy here, too, which is what is found when nothing runs.
    if not known or shelf.path(subject).is_dir():
        shelf.state(status, subject, reason, now_ms())


def ledger(expert: str, library: Holdings | None = None) -> dict[str, Any]:
    """Return an expert's `uses` by verb, the units `credited` to miners, and those `uncredited`. Raises `NotFound`."""
    library = library or Holdings()
    if (client := library.platform()) is not None:
        with client, suppress(NotFound):
            return client.library.ledger(expert)
    with library.open_shelf().index() as index:
        record, uses = index.record(expert), index.usage(expert)
        if not library.viewer.sees(record):
            raise NotFound(f"there is no expert {expert!r} that you may see")
        credit = attribute(record, sum(uses.values()), index.lookup)
    return {"uses": uses, "credited": credit.units, "uncredited": credit.uncredited}


def _on_shelf(library: Holdings) -> list[dict[str, Any]]:
    with library.open_shelf().index() as index:
        rows = index.select("SELECT expert_id, deposited_at FROM experts ORDER BY sequence")
        found = [(index.record(name), at, index.standing(name)) for name, at in rows]
    return [
        {**_of_record(record), "deposited_at_unix_ms": at, "standing": str(standing)}
        for record, at, standing in found
        if library.viewer.sees(record)
    ]


def _of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "expert_id": record["expert_id"], "run": record["run"], "domain": record["domain"],
        "base_digest": record["base"]["manifest"], "digest": record["expert"]["digest"],
        "bytes": record["expert"]["bytes"], "scores": record.get("scores", []),
    }  # fmt: skip


def _row(expert: ExpertSummary) -> dict[str, Any]:
    return {
        "expert_id": expert.expert_id, "run": expert.run, "domain": expert.domain, "base_digest": expert.base_digest,
        "digest": expert.expert.digest, "bytes": expert.expert.size,
        "deposited_at_unix_ms": expert.deposited_at_unix_ms,
        "standing": str(Standing(expert.status or "good", expert.reason)), "scores": as_rows(expert.scores),
    }  # fmt: skip
