"""`connito library` beyond list and show: search, deposit, compose, prune, extract, export, verify.

Experts are named by their id on the shelf, by their id in the library of the running platform, or by a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.output import DataDirOption, JsonFlag, emit, table

if TYPE_CHECKING:
    from connito.library.governance import Permission, Use, Viewer
    from connito.library.index import LibraryEvent
    from connito.library.search import Hit, Ranked
    from connito.library.shelf import Shelf
    from connito.moe.compose import Part

ShelfOption = Annotated[
    Path | None,
    typer.Option("--shelf", help="Folder of the local library [CONNITO_SHELF, or shelf/ in the data directory]."),
]
BaseOption = Annotated[Path, typer.Option("--base", help="Folder of the base model.")]
OutOption = Annotated[Path, typer.Option("--out", help="New folder for the result.")]
DataOption = Annotated[list[Path], typer.Option("--data", help="Text of the domain; may be repeated.")]
AsOption = Annotated[str, typer.Option("--as", help="Who asks, for experts that are not public.")]
OrganisationOption = Annotated[list[str] | None, typer.Option("--organisation", help="Whose experts you may see.")]
AcceptOption = Annotated[list[str] | None, typer.Option("--accept-license", help="Terms you have read and accept.")]
CommercialFlag = Annotated[bool, typer.Option("--commercial", help="The result will be used commercially.")]
YankedFlag = Annotated[bool, typer.Option("--allow-yanked", help="Use experts that were yanked.")]

# Sequences that a text is cut into for measuring.
LENGTH = 128


def register(app: typer.Typer) -> None:
    """Add these verbs to `connito library`."""
    for verb in (search, deposit, mark, verify, compose, remove, prune, extract, export):
        app.command(verb.__name__)(verb)


def search(
    words: Annotated[list[str] | None, typer.Argument(help="All of these, else any of them.")] = None,
    domain: Annotated[str, typer.Option(help="Only this domain.")] = "",
    like: Annotated[
        list[Path] | None, typer.Option(help="Texts: rank by the loss saved on them. Needs --base.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model, with --like.")] = None,
    measure: Annotated[int, typer.Option(help="How many of the best predicted to measure, with --like.")] = 5,
    limit: Annotated[int, typer.Option(help="At most this many.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Yanked and opted-out experts too.")] = False,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Search the library by words, by domain, or by example."""
    from connito.errors import Invalid
    from connito.library.search import search as find

    if like and base is None:
        raise Invalid("--like measures on a model: add --base DIR")
    with open_shelf(shelf, data_dir).index() as index:
        if shelf is None:
            index.apply(_platform_events(data_dir, index.last_sequence()))
        count = max(limit, 200) if like else limit
        viewer = _viewer(who, organisation)
        hits = find(index, " ".join(words or []), domain=domain, viewer=viewer, everything=everything, limit=count)
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
        remember(open_shelf(shelf, data_dir).root, words or [], domain, hits, _now(), best)


