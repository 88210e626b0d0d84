"""`connito.library`: compose, remove, upgrade, cluster and route, for experts of one base. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from connito.base.loading import load_full, load_tokenizer
from connito.curation.holdings import Agreement, Expert, Holdings
from connito.curation.texts import cut_by_domain, cut_sequences, digests, now_iso
from connito.errors import Invalid, NotFound
from connito.experts import mbc
from connito.experts.assemble import Mixture, compose_experts
from connito.experts.compose import Part, Recipe, Rows, base_rows, layers_of, merge, read_part, state_of
from connito.experts.load import load_expert
from connito.experts.lorahub import learn_weights
from connito.experts.measure import loss
from connito.experts.replacement import replace_expert
from connito.experts.routing import Routing, variants_of
from connito.library.artifact import require_new
from connito.library.governance import Permission
from connito.library.schema import ExpertRecord
from connito.moe.device import device_of
from connito.moe.evaluate import Evaluator
from connito.render import formats
from connito.runtime.progress import tell


@dataclass(frozen=True)
class Composed:
    """A new expert on disk: its record, and what its parents' licences oblige to."""

    record: ExpertRecord
    permission: Permission


@dataclass(frozen=True)
class ComposeOptions:
    """Options of a merge of experts. `weights`: one per expert, in their order; `learn`: texts to learn them on (LoRAHub);
    `density`: share of each expert's changes that ties keeps; `measure`: text by domain to measure on."""

    method: str = "linear"
    weights: Sequence[float] = ()
    learn: Sequence[Path] = ()
    density: float = 1.0
    measure: Mapping[str, Path] = field(default_factory=dict)
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class UpgradeOptions:
    """Texts that decide an upgrade. `data`: text of the new expert's domain, which has to gain; `others`: text by domain that
    may lose at most `margin` nats per token."""

    data: Sequence[Path]
    others: Mapping[str, Path] = field(default_factory=dict)
    margin: float = 0.01
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class RouteOptions:
    """The routing of tokens: arrow (mixing `top_k`, 0 for all), molora (a router trained on `train` for `steps`), uniform or
    one-hot:N; `measure`: text by domain."""

    measure: Mapping[str, Path]
    method: str = "arrow"
    top_k: int = 1
    train: Sequence[Path] = ()
    steps: int = 40
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class Clusters:
    """Names of experts by cluster, their cosine similarities, and what was merged of each cluster."""

    experts: list[str]
    clusters: list[list[str]]
    similarity: list[list[float]]
    written: list[tuple[Path, str]]


def compose(
    experts: Sequence[str | Path],
    base: Path,
    out: Path,
    options: ComposeOptions | None = None,
    library: Holdings | None = None,
) -> Composed:
    """Merge several experts of one base into the new folder `out`, with their lineage; conflicts are in the record."""
    options, library = options or ComposeOptions(), library or Holdings()
    found = [library.find(str(name)) for name in experts]
    if options.weights and len(options.weights) != len(found):
        raise Invalid(
            f"{formats.count(len(options.weights), 'weight')} for {formats.count(len(found), 'expert')}: give one each"
        )
    permission = library.permit(found, "compose", options.agreement)
    recipe = Recipe("sum" if options.learn else options.method, options.density)
    if options.learn:
        weights = learned_weights(base, parts_of(found), recipe, options.learn)
    else:
        weights = dict(zip(_ids(found), options.weights or [1.0] * len(found), strict=True))
    record = _write(base, found, out, Mixture(recipe, weights), permission, options.measure)
    library.meter([record for _, record in found], "compose")
    return Composed(record, permission)


def remove(
    composition: str | Path,
    expert: str,
    base: Path,
    out: Path,
    agreement: Agreement | None = None,
    library: Holdings | None = None,
) -> Composed:
    """Compose again without one of the parents, exactly as if it had never been added."""
    library = library or Holdings()
    _, record = library.find(str(composition))
    weights = _weights_in(record, expert, composition)
    del weights[expert]
    if not weights:
        raise Invalid(f"{expert} is all there is in {composition}: without it, that is the base")
    found = [library.find(name) for name in weights]
    permission = library.permit(found, "compose", agreement or Agreement())
    return Composed(_write(base, found, out, Mixture(_recipe(record), weights), permission), permission)


