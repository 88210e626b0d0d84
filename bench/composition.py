"""Experts of three domains in one model: held-out loss on each domain and on all of them, for every way of composing.

Tiny base. Experts of recipes, logs and poems are trained apart, each on the two experts a layer that its text uses
most; recipes and logs also train the other's first, so that they conflict there. Ledgers is a domain that nobody trained
for. Against them stand the single experts, and the same rows trained jointly on the same text. `union` is the mean over
the three domains; `kept` is the sum of the three savings over the sum of what the single experts save, each on its own
domain. `flex` adds experts with router rows of their own instead of changing any, `btx` makes an MoE of dense branches
whose every parameter was trained, so both have more to train than the others.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.compose_setup import base, branches, text, train
from bench.harness import Options, Result, by_seed, interval, main, note
from bench.plots import axes

if TYPE_CHECKING:
    from connito.experts.compose import Part, Rows

DOMAINS = ("recipes", "logs", "poems")
MEASURED = (*DOMAINS, "ledgers")
Losses = dict[str, float]
Places = dict[str, dict[int, list[int]]]


def run(options: Options) -> Result:
    """Train, compose in every way, measure; a plot of every method's loss on the union."""
    import torch

    torch.set_num_threads(1)
    steps, count = (8, 6) if options.quick else (30, 24)
    seeds = min(options.seeds, 2) if options.quick else options.seeds
    rows = by_seed(options, "composition", lambda seed: _seed(seed, steps, count, options.quick), seeds)
    _plot(rows, options.out)
    settings = {"in_parts": True, "train_steps": steps, "held_out_sequences": count, "length": 64, "seeds": seeds,
                "bases": "one, shared by the seeds" if options.quick else "one a seed"}  # fmt: skip
    return Result(settings, rows, _figures(rows))


