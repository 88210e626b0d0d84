"""`connito library`: experts put together: merged, taken out, replaced, grouped, and routed among."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connito.cli.library.experts import (
    AcceptOption,
    AsOption,
    BaseOption,
    CommercialFlag,
    DataOption,
    Expert,
    MeasureOption,
    OrganisationOption,
    OutOption,
    ShelfOption,
    YankedFlag,
    cut_sequences,
    find_expert,
    meter,
    named_texts,
    now_iso,
    obligations,
    permit,
    viewer_of,
)
from connito.cli.output import DataDirOption, JsonFlag, emit, table
from connito.render import formats

if TYPE_CHECKING:
    from connito.experts.compose import Part
    from connito.library.governance import Permission


def compose(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders.")],
    base: BaseOption,
    out: OutOption,
    method: Annotated[str, typer.Option(help="linear, sum or ties.")] = "linear",
    weight: Annotated[list[float] | None, typer.Option(help="One per expert, in their order.")] = None,
    learn: Annotated[list[Path] | None, typer.Option(help="Learn the weights on these texts (LoRAHub).")] = None,
    density: Annotated[float, typer.Option(help="Share of each expert's changes that ties keeps.")] = 1.0,
    measure: MeasureOption = None,
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
    from connito.experts.compose import Recipe
    from connito.library.governance import Use

    found = [find_expert(name, shelf, data_dir) for name in experts]
    names = [str(record["expert_id"]) for _, record in found]
    if weight and len(weight) != len(names):
        raise Invalid(f"{len(weight)} weights for {len(names)} experts: give one each")
    use = Use("compose", commercial, accepted=frozenset(accept_license or []))
    permission = permit(found, use, viewer_of(who, organisation), shelf, data_dir, allow_yanked)
    recipe = Recipe("sum" if learn else method, density)
    weights = (
        _learned(base, found, recipe, learn) if learn else dict(zip(names, weight or [1.0] * len(names), strict=True))
    )
    record = _compose(base, found, out, recipe, weights, permission, measure=measure)
    meter([record for _, record in found], "compose", who, shelf, data_dir)
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

    _, record = find_expert(composition, shelf, data_dir)
    derived = record.get("derived", {})
    weights = {parent["expert_id"]: parent["weight"] for parent in derived.get("parents", [])}
    if expert not in weights:
        raise NotFound(
            f"{expert} is not in {composition}; it is made of {', '.join(sorted(weights)) or 'nothing else'}"
        )
    del weights[expert]
    if not weights:
        raise Invalid(f"{expert} is all there is in {composition}: without it, that is the base")
    found = [find_expert(name, shelf, data_dir) for name in weights]
    use = Use("compose", accepted=frozenset(accept_license or []))
    permission = permit(found, use, viewer_of("", None), shelf, data_dir, allow_yanked=False)
    made = _compose(base, found, out, recipe_of(record), weights, permission)
    emit(as_json, made, lambda: _composed(made, permission, out))


def upgrade(
    composition: Annotated[str, typer.Argument(help="A composed expert.")],
    old: Annotated[str, typer.Argument(help="The expert in it that is replaced.")],
    new: Annotated[str, typer.Argument(help="The expert that takes its place.")],
    base: BaseOption,
    data: DataOption,
    out: OutOption,
    others: Annotated[
        list[str] | None, typer.Option("--other", help="NAME=FILE: this domain may not lose; may be repeated.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Nats per token that any other domain may lose.")] = 0.01,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Replace one expert of a composition (BAR); the others keep their digests, and no other domain may lose."""
    from connito.errors import Invalid, NotFound
    from connito.library.governance import Use

    folder, record = find_expert(composition, shelf, data_dir)
    weights = {parent["expert_id"]: parent["weight"] for parent in record.get("derived", {}).get("parents", [])}
    if old not in weights:
        raise NotFound(f"{old} is not in {composition}; it is made of {', '.join(sorted(weights)) or 'nothing else'}")
    better = find_expert(new, shelf, data_dir)
    name = str(better[1]["expert_id"])
    if name in weights:
        raise Invalid(f"{name} is in {composition} already")
    found = [find_expert(parent, shelf, data_dir) for parent in weights if parent != old] + [better]
    use = Use("compose", accepted=frozenset(accept_license or []))
    permission = permit(found, use, viewer_of("", None), shelf, data_dir, allow_yanked=False)
    shares = {**{parent: weight for parent, weight in weights.items() if parent != old}, name: weights[old]}
    recipe = recipe_of(record)
    domain = str(better[1]["domain"])
    texts = {domain: data, **{other: [path] for other, path in named_texts(others).items()}}
    measured = _upgraded(base, folder, found, recipe, shares, domain, texts, margin)
    made = _compose(base, found, out, recipe, shares, permission, verb="upgrade",
                    extra={"replaced": old, "by": name, "margin": margin, **measured})  # fmt: skip
    meter([better[1]], "upgrade", "", shelf, data_dir)
    emit(as_json, made, lambda: _composed(made, permission, out))