def upgrade(
    composition: str | Path,
    old: str,
    new: str | Path,
    base: Path,
    out: Path,
    options: UpgradeOptions,
    library: Holdings | None = None,
) -> Composed:
    """Replace one expert of a composition (BAR); the others keep their digests, and no other domain may lose."""
    library = library or Holdings()
    folder, record = library.find(str(composition))
    weights = _weights_in(record, old, composition)
    better = library.find(str(new))
    name = str(better[1]["expert_id"])
    if name in weights:
        raise Invalid(f"{name} is in {composition} already")
    found = [library.find(parent) for parent in weights if parent != old] + [better]
    permission = library.permit(found, "compose", options.agreement)
    shares = {**{parent: weight for parent, weight in weights.items() if parent != old}, name: weights[old]}
    recipe, domain = _recipe(record), str(better[1]["domain"])
    model, tokenizer = load_full(base, device=device_of()), load_tokenizer(base)
    parts, before = parts_of(found), read_part(folder)
    origin = base_rows(model, [*parts, before])
    rows = {**{key: origin[key] for key in before.rows}, **merge(parts, origin, recipe, shares)}
    load_expert(model, folder)
    texts = {domain: cut_sequences(tokenizer, options.data), **cut_by_domain(tokenizer, options.others)}
    tell("measuring each domain without and with the upgrade")
    made = replace_expert(model, Part("upgraded", "", rows), domain, texts, margin=options.margin)
    told = {"replaced": old, "by": name, "margin": options.margin, "before": made.before, "after": made.after}
    result = _write(base, found, out, Mixture(recipe, shares, "upgrade", told), permission)
    library.meter([better[1]], "upgrade")
    return Composed(result, permission)


def cluster(
    experts: Sequence[str | Path],
    base: Path,
    count: int,
    out: Path | None = None,
    agreement: Agreement | None = None,
    library: Holdings | None = None,
    texts: Mapping[str, Path] | None = None,
    steps: int = 0,
) -> Clusters:
    """Group experts that changed the base alike (MBC); with `out`, write one expert a group there.

    With `texts`, by expert id or domain, and `steps` each is trained anew on the texts of its members, as published; without,
    the members are merged with equal weights. Raises `Invalid` for an expert that there is no text of.
    """
    if out is not None:
        require_new(out)
    library, agreement = library or Holdings(), agreement or Agreement()
    found = [library.find(str(name)) for name in experts]
    library.permit(found, "compose", agreement)
    parts, names = parts_of(found), _ids(found)
    model = load_full(base, device=device_of() if texts else None)  # without texts only rows are read
    origin = base_rows(model, parts)
    tables = _texts_of(base, found, texts) if texts else {}
    groups = mbc.cluster(parts, origin, count)
    written = []
    for number, group in enumerate(groups if out is not None else []):
        assert out is not None
        members = [found[i] for i in group]
        permission = library.permit(members, "compose", agreement)
        mixture, rows = Mixture(Recipe("linear"), {names[i]: 1.0 for i in group}), None
        if texts:
            rows = mbc.train_cluster(model, [parts[i] for i in group], [tables[names[i]] for i in group], steps)
            mixture = replace(mixture, verb="cluster", extra={"steps": steps, "texts": digests([*texts.values()])})
        record = _write(base, members, out / str(number), mixture, permission, trained=rows)
        written.append((out / str(number), str(record["expert_id"])))
    alike = [[round(float(x), 6) for x in row] for row in mbc.similarity(parts, origin)]
    return Clusters(names, [[names[i] for i in group] for group in groups], alike, written)


