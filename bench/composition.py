"""Three experts of one base in one model: how much of each expert's saving on its own domain every way of composing keeps.

Tiny base. Experts of recipes, logs and poems are trained apart; recipes and logs share three of their experts. Losses are
held-out nats per token; `kept` is the composition's saving over the single expert's, mean over the three domains.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compose_setup import base, text, train
from bench.harness import Options, Result, interval, main, note

if TYPE_CHECKING:
    from connito.moe.compose import Part, Rows

LAYERS = {"recipes": {2: [0, 1, 2], 3: [1, 4]}, "logs": {2: [1, 2, 5], 3: [4, 6]}, "poems": {2: [3], 3: [0, 7]}}


def run(options: Options) -> Result:
    """Train, compose in every way, measure; predicted and measured savings of every expert on every domain."""
    import torch

    torch.set_num_threads(1)
    steps, count = (8, 6) if options.quick else (30, 24)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += _round(Path(folder), seed, steps, count)
    methods = sorted({row["method"] for row in rows if "kept" in row})
    figures: dict[str, Any] = {
        f"kept_{method}": interval([row["kept"] for row in rows if row.get("method") == method])[0]
        for method in methods
    }
    hits = [row["first_is_own"] for row in rows if "first_is_own" in row]
    figures["prediction_ranks_own_expert_first"] = statistics.fmean(hits)
    figures["prediction_rank_correlation"] = statistics.fmean(row["spearman"] for row in rows if "spearman" in row)
    figures["add_then_remove_identical"] = all(row["identical"] for row in rows if "identical" in row)
    return Result({"train_steps": steps, "held_out_sequences": count, "length": 64}, rows, figures)


def _round(folder: Path, seed: int, steps: int, count: int) -> list[dict[str, Any]]:
    from connito.base.loading import load_full
    from connito.moe.compose import Part, base_rows, rows_of

    note(f"seed {seed}: base and experts")
    source = base(folder, seed)
    parts = [
        Part(domain, str(number) * 64, rows_of(layers, train(source, layers, text(domain, 4 * steps, 50 + seed))))
        for number, (domain, layers) in enumerate(LAYERS.items())
    ]
    model = load_full(source)
    origin = base_rows(model, parts)
    held = {domain: text(domain, count, 900 + seed) for domain in LAYERS}
    note(f"seed {seed}: composing")
    rows = _compositions(model, parts, origin, held, seed)
    return [{"seed": seed, **row} for row in (*rows, *_predictions(model, parts, held), _identity(model, parts))]


def _compositions(
    model: Any, parts: list[Part], origin: Rows, held: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    from connito.moe.arrow import arrow, fixed, variants
    from connito.moe.compose import Recipe, layers_of, merge, state_of
    from connito.moe.evaluate import Evaluator
    from connito.moe.lorahub import learn_weights
    from connito.moe.prune import loss
    from connito.moe.upgrade import mean_loss

    evaluator = Evaluator(model, layers_of(origin))

    def measured(rows: Rows | None) -> dict[str, float]:
        evaluator.put(state_of(rows if rows is not None else origin))
        return {domain: mean_loss(evaluator, table) for domain, table in held.items()}

    plain = measured(None)
    single = {part.name: measured({**origin, **part.rows})[part.name] for part in parts}
    few = {domain: text(domain, 2, 700 + seed) for domain in LAYERS}

    def joint(weights: dict[str, float]) -> float:
        evaluator.put(state_of(merge(parts, origin, Recipe("sum"), weights)))
        return statistics.fmean(mean_loss(evaluator, table) for table in few.values())

    learned = learn_weights([part.name for part in parts], joint, budget=40).weights
    found = {
        "linear": measured(merge(parts, origin)),
        "sum": measured(merge(parts, origin, Recipe("sum"))),
        "ties": measured(merge(parts, origin, Recipe("ties", density=0.5))),
        "lorahub": measured(merge(parts, origin, Recipe("sum"), learned)),
    }
    evaluator.restore()
    for name, mixing in (("arrow", arrow(parts, origin, top_k=1)), ("uniform", fixed([1 / 3] * 3))):
        with variants(model, parts, origin, mixing):
            found[name] = {domain: loss(model, table) for domain, table in held.items()}
    return [
        {
            "method": method,
            "losses": losses,
            "base": plain,
            "single": single,
            "kept": statistics.fmean((plain[d] - losses[d]) / (plain[d] - single[d]) for d in LAYERS),
            **({"weights": learned} if method == "lorahub" else {}),
        }
        for method, losses in found.items()
    ]


def _predictions(model: Any, parts: list[Part], held: Mapping[str, Any]) -> list[dict[str, Any]]:
    from connito.moe.predict import measure_savings, predict_savings
    from scipy.stats import spearmanr

    rows = []
    for domain, table in held.items():
        predicted, measured = predict_savings(model, parts, table), measure_savings(model, parts, table)
        names = [part.name for part in parts]
        correlation = float(spearmanr([predicted[n] for n in names], [measured[n] for n in names]).statistic)
        first = max(predicted, key=predicted.__getitem__) == domain
        rows.append(
            {
                "texts": domain,
                "predicted": predicted,
                "measured": measured,
                "first_is_own": first,
                "spearman": correlation,
            }
        )
    return rows


def _identity(model: Any, parts: list[Part]) -> dict[str, Any]:
    from connito.moe.compose import Composition
    from connito.moe.insert import fingerprint

    before, composition = fingerprint(model), Composition(model)
    for part in parts:
        composition.add(part)
    for part in parts:
        composition.remove(part.name)
    return {"identical": fingerprint(model) == before}


if __name__ == "__main__":
    main("composition", run, doc=__doc__)
