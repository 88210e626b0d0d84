"""`connito library` beyond list and show: search, deposit, mark, verify, export, and the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.library import compose, grow, shrink
from connito.cli.library.experts import (
    AcceptOption,
    AsOption,
    CommercialFlag,
    Expert,
    OrganisationOption,
    OutOption,
    ShelfOption,
    YankedFlag,
    cut_sequences,
    find_expert,
    meter,
    now_ms,
    obligations,
    open_shelf,
    permit,
    platform,
    read_folder,
    viewer_of,
)
from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.experts.compose import Part
    from connito.library.hits import Hit, Ranked


def register(app: typer.Typer) -> None:
    """Add these verbs, and those that make something of experts, to `connito library`."""
    own = (search, deposit, mark, ledger, verify, export)
    made = (compose.compose, compose.remove, compose.upgrade, compose.cluster, compose.route)
    added = (grow.grow, grow.join, grow.branches)
    small = (shrink.prune, shrink.extract, shrink.skip)
    for verb in (*own, *made, *added, *small):
        app.command(verb.__name__)(verb)


def search(
    words: Annotated[list[str] | None, typer.Argument(help="All of these, else any of them.")] = None,
    domain: Annotated[str, typer.Option(help="Only this domain.")] = "",
    like: Annotated[
        list[Path] | None, typer.Option(help="Texts: rank by the loss saved on them. Needs --base.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model, with --like.")] = None,
    measure: Annotated[int, typer.Option(help="How many of the best predicted to measure, with --like.")] = 5,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Yanked and opted-out experts too.")] = False,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Search the library by words, by domain, or by example."""
    from connito.errors import Invalid
    from connito.library.hits import search as find

    if like and base is None:
        raise Invalid("--like measures on a model: add --base DIR")
    text, count = " ".join(words or []), max(limit, 1000) if like else limit
    viewer = viewer_of(who, organisation)
    with open_shelf(shelf, data_dir).index() as index:
        hits = find(index, text, domain=domain, viewer=viewer, everything=everything, limit=count)
    if shelf is None:
        # What the platform says of an expert now outweighs what the shelf's copy of it says.
        local = {hit.expert_id: hit for hit in hits}
        served = {hit.expert_id: hit for hit in _served(data_dir, text, domain, everything, count)}
        records = {name: hit.record for name, hit in local.items()}
        both = [replace(hit, record=records.get(name, {})) for name, hit in {**local, **served}.items()]
        hits = sorted(both, key=_better)[:count]
    if like:
        assert base is not None
        ranked = _by_example(hits, base, like, measure, shelf, data_dir)[:limit]
        best = max((row.measured for row in ranked if row.measured is not None), default=0.0)
        _remember(words, domain, len(ranked), shelf, data_dir, best)
        rows = [vars(row) for row in ranked]
        emit(as_json, {"experts": rows}, lambda: _ranking(ranked))
        return
    _remember(words, domain, len(hits), shelf, data_dir)
    emit(as_json, {"experts": [hit.to_json() for hit in hits]}, lambda: _hits(hits))


def _remember(
    words: list[str] | None,
    domain: str,
    hits: int,
    shelf: Path | None,
    data_dir: Path | None,
    best: float | None = None,
) -> None:
    """Count a search: what is asked for and not found is demand."""
    from connito.library.searches import remember

    if words or domain or best is not None:
        remember(open_shelf(shelf, data_dir).root, words or [], domain, hits, now_ms(), best)


