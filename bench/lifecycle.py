"""Smaller models for one domain: held-out loss against bytes, for every way of leaving experts out or making them smaller.

Two tiny bases of one seed and as much training: `standard`, every expert and router trained on all four domains, and
`emo`, the same with each document held to four of the eight experts of a layer. Calibration and measurement are on
recipes, on different text. `cost` is nats per token above the base's own full model, `bytes` what the checkpoint's
tensors take as stored (zeros as a bitmap beside what is left, low rank as two factors). `random` is the mean of ten
random choices, `tuned` trains experts on more of the calibration's text, in forty
batches, half of them while experts go and half when one a layer is left.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from connito.render import svg

from bench.compose_setup import text, trained_base
from bench.harness import Options, Result, by_seed, interval, main, note
from bench.plots import BLUE, GREEN, axes

DOMAIN = "recipes"
BASES = {"standard": 0, "emo": 4}
EXPERTS, LAYERS = 8, (2, 3)
Row = dict[str, Any]


def run(options: Options) -> Result:
    """Measure a half and a quarter of the experts, one a layer, and each expert at a half and a quarter of its size."""
    import torch

    torch.set_num_threads(1)
    count, steps = (6, 30) if options.quick else (24, 160)
    seeds = min(options.seeds, 1) if options.quick else options.seeds
    rows = by_seed(options, "lifecycle", lambda seed: _seed(seed, steps, count), seeds)
    _plot(rows, options.out)
    settings = {
        "in_parts": True,
        "domain": DOMAIN,
        "held_out_sequences": count,
        "length": 64,
        "training_batches": steps,
        "seeds": seeds,
    }
    return Result(settings, rows, _figures(rows))


def _seed(seed: int, steps: int, count: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, pool in BASES.items():
            note(f"  {name} base")
            source = trained_base(Path(folder), seed, steps, pool)
            note(f"  {name}: leaving experts out")
            rows += [{"seed": seed, "base": name, **row} for row in _all(source, seed, count)]
    return rows


def _all(source: Path, seed: int, count: int) -> Iterator[Row]:
    yield from _pruned(source, seed, count)
    yield from _extracted(source, seed, count)
    yield from _smaller(source, seed, count)
    yield from _single_expert(source, seed, count)


def size(model: Any) -> int:
    """Return bytes of a model's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in dict(model.named_parameters()).values())