def _texts_of(base: Path, experts: Sequence[Expert], texts: Mapping[str, Path]) -> dict[str, Any]:
    tables, out = cut_by_domain(load_tokenizer(base), texts), {}
    for _, record in experts:
        name, domain = str(record["expert_id"]), str(record["domain"])
        if not {name, domain} & tables.keys():
            raise Invalid(f"there is no text of {name} to train its group on: give --text {domain}=FILE")
        out[name] = tables.get(name, tables.get(domain))
    return out


def route(
    experts: Sequence[str | Path],
    base: Path,
    options: RouteOptions,
    out: Path | None = None,
    library: Holdings | None = None,
) -> dict[str, dict[str, float]]:
    """Keep variants of experts side by side and choose token by token; the routing goes to the file `out`.

    Returns nats per token by domain: of the base, of every single expert, and routed.
    """
    library = library or Holdings()
    if options.method == "molora" and not options.train:
        raise Invalid("molora trains a router: give it text with --train FILE")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    found = [library.find(str(name)) for name in experts]
    library.permit(found, "compose", options.agreement)
    parts, model, tokenizer = parts_of(found), load_full(base, device=device_of()), load_tokenizer(base)
    origin = base_rows(model, parts)
    text = cut_sequences(tokenizer, options.train) if options.train else None
    tell(f"making the routing ({options.method})")
    routing = Routing.make(options.method, model, parts, origin, top_k=options.top_k, text=text, steps=options.steps)
    texts = cut_by_domain(tokenizer, options.measure)
    losses = {"base": {name: loss(model, table) for name, table in texts.items()}}
    chosen = {part.name: Routing.one_hot(parts, place) for place, part in enumerate(parts)} | {"routed": routing}
    for variant, way in chosen.items():
        tell(f"measuring {variant}")
        with variants_of(model, parts, origin, way):
            losses[variant] = {name: loss(model, table) for name, table in texts.items()}
    if out is not None:
        routing.save(out)
    library.meter([record for _, record in found], "route")
    return losses


def parts_of(experts: Sequence[Expert]) -> list[Part]:
    """Return the experts' rows, named by expert id."""
    return [replace(read_part(folder), name=str(record["expert_id"])) for folder, record in experts]


def learned_weights(base: Path, parts: Sequence[Part], recipe: Recipe, texts: Sequence[Path]) -> dict[str, float]:
    """Return the weights by part name under which the parts together have the least loss on the texts (LoRAHub)."""
    tell("learning the weights")
    model, sequences = load_full(base, device=device_of()), cut_sequences(load_tokenizer(base), texts)
    origin = base_rows(model, parts)
    evaluator = Evaluator(model, layers_of(origin))

    def measured(weights: dict[str, float]) -> float:
        sums, tokens = evaluator.losses(state_of(merge(parts, origin, recipe, weights)), sequences)
        return float(sums.sum() / tokens.sum())

    return learn_weights([part.name for part in parts], measured).weights


def _ids(experts: Sequence[Expert]) -> list[str]:
    return [str(record["expert_id"]) for _, record in experts]


def _weights_in(record: ExpertRecord, expert: str, composition: str | Path) -> dict[str, float]:
    """Return weights by parent. Raises `NotFound` when `expert` is none of them."""
    weights = {parent["expert_id"]: parent["weight"] for parent in record.get("derived", {}).get("parents", [])}
    if expert not in weights:
        raise NotFound(
            f"{expert} is not in {composition}; it is made of {', '.join(sorted(weights)) or 'nothing else'}"
        )
    return weights


def _recipe(record: ExpertRecord) -> Recipe:
    settings = record["derived"]["settings"]
    return Recipe(settings["method"], settings["density"], settings["scale"])


def _write(
    base: Path,
    experts: Sequence[Expert],
    out: Path,
    mixture: Mixture,
    permission: Permission,
    measure: Mapping[str, Path] | None = None,
    trained: Rows | None = None,
) -> ExpertRecord:
    require_new(out)  # Before what takes its time.
    texts = cut_by_domain(load_tokenizer(base), measure) if measure else {}
    return compose_experts(
        load_full(base, device=device_of()),
        experts,
        out,
        mixture,
        license=permission.license,
        created=now_iso(),
        texts=texts,
        trained=trained,
    )