def deposit(
    expert: Annotated[Path, typer.Argument(help="Folder of an export: the expert file and its record.")],
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Put an expert on the shelf."""
    from connito.library.artifact import EXPERT_FILE

    folder, record = _folder(expert)
    name = open_shelf(shelf, data_dir).deposit(folder / EXPERT_FILE, record, _now())
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
    open_shelf(shelf, data_dir).state(status, subject, reason, _now())
    emit(as_json, {"subject": subject, "status": status, "reason": reason}, lambda: f"{subject} is {status}: {reason}")


def verify(
    target: Annotated[str, typer.Argument(help="Expert id, folder of an expert, or folder of an exported model.")],
    base: Annotated[Path | None, typer.Option(help="Compare with, or recompute on, this base.")] = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check an expert or an exported model offline; with --base, recompute a composition from its parents."""
    checked = _verify(target, base, shelf, data_dir)
    emit(as_json, {"target": target, "verified": checked}, lambda: "\n".join(f"ok  {what}" for what in checked))


def compose(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders.")],
    base: BaseOption,
    out: OutOption,
    method: Annotated[str, typer.Option(help="linear, sum or ties.")] = "linear",
    weight: Annotated[list[float] | None, typer.Option(help="One per expert, in their order.")] = None,
    learn: Annotated[list[Path] | None, typer.Option(help="Learn the weights on these texts (LoRAHub).")] = None,
    density: Annotated[float, typer.Option(help="Share of each expert's changes that ties keeps.")] = 1.0,
    who: AsOption = "",
    organisation: OrganisationOption = None,
    accept_license: AcceptOption = None,
    commercial: CommercialFlag = False,
    allow_yanked: YankedFlag = False,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Merge several experts of one base into one, with its lineage; conflicts are reported."""
    from connito.errors import Invalid
    from connito.library.governance import Use
    from connito.moe.compose import Recipe

    found = [_expert(name, shelf, data_dir) for name in experts]
    names = [str(record["expert_id"]) for _, record in found]
    if weight and len(weight) != len(names):
        raise Invalid(f"{len(weight)} weights for {len(names)} experts: give one each")
    use = Use("compose", commercial, accepted=frozenset(accept_license or []))
    permission = _permit(found, use, _viewer(who, organisation), shelf, data_dir, allow_yanked)
    recipe = Recipe("sum" if learn else method, density)
    weights = (
        _learned(base, found, recipe, learn) if learn else dict(zip(names, weight or [1.0] * len(names), strict=True))
    )
    record = _compose(base, found, out, recipe, weights, permission)
    emit(as_json, record, lambda: _composed(record, permission, out))


def remove(
    composition: Annotated[str, typer.Argument(help="A composed expert.")],
    expert: Annotated[str, typer.Argument(help="The expert to take out of it.")],
    base: BaseOption,
    out: OutOption,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compose again without one of the parents: exactly what it would be had it never been in."""
    from connito.errors import Invalid, NotFound
    from connito.library.governance import Use
    from connito.moe.compose import Recipe

    _, record = _expert(composition, shelf, data_dir)
    derived = record.get("derived", {})
    weights = {parent["expert_id"]: parent["weight"] for parent in derived.get("parents", [])}
    if expert not in weights:
        raise NotFound(
            f"{expert} is not in {composition}; it is made of {', '.join(sorted(weights)) or 'nothing else'}"
        )
    del weights[expert]
    if not weights:
        raise Invalid(f"{expert} is all there is in {composition}: without it, that is the base")
    found = [_expert(name, shelf, data_dir) for name in weights]
    use = Use("compose", accepted=frozenset(accept_license or []))
    permission = _permit(found, use, _viewer("", None), shelf, data_dir, allow_yanked=False)
    settings = derived["settings"]
    recipe = Recipe(settings["method"], settings["density"], settings["scale"])
    made = _compose(base, found, out, recipe, weights, permission)
    emit(as_json, made, lambda: _composed(made, permission, out))


def prune(
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    method: Annotated[
        str, typer.Option(help="naee, router-weighted, moe-i2, or task (halving, to one expert).")
    ] = "naee",
    max_experts: Annotated[int, typer.Option(help="Experts that may stay, over all layers.")] = 0,
    max_bytes: Annotated[int, typer.Option(help="Bytes of expert tensors that may stay.")] = 0,
    dense: Annotated[
        bool, typer.Option(help="With task: write the last expert of each layer as a dense model.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Leave experts out of a base model under a budget; writes a checkpoint that transformers loads."""
    from connito.errors import Invalid

    if not (max_experts or max_bytes or method == "task"):
        raise Invalid("how small? give --max-experts or --max-bytes")
    record = _prune(base, data, out, method, max_experts, max_bytes, dense)
    emit(as_json, record, lambda: _model_text(record, out))


def extract(
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    margin: Annotated[float, typer.Option(help="Nats per token that the domain's loss may rise by.")] = 0.02,
    per_layer: Annotated[
        int, typer.Option(help="Exactly this many experts a layer; 0: the fewest within the margin.")
    ] = 0,
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Write it even if it loses more.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Extract the smallest set of experts that speaks a domain, with its measured loss beside the full model's."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.moe import extraction

    model, tokenizer = load_full(base), load_tokenizer(base)
    probe, held_out = _halves(_sequences(tokenizer, data))
    found = extraction.extract(model, probe, held_out, margin=margin, per_layer=per_layer, accept_loss=accept_loss)
    settings = {"margin": margin, "per_layer": per_layer, "tried": found.tried, "data": _digests(data)}
    measured = {"full": found.full_loss, "pruned": found.loss}
    record = _export_pruned("extract", model, tokenizer, base, out, found.keep, settings, measured)
    emit(as_json, record, lambda: _model_text(record, out))


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

    found = _expert(expert, shelf, data_dir)
    use = Use("export", commercial, redistribute, frozenset(accept_license or []))
    permission = _permit([found], use, _viewer(who, organisation), shelf, data_dir, allow_yanked)
    document = _export_whole(found, base, out) if base is not None else _copy(found, out)
    _meter(found[1], "export", who, shelf, data_dir)
    document = {**document, "license": permission.license, "attribution": permission.attribution}
    emit(as_json, document, lambda: "\n".join([f"written to {out}", *_obligations(permission)]))


def open_shelf(shelf: Path | None, data_dir: Path | None) -> Shelf:
    """The local library: `--shelf`, else `CONNITO_SHELF`, else the one in the data directory."""
    from connito.library.shelf import Shelf
    from connito.local.datadir import default_data_dir

    given = os.environ.get("CONNITO_SHELF")
    return Shelf(shelf or (Path(given) if given and data_dir is None else (data_dir or default_data_dir()) / "shelf"))


def _viewer(who: str, organisations: list[str] | None) -> Viewer:
    from connito.library.governance import Viewer

    return Viewer(who, frozenset(organisations or []))


def _now() -> int:
    return int(time.time() * 1000)


def _folder(path: Path) -> tuple[Path, dict[str, Any]]:
    from connito.errors import Invalid, NotFound
    from connito.library.artifact import EXPERT_FILE, RECORD_FILE

    if not (path / EXPERT_FILE).is_file() or not (path / RECORD_FILE).is_file():
        raise NotFound(
            f"{path} holds no expert: it needs {EXPERT_FILE} and {RECORD_FILE}, as `library export` writes them"
        )
    try:
        record: dict[str, Any] = json.loads((path / RECORD_FILE).read_bytes())
    except ValueError as error:
        raise Invalid(f"{path / RECORD_FILE} is not a record: {error}") from error
    return path, record


def _expert(name: str, shelf: Path | None, data_dir: Path | None) -> tuple[Path, dict[str, Any]]:
    """An expert by folder, or by id: from the shelf, else fetched from the platform onto it."""
    from connito.errors import NotFound

    if Path(name).is_dir():
        return _folder(Path(name))
    local = open_shelf(shelf, data_dir)
    try:
        return local.get(name)
    except NotFound as error:
        try:
            _fetch(name, local, data_dir)
        except NotFound:
            raise error from None
        return local.get(name)


def _fetch(name: str, local: Shelf, data_dir: Path | None) -> None:
    """Mirror one expert of the platform's library. `NotFound` when none runs here or it has no such expert."""
    import asyncio

    from connito.client import Client
    from connito.local.session import Session

    session = Session.open(data_dir, role="customer")
    with Client.local(data_dir) as client:
        summary, record = client.expert(name)
    local.deposit(asyncio.run(session.store().fetch(summary.expert)), record, summary.deposited_at_unix_ms)


def _platform_events(data_dir: Path | None, after: int) -> list[LibraryEvent]:
    """Deposits of the platform that runs here beyond the first `after`, in their order; none when there is no platform."""
    from connito.client import Client
    from connito.errors import NotFound
    from connito.library.index import LibraryEvent

    try:
        connection = Client.local(data_dir)
    except NotFound:
        return []
    with connection as client:
        fresh = list(enumerate(client.experts(), start=1))[after:]
        return [
            LibraryEvent(place, row.deposited_at_unix_ms, "deposited", row.expert_id, client.expert(row.expert_id)[1])
            for place, row in fresh
        ]


def _permit(
    found: list[tuple[Path, dict[str, Any]]],
    use: Use,
    viewer: Viewer,
    shelf: Path | None,
    data_dir: Path | None,
    allow_yanked: bool,
) -> Permission:
    from connito.library.governance import check_use

    with open_shelf(shelf, data_dir).index() as index:
        standings = {str(record["expert_id"]): index.standing(str(record["expert_id"])) for _, record in found}
    records = [record for _, record in found]
    return check_use(records, use, standings=standings, viewer=viewer, allow_yanked=allow_yanked)


def _meter(record: dict[str, Any], verb: str, who: str, shelf: Path | None, data_dir: Path | None) -> None:
    open_shelf(shelf, data_dir).meter(str(record["expert_id"]), verb, who, _now())


def _compose(
    base: Path,
    found: list[tuple[Path, dict[str, Any]]],
    out: Path,
    recipe: Any,
    weights: dict[str, float],
    permission: Permission,
) -> dict[str, Any]:
    import datetime

    from connito.base.loading import load_full
    from connito.moe.assemble import compose_experts

    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return compose_experts(
        load_full(base), found, out, recipe=recipe, weights=weights, permission=permission, created=created
    )


def _learned(base: Path, found: list[tuple[Path, dict[str, Any]]], recipe: Any, texts: list[Path]) -> dict[str, float]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.moe.compose import Part, base_rows, layers_of, merge, read_part, state_of
    from connito.moe.evaluate import Evaluator
    from connito.moe.lorahub import learn_weights

    model, sequences = load_full(base), _sequences(load_tokenizer(base), texts)
    read = [(str(record["expert_id"]), read_part(folder)) for folder, record in found]
    parts = [Part(name, part.digest, part.rows, part.header) for name, part in read]
    origin = base_rows(model, parts)
    evaluator = Evaluator(model, layers_of(origin))

    def loss(weights: dict[str, float]) -> float:
        sums, tokens = evaluator.losses(state_of(merge(parts, origin, recipe, weights)), sequences)
        return float(sums.sum() / tokens.sum())

    return learn_weights([part.name for part in parts], loss).weights


def _by_example(
    hits: list[Hit], base: Path, texts: list[Path], measure: int, shelf: Path | None, data_dir: Path | None
) -> list[Ranked]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.library.search import rank
    from connito.moe.compose import Part, read_part
    from connito.moe.insert import fingerprint
    from connito.moe.predict import measure_savings, predict_savings

    model, sequences = load_full(base), _sequences(load_tokenizer(base), texts)
    digests, parts = fingerprint(model), dict[str, Part]()
    for hit in hits:
        part = read_part(_expert(hit.expert_id, shelf, data_dir)[0])
        if _fits(model, part, digests):
            parts[hit.expert_id] = Part(hit.expert_id, part.digest, part.rows, part.header)
    predicted = predict_savings(model, list(parts.values()), sequences)
    best = sorted(predicted, key=lambda name: (-predicted[name], name))[:measure]
    return rank(hits, predicted, measure_savings(model, [parts[name] for name in best], sequences))


def _fits(model: Any, part: Part, digests: dict[str, str]) -> bool:
    """Whether the expert was made for this base."""
    from connito.errors import Invalid
    from connito.expert import base_digests, check_base

    assert part.header is not None
    try:
        check_base(part.header, base_digests(model, part.header.layers, digests))
    except Invalid:
        return False
    return True


def _sequences(tokenizer: Any, texts: list[Path]) -> Any:
    """int32 [n, LENGTH + 1] from the texts in a row, or shorter where there is little text."""
    import numpy as np

    from connito.errors import Invalid, NotFound

    ids: list[int] = []
    for path in texts:
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
        ids += [*tokenizer(path.read_text(errors="replace"), verbose=False).input_ids, tokenizer.eos_token_id]
    length = min(LENGTH + 1, len(ids) // 2)
    if length < 8:
        raise Invalid(f"{', '.join(map(str, texts))} hold {len(ids)} tokens, too few to measure on: give more text")
    return np.asarray(ids[: len(ids) // length * length], dtype=np.int32).reshape(-1, length)


def _halves(sequences: Any) -> tuple[Any, Any]:
    """Every other sequence decides, the rest measures."""
    return sequences[::2], sequences[1::2]


def _digests(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _prune(
    base: Path, data: list[Path], out: Path, method: str, max_experts: int, max_bytes: int, dense: bool
) -> dict[str, Any]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.moe import prune as pruning
    from connito.moe.extraction import equalise, ranking
    from connito.moe.statistics import collect

    model, tokenizer = load_full(base), load_tokenizer(base)
    text, held_out = _halves(_sequences(tokenizer, data))
    settings: dict[str, Any] = {
        "method": method,
        "max_experts": max_experts,
        "max_bytes": max_bytes,
        "data": _digests(data),
    }
    if method == "task":
        keep, settings["history"] = pruning.progressive(load_full(base), text)
    else:
        chosen = pruning.choose(model, text, method, max_experts=max_experts, max_bytes=max_bytes)
        keep, padding = equalise(chosen, ranking(collect(model, text[:, :-1])))
        settings["padding"] = {str(index): experts for index, experts in padding.items() if experts}
    measured = {"full": pruning.loss(model, held_out)}
    with pruning.masked(model, keep):
        measured["pruned"] = pruning.loss(model, held_out)
    return _export_pruned("prune", model, tokenizer, base, out, keep, settings, measured, dense=dense)


def _export_pruned(
    verb: str, model: Any, tokenizer: Any, base: Path, out: Path, keep: dict[int, list[int]], settings: dict[str, Any],
    measured: dict[str, float], *, dense: bool = False,
) -> dict[str, Any]:  # fmt: skip
    from connito.base.manifest import build_manifest
    from connito.moe.export import export_model, to_dense
    from connito.moe.prune import prune as shrink

    manifest = build_manifest(base)
    model = shrink(model, keep)
    if dense:
        model, settings, keep = to_dense(model), {**settings, "dense": True, "experts": keep}, {}
    identity = {"name": manifest.name, "manifest": manifest.digest}
    return export_model(
        model, out, tokenizer, verb=verb, base=identity, keep=keep, settings=settings, measured=measured
    )


def _export_whole(found: tuple[Path, dict[str, Any]], base: Path, out: Path) -> dict[str, Any]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.manifest import build_manifest
    from connito.expert import load_expert
    from connito.moe.export import export_model

    folder, record = found
    model, manifest = load_full(base), build_manifest(base)
    load_expert(model, folder)
    parent = {"expert_id": record["expert_id"], "digest": record["expert"]["digest"]}
    return export_model(
        model, out, load_tokenizer(base), verb="export", base={"name": manifest.name, "manifest": manifest.digest},
        keep={}, settings={}, measured={}, parents=[parent], license=str(record.get("license", "")),
    )  # fmt: skip


def _copy(found: tuple[Path, dict[str, Any]], out: Path) -> dict[str, Any]:
    import shutil

    from connito.errors import Invalid
    from connito.library.artifact import CARD_FILE, EXPERT_FILE, RECORD_FILE
    from connito.library.shelf import check_expert

    folder, record = found
    if out.exists() and any(out.iterdir()):
        raise Invalid(f"{out} is not empty: choose another folder")
    check_expert(folder / EXPERT_FILE, record)
    out.mkdir(parents=True, exist_ok=True)
    for name in (EXPERT_FILE, RECORD_FILE, CARD_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return {"expert_id": record["expert_id"], "digest": record["expert"]["digest"], "folder": str(out)}


def _verify(target: str, base: Path | None, shelf: Path | None, data_dir: Path | None) -> list[str]:
    from connito.library.artifact import EXPERT_FILE
    from connito.library.shelf import check_expert

    if Path(target).is_dir() and not (Path(target) / EXPERT_FILE).is_file():
        from connito.moe.export import verify_export

        record = verify_export(Path(target), base)
        done = [f"{len(record['files'])} files have their recorded digests"]
        return [*done, "every tensor is the base's own"] if base is not None and not record["parents"] else done
    folder, record = _expert(target, shelf, data_dir)
    check_expert(folder / EXPERT_FILE, record)
    done = ["the file is the one its record describes: digest, base, domain, rows"]
    if base is not None:
        done.append(_verify_on(folder, record, base, shelf, data_dir))
    return done


def _verify_on(folder: Path, record: dict[str, Any], base: Path, shelf: Path | None, data_dir: Path | None) -> str:
    from connito.base.loading import load_full
    from connito.expert import load_expert
    from connito.moe.assemble import verify_composition

    model = load_full(base)
    parents = record.get("derived", {}).get("parents", [])
    if parents:
        verify_composition(model, folder, [_expert(parent["expert_id"], shelf, data_dir) for parent in parents])
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


def _composed(record: dict[str, Any], permission: Permission, out: Path) -> str:
    derived = record["derived"]
    lines = [f"{record['expert_id']}: {record['selection']['selected']} experts, written to {out}"]
    lines += [f"  {parent['expert_id']} with weight {parent['weight']:g}" for parent in derived["parents"]]
    for conflict in derived["settings"]["conflicts"]:
        lines.append(
            f"  layer {conflict['layer']} expert {conflict['expert']}: {' and '.join(conflict['names'])} both change it, "
            f"cosine {conflict['cosine']:+.3f}, signs agree on {100 * conflict['sign_agreement']:.0f} %"
        )
    return "\n".join([*lines, *_obligations(permission)])


def _obligations(permission: Permission) -> list[str]:
    lines = [f"  licence: {permission.license or 'not stated'}"]
    lines += [f"  credit: {name}" for name in permission.attribution]
    return lines + [f"  warning: {warning}" for warning in permission.warnings]


def _model_text(record: dict[str, Any], out: Path) -> str:
    full, small = record["measured"]["full"], record["measured"]["pruned"]
    kept = sum(map(len, record["experts"].values()))
    what = f"{kept} experts" if kept else "a dense model"
    return f"{what}, written to {out}\n  loss {small:.4f}, full model {full:.4f} ({small - full:+.4f} nats per token)"