def _pruned(source: Path, seed: int, count: int) -> Iterator[Row]:
    from connito.base.loading import load_full
    from connito.experts import choose, prune
    from connito.experts.measure import loss
    from connito.experts.token_skipping import skip_thresholds, skipping
    from connito.moe.layout import require_moe_layers

    model, probe, held = load_full(source), text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    full, rng, whole = loss(model, held), random.Random(seed), size(model)
    each = choose.expert_bytes(next(iter(require_moe_layers(model).values())))
    yield {"method": "full", "full": full, "cost": 0.0, "bytes": whole}

    def row(method: str, keep: prune.Keep) -> Row:
        gone = EXPERTS * len(LAYERS) - sum(map(len, keep.values()))
        with prune.masked(model, keep):
            cost = loss(model, held) - full
        return {"method": method, "full": full, "cost": cost, "bytes": whole - gone * each, "keep": keep}

    for budget in (8, 4, 2):
        for method in choose.METHODS:
            yield row(f"{method}_{budget}", choose.choose(model, probe, method, max_experts=budget))
        draws = [row("", {i: sorted(rng.sample(range(EXPERTS), budget // 2)) for i in LAYERS}) for _ in range(10)]
        yield {**draws[0], "method": f"random_{budget}", "cost": statistics.fmean(draw["cost"] for draw in draws)}
    betas = skip_thresholds(model, probe[:, :-1])
    with skipping(model, betas) as skipped:
        cost = loss(model, held) - full
    yield {"method": "skipping", "full": full, "cost": cost, "bytes": whole, "skipped_share": skipped.share}


def _extracted(source: Path, seed: int, count: int) -> Iterator[Row]:
    from connito.base.loading import load_full
    from connito.experts.choose import expert_bytes
    from connito.experts.extraction import extract_domain
    from connito.moe.layout import require_moe_layers

    model, probe, held = load_full(source), text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    whole, each = size(model), expert_bytes(next(iter(require_moe_layers(model).values())))
    for per_layer in (4, 2, 1, 0):
        found = extract_domain(model, probe, held, margin=0.02, per_layer=per_layer, accept_loss=True)
        name = f"extracted_{2 * per_layer}" if per_layer else "extracted_within_0.02"
        yield {"method": name, "full": found.full_loss, "cost": found.cost, "kept": found.kept, "tried": found.tried,
               "bytes": whole - (found.total - found.kept) * each}  # fmt: skip


def _smaller(source: Path, seed: int, count: int) -> Iterator[Row]:
    from connito.base.loading import load_full
    from connito.experts.lowrank import MAPS, low_rank, sparsify
    from connito.experts.measure import loss
    from connito.moe.layout import require_moe_layers

    probe, held = text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    full, whole = loss(load_full(source), held), size(load_full(source))
    for share in (0.5, 0.75):
        model = load_full(source)
        sparsify(model, probe[:, :-1], share)
        banks = [getattr(x.experts, n) for x in require_moe_layers(model).values() for n in x.parameters if n in MAPS]
        numbers, zeros = sum(b.numel() for b in banks), sum(int((b == 0).sum()) for b in banks)
        yield {"method": f"zeros_{share:.0%}", "full": full, "cost": loss(model, held) - full,
               "bytes": whole - 4 * zeros + numbers // 8}  # fmt: skip
        model = load_full(source)
        factors, _ = low_rank(model, probe[:, :-1], 1 - share)
        stored = sum(factor.numel() for factor in factors.values())
        yield {"method": f"low_rank_{1 - share:.0%}", "full": full, "cost": loss(model, held) - full,
               "bytes": whole - 4 * (numbers - stored)}  # fmt: skip


def _single_expert(source: Path, seed: int, count: int) -> Iterator[Row]:
    from connito.base.loading import load_full
    from connito.experts.dense import to_dense
    from connito.experts.measure import loss
    from connito.experts.prune import progressive
    from connito.experts.tuning import tune_for_task

    probe, held = text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    full = loss(load_full(source), held)
    more = text(DOMAIN, 32 if count > 6 else 8, 300 + seed)
    for method, steps in (("one_expert_dense", 0), ("one_expert_dense_tuned", 40)):
        model = load_full(source)
        keep, history = tune_for_task(model, probe, more, steps) if steps else progressive(model, probe)
        dense = to_dense(model)
        yield {"method": method, "full": full, "cost": loss(dense, held) - full, "bytes": size(dense), "keep": keep,
               "history": history}  # fmt: skip


def _figures(rows: list[Row]) -> dict[str, Any]:
    """Return [mean, low, high] over seeds."""
    figures: dict[str, Any] = {}
    for base in BASES:
        of_base = [row for row in rows if row["base"] == base]
        for method in dict.fromkeys(row["method"] for row in of_base):
            costs = [row["cost"] for row in of_base if row["method"] == method]
            figures[f"{base}_cost_{method}"] = [round(value, 4) for value in interval(costs)]
        figures[f"{base}_full_loss"] = [
            round(v, 4) for v in interval([r["full"] for r in of_base if r["method"] == "full"])
        ]
        for method in dict.fromkeys(row["method"] for row in of_base):
            figures[f"{base}_bytes_{method}"] = round(
                statistics.fmean(row["bytes"] for row in of_base if row["method"] == method)
            )
        figures[f"{base}_skipped_share"] = statistics.fmean(r["skipped_share"] for r in of_base if "skipped_share" in r)
    return figures


FAMILIES = ("naee", "router-weighted", "moe-i2", "random", "extracted", "zeros", "low_rank", "one_expert")


def _plot(rows: list[Row], out: Path) -> None:
    with axes(out / "lifecycle.svg", 2) as panels:
        for panel, base in zip(panels, BASES, strict=True):
            for family, colour in zip(FAMILIES, (*svg.PALETTE, BLUE, GREEN), strict=True):
                points: dict[str, list[Row]] = {}
                for row in rows:
                    if row["base"] == base and row["method"].startswith(family) and "within" not in row["method"]:
                        points.setdefault(row["method"], []).append(row)
                line = sorted(
                    (statistics.fmean(r["bytes"] for r in p) / 1e3, statistics.fmean(r["cost"] for r in p))
                    for p in points.values()
                )
                panel.line(line, colour, family, dots=True)
            panel.title, panel.x_label, panel.y_label = base, "kilobytes", "nats per token above the full model"
            panel.y_linear = 1.0
            panel.level(0)


if __name__ == "__main__":
    main("lifecycle", run, doc=__doc__, seeds=5)
