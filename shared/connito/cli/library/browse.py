"""`connito library`: list, show, search and demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connito.cli.library.options import (
    AsOption,
    OrganisationOption,
    ShelfOption,
    base_option,
    holdings,
)
from connito.cli.output import DataDirOption, DeviceOption, JsonFlag, emit, table, told
from connito.library.schema import ExpertRecord
from connito.library.scores import line
from connito.render.formats import moment, size

if TYPE_CHECKING:
    from connito.library.hits import Hit, Ranked
    from connito.library.training_demand import Demand

app = typer.Typer(no_args_is_help=True, help="The expert library.")


@app.command("list")
def list_(
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List the experts of the running platform and of the local library, oldest first. The local library needs no platform."""
    from connito.curation import catalogue

    rows = catalogue.list_(holdings(shelf, data_dir, who, organisation))
    emit(
        as_json,
        {"experts": rows},
        lambda: table(
            ("expert", "domain", "run", "size", "deposited", "standing", "scores"),
            [
                (
                    r["expert_id"],
                    r["domain"],
                    r["run"],
                    size(r["bytes"]),
                    moment(r["deposited_at_unix_ms"]),
                    "" if r["standing"] == "good" else r["standing"],
                    line(r["scores"]),
                )
                for r in rows
            ],
            "the library is empty; a run that completes leaves an expert here",
        ),
    )


@app.command("show")
def show(
    expert_id: Annotated[str, typer.Argument(help="As `connito library list` shows it, or a folder.")],
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one expert's record, as its card."""
    from connito.curation import catalogue

    document = catalogue.show(expert_id, holdings(shelf, data_dir, who, organisation))
    emit(as_json, document, lambda: _card(document["record"]))


@app.command("search")
@told
def search(
    words: Annotated[list[str] | None, typer.Argument(help="Words to find: all of them, else any of them.")] = None,
    domain: Annotated[str, typer.Option(help="Only this domain.")] = "",
    like: Annotated[
        list[Path] | None, typer.Option(help="Texts: rank by the loss saved on them. Needs --base.")
    ] = None,
    base: Annotated[Path | None, base_option("Base model, with --like.")] = None,
    measure: Annotated[int, typer.Option(help="How many of the best predicted to measure, with --like.")] = 5,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Include yanked and opted-out experts.")] = False,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """Search the library by words, by domain, or by example."""
    from connito.curation import catalogue

    options = catalogue.SearchOptions(domain, tuple(like or ()), base, measure, limit, everything)
    found = catalogue.search(" ".join(words or []), options, holdings(shelf, data_dir, who, organisation))
    emit(as_json, {"experts": [row.to_json() for row in found]}, lambda: _found_text(found, by_example=bool(like)))


@app.command("demand")
def demand(
    cycles: Annotated[int, typer.Option(help="Further cycles that the gain is estimated for.")] = 4,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Rank the domains that most need training next, from runs, uses and searches without results."""
    from connito.curation import need

    rows = need.demand(cycles, holdings(shelf, data_dir))
    document = {"cycles": cycles, "formula": FORMULA, "domains": [row.to_json() for row in rows]}
    emit(as_json, document, lambda: _demand(rows, cycles))


FORMULA = "score = (1 + uses + searches that found nothing) × expected gain in nats per token"


def _card(record: ExpertRecord) -> str:
    from connito.library.card import render

    try:
        return render(record)
    except (KeyError, TypeError):
        return json.dumps(record, indent=2)


def _found_text(found: list[Hit] | list[Ranked], *, by_example: bool) -> str:
    from connito.library.hits import Ranked

    if by_example:
        return _ranking([row for row in found if isinstance(row, Ranked)])
    return _hits([row for row in found if not isinstance(row, Ranked)])


def _hits(hits: list[Hit]) -> str:
    rows = [
        (hit.expert_id, hit.domain, "" if hit.saving is None else f"{hit.saving:+.4f}", hit.license, _standing(hit))
        for hit in hits
    ]
    return table(("expert", "domain", "saves", "licence", "standing"), rows, "nothing found; try fewer words, or --all")


def _standing(hit: Hit) -> str:
    return "" if hit.standing.status == "good" else str(hit.standing)


def _ranking(rows: list[Ranked]) -> str:
    cells = [
        (row.expert_id, row.domain, f"{row.predicted:+.4f}", "" if row.measured is None else f"{row.measured:+.4f}")
        for row in rows
    ]
    return table(("expert", "domain", "predicted", "measured"), cells, "no expert of this base is on the shelf")


def _demand(rows: list[Demand], cycles: int) -> str:
    headers = ("domain", "experts", "uses", "missed", "saved", "last cycle", "expected", "score", "from")
    cells = [
        (row.domain, row.experts, row.uses, row.misses, row.saved, row.last_cycle, row.expected, row.score, row.basis)
        for row in rows
    ]
    listing = table(headers, cells, "nothing was trained, used or searched for yet")
    note = f"{FORMULA}, over {cycles} further cycles; an extrapolation that ranks and promises nothing"
    return f"{listing}\n{note}" if rows else listing