def deposit(
    expert: Annotated[Path, typer.Argument(help="Folder of an export, a pruning or an extraction.")],
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Put an expert, or a model made of experts, on the shelf."""
    from connito.library.artifact import EXPERT_FILE

    folder, record = read_folder(expert)
    local = open_shelf(shelf, data_dir, make=True)
    if (folder / EXPERT_FILE).is_file():
        name = local.deposit(folder / EXPERT_FILE, record, now_ms())
    else:
        name = local.deposit_model(folder, now_ms())
    emit(as_json, {"expert_id": name, "digest": record["expert"]["digest"]}, lambda: f"deposited {name}")


def mark(
    subject: Annotated[str, typer.Argument(help="Expert id; for opted-out and opted-in, the data source.")],
    status: Annotated[str, typer.Argument(help="deprecated, yanked, restored, opted-out or opted-in.")],
    reason: Annotated[str, typer.Option(help="Why; shown to everyone who asks for it.")],
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Deprecate, yank or restore an expert, or take a data source out of the library."""
    from connito.errors import NotFound

    client = platform(data_dir) if shelf is None else None
    said = False
    if client is not None:
        with client, suppress(NotFound):
            client.library.mark(subject, status, reason)
            said = True
    if not said:
        open_shelf(shelf, data_dir).state(status, subject, reason, now_ms())
    emit(as_json, {"subject": subject, "status": status, "reason": reason}, lambda: f"{subject} is {status}: {reason}")


def ledger(
    expert: Annotated[str, typer.Argument(help="Expert id.")],
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show how often an expert was used, for what, and the miners that its use is credited to."""
    from connito.errors import NotFound
    from connito.library.governance import attribute

    client, document = platform(data_dir) if shelf is None else None, None
    if client is not None:
        with client, suppress(NotFound):
            document = client.library.ledger(expert)
    if document is None:
        with open_shelf(shelf, data_dir).index() as index:
            record, uses = index.record(expert), index.usage(expert)
            if not viewer_of(who, organisation).sees(record):
                raise NotFound(f"there is no expert {expert!r} that you may see")
            credit = attribute(record, sum(uses.values()), index.lookup)
        document = {"uses": uses, "credited": credit.units, "uncredited": credit.uncredited}
    shown = {"expert_id": expert, **document}
    rows = [(verb, units) for verb, units in sorted(document["uses"].items())]
    people = [(miner, units) for miner, units in sorted(document["credited"].items(), key=lambda item: -item[1])]
    emit(
        as_json,
        shown,
        lambda: "\n\n".join(
            [
                table(("use", "units"), rows, "never used"),
                table(("miner", "credited units"), people, "nobody to credit"),
            ]
        ),
    )


def verify(
    target: Annotated[str, typer.Argument(help="Expert id, folder of an expert, or folder of an exported model.")],
    base: Annotated[Path | None, typer.Option(help="Compare with, or recompute on, this base.")] = None,
    roster: Annotated[Path | None, typer.Option(help="The operator's roster, to check signers against.")] = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check an expert or an exported model offline: digests, signatures; with --base, recompute a composition."""
    checked = _verify(target, base, roster, shelf, data_dir)
    emit(as_json, {"target": target, "verified": checked}, lambda: "\n".join(f"ok  {what}" for what in checked))


def export(
    expert: Annotated[str, typer.Argument(help="Expert id or folder.")],
    out: OutOption,
    base: Annotated[Path | None, typer.Option(help="Write the whole model with the expert in it.")] = None,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    commercial: CommercialFlag = False,
    redistribute: Annotated[bool, typer.Option("--redistribute", help="It will be passed on to others.")] = False,
    allow_yanked: YankedFlag = False,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take an expert home: file, record and card; with --base, a whole checkpoint that transformers loads."""
    from connito.library.governance import Use

    found = find_expert(expert, shelf, data_dir)
    use = Use("export", commercial, redistribute, frozenset(accept_license or []))
    permission = permit([found], use, viewer_of(who, organisation), shelf, data_dir, allow_yanked)
    document = _export_whole(found, base, out) if base is not None else _copy(found[0], found[1], out)
    meter([found[1]], "export", who, shelf, data_dir)
    document = {**document, "license": permission.license, "attribution": permission.attribution}
    emit(as_json, document, lambda: "\n".join([f"written to {out}", *obligations(permission)]))


def _served(data_dir: Path | None, text: str, domain: str, everything: bool, count: int) -> Sequence[Hit]:
    """Return the hits of the platform that runs here; nothing if none runs."""
    client = platform(data_dir)
    if client is None:
        return []
    with client:
        return client.library.search(text, domain=domain, everything=everything, limit=count)


def _better(hit: Hit) -> tuple[float, float, str]:
    return (-hit.score, -(hit.saving if hit.saving is not None else float("-inf")), hit.expert_id)


# By signature alone, this many candidates are kept; only these are fetched and differentiated.
CONSIDERED = 50


def _by_example(
    hits: list[Hit], base: Path, texts: list[Path], measure: int, shelf: Path | None, data_dir: Path | None
) -> list[Ranked]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts.compose import Part, read_part
    from connito.experts.predict import measure_savings, nearest_experts, predict_savings
    from connito.library.artifact import EXPERT_FILE
    from connito.library.hits import rank
    from connito.moe.rows import fingerprint

    model, sequences = load_full(base), cut_sequences(load_tokenizer(base), texts)
    digests, parts = fingerprint(model), dict[str, Part]()
    if len(hits) > CONSIDERED:
        near = nearest_experts(model, {hit.expert_id: hit.record for hit in hits}, sequences)[:CONSIDERED]
        hits = [hit for hit in hits if hit.expert_id in set(near)]
    for hit in hits:
        folder = find_expert(hit.expert_id, shelf, data_dir)[0]
        if not (folder / EXPERT_FILE).is_file():
            continue  # a whole model: it is not put into the base
        part = read_part(folder)
        if _fits(model, part, digests):
            parts[hit.expert_id] = Part(hit.expert_id, part.digest, part.rows, part.header)
    predicted = predict_savings(model, list(parts.values()), sequences)
    best = sorted(predicted, key=lambda name: (-predicted[name], name))[:measure]
    return rank(hits, predicted, measure_savings(model, [parts[name] for name in best], sequences))


def _fits(model: Any, part: Part, digests: dict[str, str]) -> bool:
    """Return whether the expert was made for this base."""
    from connito.errors import Invalid
    from connito.experts.load import check_base
    from connito.moe.rows import base_digests

    assert part.header is not None
    try:
        check_base(part.header, base_digests(model, part.header.layers, digests))
    except Invalid:
        return False
    return True


def _export_whole(found: Expert, base: Path, out: Path) -> dict[str, Any]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.data.manifest import build_manifest
    from connito.experts.export import export_model
    from connito.experts.load import load_expert

    folder, record = found
    model, manifest = load_full(base), build_manifest(base)
    load_expert(model, folder)
    return export_model(
        model, out, load_tokenizer(base), verb="export", base={"name": manifest.name, "manifest": manifest.digest},
        keep={}, settings={}, measured={}, parents=[record], license=str(record.get("license", "")),
        domain=str(record["domain"]), losses=record.get("losses", []), created=str(record["created"]),
    )  # fmt: skip


def _copy(folder: Path, record: dict[str, Any], out: Path) -> dict[str, Any]:
    import shutil

    from connito.errors import Invalid
    from connito.library.artifact import EXPERT_FILE
    from connito.library.shelf import check_expert

    if out.exists() and any(out.iterdir()):
        raise Invalid(f"{out} is not empty: choose another folder")
    if (folder / EXPERT_FILE).is_file():
        check_expert(folder / EXPERT_FILE, record)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    return {"expert_id": record["expert_id"], "digest": record["expert"]["digest"], "folder": str(out)}


def _verify(
    target: str, base: Path | None, roster: Path | None, shelf: Path | None, data_dir: Path | None
) -> list[str]:
    from connito.library.artifact import EXPERT_FILE
    from connito.library.attestation import ATTESTATION_FILE, check_attestation
    from connito.library.shelf import check_expert
    from connito.wire.roster import Roster

    folder = Path(target) if Path(target).is_dir() else find_expert(target, shelf, data_dir)[0]
    if not (folder / EXPERT_FILE).is_file():
        from connito.experts.export import verify_export, verify_insertion

        record = verify_export(folder, base)
        done = [f"{len(record['files'])} files have their recorded digests"]
        if base is not None and record["verb"] == "export" and "derived" in record:
            names = [parent["expert_id"] for parent in record["derived"]["parents"]]
            verify_insertion(folder, base, [find_expert(name, shelf, data_dir)[0] for name in names])
            return [*done, f"every tensor is the base's own, or that of {', '.join(names)}"]
        return [*done, "every tensor is the base's own"] if base is not None and not record["parents"] else done
    _, record = read_folder(folder)
    check_expert(folder / EXPERT_FILE, record)
    done = ["the file is the one its record describes: digest, base, domain, rows"]
    if base is not None:
        done.append(_verify_on(folder, record, base, shelf, data_dir))
    if (folder / ATTESTATION_FILE).is_file():
        done += check_attestation(folder, None if roster is None else Roster.load(roster))
    elif not record.get("derived"):
        done.append("nobody's signature came with it: it was not exported from a platform's library")
    return done


def _verify_on(folder: Path, record: dict[str, Any], base: Path, shelf: Path | None, data_dir: Path | None) -> str:
    from connito.base.loading import load_full
    from connito.experts.assemble import verify_composition
    from connito.experts.load import load_expert

    model = load_full(base)
    parents = record.get("derived", {}).get("parents", [])
    if parents:
        verify_composition(model, folder, [find_expert(parent["expert_id"], shelf, data_dir) for parent in parents])
        return f"recomputed from its {len(parents)} parents, bit for bit"
    loaded = load_expert(model, folder)
    loaded.remove()
    return f"in the base it changes {len(loaded.changed)} rows and nothing else, and leaves no trace when removed"


def _hits(hits: list[Hit]) -> str:
    rows = [
        (hit.expert_id, hit.domain, "" if hit.saving is None else f"{hit.saving:+.4f}", hit.license, _standing(hit))
        for hit in hits
    ]
    return table(("expert", "domain", "saves", "licence", "standing"), rows, "nothing found; try fewer words, or --all")


def _standing(hit: Hit) -> str:
    return "" if hit.standing.status == "good" else f"{hit.standing.status}: {hit.standing.reason}"


def _ranking(rows: list[Ranked]) -> str:
    cells = [
        (row.expert_id, row.domain, f"{row.predicted:+.4f}", "" if row.measured is None else f"{row.measured:+.4f}")
        for row in rows
    ]
    return table(("expert", "domain", "predicted", "measured"), cells, "no expert of this base is on the shelf")