def _seed(seed: int, steps: int, count: int, quick: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source = base(Path(folder), 0 if quick else seed)
        return [{"seed": seed, **row} for row in _round(source, seed, steps, count, quick)]


@dataclass(frozen=True)
class Bench:
    """One seed's experts and what they are measured on."""

    model: Any
    places: Places
    parts: list[Part]
    origin: Rows
    held: Mapping[str, Any]
    few: Mapping[str, Any]

    def measure(self, rows: Rows | None = None) -> Losses:
        """Return losses by domain with `rows` in the model, which is the base again afterwards."""
        from connito.experts.compose import layers_of, state_of
        from connito.experts.replacement import mean_loss
        from connito.moe.evaluate import Evaluator

        evaluator = Evaluator(self.model, layers_of(self.origin))
        evaluator.put(state_of({**self.origin, **(rows or {})}))
        try:
            return {domain: mean_loss(evaluator, table) for domain, table in self.held.items()}
        finally:
            evaluator.restore()

    def running(self, model: Any | None = None) -> Losses:
        """Return losses of a model as it runs."""
        from connito.experts.measure import loss

        return {domain: loss(self.model if model is None else model, table) for domain, table in self.held.items()}


def _round(source: Path, seed: int, steps: int, count: int, quick: bool) -> list[dict[str, Any]]:
    from connito.base.loading import load_full
    from connito.experts.compose import Part, base_rows, rows_of

    texts = {domain: text(domain, 4 * steps, 50 + seed) for domain in DOMAINS}
    model = load_full(source)
    places = _places(model, seed)
    parts = [
        Part(domain, str(number) * 64, rows_of(layers, train(source, layers, texts[domain])))
        for number, (domain, layers) in enumerate(places.items())
    ]
    held = {domain: text(domain, count, 900 + seed) for domain in MEASURED}
    few = {domain: text(domain, 4, 700 + seed) for domain in DOMAINS}
    bench = Bench(model, places, parts, base_rows(model, parts), held, few)
    note(f"seed {seed}: composing")
    found = {"base": bench.measure(), **{f"single_{part.name}": bench.measure(dict(part.rows)) for part in parts}}
    found |= _merged(bench) | _routed(bench, steps)
    note(f"seed {seed}: training jointly, adding, branching")
    found["joint"] = bench.measure(_jointly(source, places, texts, seed))
    found["flex"] = _flex(bench, texts, seed)
    if not quick:
        found["btx"] = bench.running(branches(seed, texts)[0])
    plain, single = found["base"], {part.name: found[f"single_{part.name}"][part.name] for part in parts}
    rows = [{"method": name, "losses": losses, **_summary(losses, plain, single)} for name, losses in found.items()]
    return [*rows, *_removals(bench), _upgrade(bench, source, texts), *_predictions(bench), _identity(bench)]


def _places(model: Any, seed: int) -> Places:
    """Return the two experts of each layer that a domain uses most; recipes and logs train each other's first as well."""
    from connito.experts.extraction import ranking
    from connito.moe.statistics import collect

    used = {domain: ranking(collect(model, text(domain, 8, 600 + seed)[:, :-1])) for domain in DOMAINS}
    extra = {"recipes": "logs", "logs": "recipes"}
    return {
        domain: {
            layer: sorted({*experts[:2], *(used[extra[domain]][layer][:1] if domain in extra else [])})
            for layer, experts in order.items()
        }
        for domain, order in used.items()
    }


def _summary(losses: Losses, plain: Losses, single: Losses) -> dict[str, float]:
    return {
        "union": statistics.fmean(losses[d] for d in DOMAINS),
        "kept": sum(plain[d] - losses[d] for d in DOMAINS) / sum(plain[d] - single[d] for d in DOMAINS),
        "untouched": losses["ledgers"] - plain["ledgers"],
    }


def _merged(bench: Bench) -> dict[str, Losses]:
    from connito.experts.compose import Recipe, layers_of, merge, state_of
    from connito.experts.lorahub import learn_weights
    from connito.experts.replacement import mean_loss
    from connito.moe.evaluate import Evaluator

    parts, origin = bench.parts, bench.origin
    evaluator = Evaluator(bench.model, layers_of(origin))

    def joint(weights: dict[str, float]) -> float:
        evaluator.put(state_of(merge(parts, origin, Recipe("sum"), weights)))
        return statistics.fmean(mean_loss(evaluator, table) for table in bench.few.values())

    learned = learn_weights([part.name for part in parts], joint, budget=40).weights
    evaluator.restore()
    return {
        "linear": bench.measure(merge(parts, origin)),
        "sum": bench.measure(merge(parts, origin, Recipe("sum"))),
        "ties": bench.measure(merge(parts, origin, Recipe("ties", density=0.5))),
        "lorahub": bench.measure(merge(parts, origin, Recipe("sum"), learned)),
    }


def _routed(bench: Bench, steps: int) -> dict[str, Losses]:
    from connito.experts.arrow import arrow, fixed, linear_router, train_router, variants
    from connito.experts.compose import Part, Recipe, merge
    from connito.experts.mbc import cluster

    parts, origin = bench.parts, bench.origin
    gates = train_router(bench.model, parts, origin, np.concatenate(list(bench.few.values())), steps=steps)
    clusters = [[parts[i] for i in group] for group in cluster(parts, origin, 2)]
    groups = [
        Part("+".join(part.name for part in members), str(number) * 64, merge(members, origin, Recipe("linear")))
        for number, members in enumerate(clusters)
    ]
    mixings: dict[str, tuple[list[Part], Any]] = {
        "arrow": (parts, arrow(parts, origin, top_k=1)),
        "arrow_soft": (parts, arrow(parts, origin)),
        "molora": (parts, linear_router(gates)),
        "uniform": (parts, fixed([1 / len(parts)] * len(parts))),
        "mbc_2_arrow": (groups, arrow(groups, origin, top_k=1)),
    }
    found = {}
    for name, (members, mixing) in mixings.items():
        with variants(bench.model, members, origin, mixing):
            found[name] = bench.running()
    return found


def _jointly(source: Path, places: Places, texts: Mapping[str, Any], seed: int) -> Rows:
    """Return the union of the experts' rows, trained on the union of their text in one go: as many tokens in all."""
    from connito.experts.compose import rows_of

    layers = {layer: sorted({e for x in places.values() for e in x[layer]}) for layer in (2, 3)}
    table = np.concatenate(list(texts.values()))
    return rows_of(layers, train(source, layers, table[np.random.default_rng(seed).permutation(len(table))]))


def _flex(bench: Bench, texts: Mapping[str, Any], seed: int) -> Losses:
    import copy

    from connito.experts.flex import grow, opt_in

    anchor = np.concatenate([text(domain, 4, 300 + seed)[:, :-1] for domain in MEASURED])
    additions = [
        grow(bench.model, domain, table.reshape(-1, 4, table.shape[1]), anchor, learning_rate=3e-3)
        for domain, table in texts.items()
    ]
    joined = copy.deepcopy(bench.model)
    opt_in(joined, additions)
    return bench.running(joined)


def _removals(bench: Bench) -> list[dict[str, Any]]:
    """Measure the effect on every domain of removing one expert from the composition."""
    from connito.experts.compose import merge

    whole, rows = bench.measure(merge(bench.parts, bench.origin)), []
    for gone in bench.parts:
        less = bench.measure(merge([part for part in bench.parts if part is not gone], bench.origin))
        rows.append({"removed": gone.name, "changes": {d: less[d] - whole[d] for d in MEASURED}})
    return rows


def _upgrade(bench: Bench, source: Path, texts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the poems expert in the composition by one trained further (BAR); the others' digests stay."""
    from connito.errors import Invalid
    from connito.experts.compose import Composition, Part, rows_of
    from connito.experts.replacement import replace_expert

    composition = Composition(bench.model)
    for part in bench.parts:
        composition.add(part)
    table = np.concatenate([texts["poems"], texts["poems"][::-1]])
    better = Part("poems", "9" * 64, rows_of(bench.places["poems"], train(source, bench.places["poems"], table)))
    try:
        made = replace_expert(bench.model, better, "poems", bench.held, margin=0.02)
        changes = {domain: made.after[domain] - made.before[domain] for domain in MEASURED}
        row: dict[str, Any] = {"upgraded": "poems", "accepted": True, "changes": changes}
    except Invalid as error:
        row = {"upgraded": "poems", "accepted": False, "why": str(error)}
    for name in list(composition.parts):
        composition.remove(name)
    return row


def _predictions(bench: Bench) -> list[dict[str, Any]]:
    from connito.experts.predict import measure_savings, predict_savings

    rows = []
    for domain in DOMAINS:
        predicted = predict_savings(bench.model, bench.parts, bench.held[domain])
        measured = measure_savings(bench.model, bench.parts, bench.held[domain])
        first = max(predicted, key=predicted.__getitem__) == max(measured, key=measured.__getitem__)
        rows.append({"texts": domain, "predicted": predicted, "measured": measured, "first_saves_most": first})
    return rows


def _identity(bench: Bench) -> dict[str, Any]:
    from connito.experts.compose import Composition
    from connito.moe.rows import fingerprint

    before, composition = fingerprint(bench.model), Composition(bench.model)
    for part in bench.parts:
        composition.add(part)
    for part in bench.parts:
        composition.remove(part.name)
    return {"identical": fingerprint(bench.model) == before}


def _by_method(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if "method" in row:
            found.setdefault(row["method"], []).append(value(row))
    return found


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return [mean, low, high] over seeds."""
    figures: dict[str, Any] = {}
    for method, values in _by_method(rows, lambda row: row["union"]).items():
        figures[f"union_{method}"] = _rounded(values)
    plain = {row["seed"]: row["union"] for row in rows if row.get("method") == "base"}
    for method, values in _by_method(rows, lambda row: plain[row["seed"]] - row["union"]).items():
        figures[f"saved_{method}"] = _rounded(values)
    for method, values in _by_method(rows, lambda row: row["untouched"]).items():
        figures[f"ledgers_{method}"] = _rounded(values)
    for method, values in _by_method(rows, lambda row: row["kept"]).items():
        if method != "base" and not method.startswith("single_"):
            figures[f"kept_{method}"] = _rounded(values)
    for domain in MEASURED:
        for method, values in _by_method(rows, lambda row, domain=domain: row["losses"][domain]).items():  # type: ignore[misc]
            figures[f"loss_{method}_{domain}"] = _rounded(values)
    removed = [row for row in rows if "removed" in row]
    figures["removing_hurts_its_own"] = _rounded([row["changes"][row["removed"]] for row in removed])
    figures["removing_hurts_others_most"] = max(
        change for row in removed for domain, change in row["changes"].items() if domain != row["removed"]
    )
    upgrades = [row for row in rows if "upgraded" in row]
    figures["upgrades_accepted"] = sum(row["accepted"] for row in upgrades) / len(upgrades)
    if changes := [row["changes"] for row in upgrades if row["accepted"]]:
        figures["upgrade_own"] = _rounded([change["poems"] for change in changes])
        figures["upgrade_others_worst"] = max(v for change in changes for d, v in change.items() if d != "poems")
    figures["prediction_first_saves_most"] = statistics.fmean(r["first_saves_most"] for r in rows if "texts" in r)
    figures["add_then_remove_identical"] = all(row["identical"] for row in rows if "identical" in row)
    return figures


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in interval(values)]


def _plot(rows: list[dict[str, Any]], out: Path) -> None:
    shown = {m: interval(v) for m, v in _by_method(rows, lambda row: row["union"]).items()}
    kept = {m: interval(v) for m, v in _by_method(rows, lambda row: row["kept"]).items() if m != "base"}
    with axes(out / "composition.svg", 2) as (left, right):
        left.bars(dict(sorted(shown.items(), key=lambda item: item[1][0])), "loss on the union, nats per token")
        right.bars(dict(sorted(kept.items(), key=lambda item: -item[1][0])), "share of the experts' savings kept")


if __name__ == "__main__":
    main("composition", run, doc=__doc__, seeds=5)