def cluster(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders.")],
    base: BaseOption,
    count: Annotated[int, typer.Option(help="How many clusters.")],
    out: Annotated[Path | None, typer.Option("--out", help="New folder: one merged expert a cluster.")] = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Group experts whose changes point the same way (MBC), and merge each group with equal weights."""
    from connito.base.loading import load_full
    from connito.experts.arrow import cluster as grouped
    from connito.experts.arrow import similarity
    from connito.experts.compose import Recipe, base_rows
    from connito.library.governance import Use

    found = [find_expert(name, shelf, data_dir) for name in experts]
    use = Use("compose", accepted=frozenset(accept_license or []))
    permit(found, use, viewer_of("", None), shelf, data_dir, allow_yanked=False)
    parts = parts_of(found)
    origin = base_rows(load_full(base), parts)
    groups = grouped(parts, origin, count)
    names = [part.name for part in parts]
    document: dict[str, Any] = {
        "clusters": [[names[i] for i in group] for group in groups],
        "similarity": [[round(float(x), 6) for x in row] for row in similarity(parts, origin)],
        "experts": names,
        "written": [],
    }
    for number, group in enumerate(groups if out is not None else []):
        assert out is not None
        members = [found[i] for i in group]
        permission = permit(members, use, viewer_of("", None), shelf, data_dir, allow_yanked=False)
        weights = {names[i]: 1.0 for i in group}
        made = _compose(base, members, out / str(number), Recipe("linear"), weights, permission)
        document["written"].append({"folder": str(out / str(number)), "expert_id": made["expert_id"]})
    emit(as_json, document, lambda: "\n".join(f"{n}: {', '.join(c)}" for n, c in enumerate(document["clusters"])))


def route(
    experts: Annotated[list[str], typer.Argument(help="Expert ids or folders: variants that tokens choose among.")],
    base: BaseOption,
    measure: Annotated[list[str], typer.Option("--measure", help="NAME=FILE: text to measure on; may be repeated.")],
    method: Annotated[
        str, typer.Option(help="arrow (prototypes), molora (a trained router), uniform, or one-hot:N.")
    ] = "arrow",
    top_k: Annotated[int, typer.Option(help="With arrow: variants a token may mix; 0 for all.")] = 1,
    train: Annotated[list[Path] | None, typer.Option(help="With molora: text that the router is trained on.")] = None,
    steps: Annotated[int, typer.Option(help="With molora: steps of training.")] = 40,
    out: Annotated[Path | None, typer.Option("--out", help="New file for the routing, safetensors.")] = None,
    accept_license: AcceptOption = None,
    shelf: ShelfOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep several variants of experts side by side and choose token by token; the loss beside every single one's."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.errors import Invalid
    from connito.experts.compose import base_rows
    from connito.experts.prune import loss
    from connito.experts.routing import Routing, variants_of
    from connito.library.governance import Use

    if method == "molora" and not train:
        raise Invalid("molora trains a router: give it text with --train FILE")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    found = [find_expert(name, shelf, data_dir) for name in experts]
    use = Use("compose", accepted=frozenset(accept_license or []))
    permit(found, use, viewer_of("", None), shelf, data_dir, allow_yanked=False)
    parts, model, tokenizer = parts_of(found), load_full(base), load_tokenizer(base)
    origin = base_rows(model, parts)
    text = cut_sequences(tokenizer, train) if train else None
    routing = Routing.make(method, model, parts, origin, top_k=top_k, text=text, steps=steps)
    texts = {name: cut_sequences(tokenizer, [path]) for name, path in named_texts(measure).items()}
    losses: dict[str, dict[str, float]] = {"base": {name: loss(model, table) for name, table in texts.items()}}
    for place, part in enumerate(parts):
        with variants_of(model, parts, origin, Routing.one_hot(parts, place)):
            losses[part.name] = {name: loss(model, table) for name, table in texts.items()}
    with variants_of(model, parts, origin, routing):
        losses["routed"] = {name: loss(model, table) for name, table in texts.items()}
    if out is not None:
        routing.save(out)
    meter([record for _, record in found], "route", "", shelf, data_dir)
    document = {"method": method, "losses": losses, "written": str(out or "")}
    emit(as_json, document, lambda: _losses_text(losses))


def recipe_of(record: dict[str, Any]) -> Any:
    """Return how a composed expert was merged."""
    from connito.experts.compose import Recipe

    settings = record["derived"]["settings"]
    return Recipe(settings["method"], settings["density"], settings["scale"])


def parts_of(found: list[Expert]) -> list[Part]:
    """Return the experts' rows, named by expert id."""
    from connito.experts.compose import Part, read_part

    read = [(str(record["expert_id"]), read_part(folder)) for folder, record in found]
    return [Part(name, part.digest, part.rows, part.header) for name, part in read]


def _upgraded(
    base: Path, folder: Path, found: list[Expert], recipe: Any, weights: dict[str, float], domain: str,
    texts: dict[str, list[Path]], margin: float,
) -> dict[str, Any]:  # fmt: skip
    """Return losses by domain before and after. Raises `Invalid` (GATE_REJECTED) for what is no upgrade."""
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts.compose import Part, base_rows, merge, read_part
    from connito.experts.load import load_expert
    from connito.experts.replacement import replace_expert

    model, tokenizer = load_full(base), load_tokenizer(base)
    parts, before = parts_of(found), read_part(folder)
    origin = base_rows(model, [*parts, before])
    rows = {**{key: origin[key] for key in before.rows}, **merge(parts, origin, recipe, weights)}
    load_expert(model, folder)
    sequences = {name: cut_sequences(tokenizer, paths) for name, paths in texts.items()}
    made = replace_expert(model, Part("upgraded", "", rows), domain, sequences, margin=margin)
    return {"before": made.before, "after": made.after}


def _losses_text(losses: dict[str, dict[str, float]]) -> str:
    domains = list(next(iter(losses.values())))
    return table(("variant", *domains), [(name, *(row[d] for d in domains)) for name, row in losses.items()])


def _compose(
    base: Path,
    found: list[tuple[Path, dict[str, Any]]],
    out: Path,
    recipe: Any,
    weights: dict[str, float],
    permission: Permission,
    *,
    verb: str = "compose",
    measure: list[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts.assemble import compose_experts

    tokenizer = load_tokenizer(base) if measure else None
    texts = {name: cut_sequences(tokenizer, [path]) for name, path in named_texts(measure).items()}
    return compose_experts(
        load_full(base), found, out, recipe=recipe, weights=weights, permission=permission, created=now_iso(),
        texts=texts, verb=verb, extra=extra or {},
    )  # fmt: skip


def _learned(base: Path, found: list[tuple[Path, dict[str, Any]]], recipe: Any, texts: list[Path]) -> dict[str, float]:
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts.compose import Part, base_rows, layers_of, merge, read_part, state_of
    from connito.experts.lorahub import learn_weights
    from connito.moe.evaluate import Evaluator

    model, sequences = load_full(base), cut_sequences(load_tokenizer(base), texts)
    read = [(str(record["expert_id"]), read_part(folder)) for folder, record in found]
    parts = [Part(name, part.digest, part.rows, part.header) for name, part in read]
    origin = base_rows(model, parts)
    evaluator = Evaluator(model, layers_of(origin))

    def loss(weights: dict[str, float]) -> float:
        sums, tokens = evaluator.losses(state_of(merge(parts, origin, recipe, weights)), sequences)
        return float(sums.sum() / tokens.sum())

    return learn_weights([part.name for part in parts], loss).weights


def _composed(record: dict[str, Any], permission: Permission, out: Path) -> str:
    derived = record["derived"]
    lines = [f"{record['expert_id']}: {record['selection']['selected']} experts, written to {out}"]
    lines += [f"  {parent['expert_id']} with weight {parent['weight']:g}" for parent in derived["parents"]]
    for conflict in derived["settings"]["conflicts"]:
        lines.append(
            f"  layer {conflict['layer']} expert {conflict['expert']}: {' and '.join(conflict['names'])} both change it, "
            f"cosine {conflict['cosine']:+.3f}, signs agree on {formats.percent(conflict['sign_agreement'], 0)}"
        )
    return "\n".join([*lines, *obligations(permission)])
