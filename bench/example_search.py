"""Searching by example, measured: every expert on every query, against what was predicted."""

from __future__ import annotations

import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bench.compose_setup import base, text, train

BATCHES = (4, 12, 30)


def by_example(seed: int, *, quick: bool) -> list[dict[str, Any]]:
    """Measure each query and way of ranking; quick: fewer sequences a query."""
    import torch
    from connito.base.loading import load_full
    from connito.base.tiny import DOMAINS
    from connito.experts.compose import Part, rows_of
    from connito.experts.extraction import ranking
    from connito.experts.predict import measure_savings, nearest_experts, predict_savings
    from connito.moe.statistics import collect
    from connito.workloads.selecting import signature_of

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = base(Path(folder), seed)
        model, parts, records = load_full(source), list[Part](), dict[str, Any]()
        for domain in DOMAINS:
            served: dict[int, Any] = {}
            statistics = collect(model, text(domain, 8, 600 + seed)[:, :-1], served=served)
            places = {layer: sorted(experts[:2]) for layer, experts in ranking(statistics).items()}
            for batches in BATCHES:
                name = f"{domain}-{batches}"
                state = train(source, places, text(domain, 4 * batches, 50 + seed))
                parts.append(Part(name, f"{len(parts):064d}", rows_of(places, state)))
                saved = measure_savings(model, parts[-1:], text(domain, 4, 800 + seed))[name]
                losses = [{"domain": domain, "before": saved, "after": 0.0}]
                signature = signature_of(statistics, served, places)
                records[name] = {"domain": domain, "losses": losses, "signature": signature}
        count = 2 if quick else 6
        held = {domain: text(domain, count, 900 + seed) for domain in DOMAINS}
        queries = {(d,): held[d] for d in DOMAINS} | {
            pair: np.concatenate([held[d] for d in pair]) for pair in combinations(DOMAINS, 2)
        }
        for query, table in queries.items():
            measured = measure_savings(model, parts, table)
            predicted = predict_savings(model, parts, table)
            order = sorted(predicted, key=lambda name: (-predicted[name], name))
            checked = sorted(order[:5], key=lambda name: -measured[name])
            ways = {
                "signature": nearest_experts(model, records, table),
                "gradient": order,
                "gradient_then_5_measured": checked + order[5:],
            }
            rows += [{"seed": seed, "query": "+".join(query), "method": way, **_judged(names, measured)}
                     for way, names in ways.items()]  # fmt: skip
    return rows


def _judged(names: list[str], measured: dict[str, float]) -> dict[str, Any]:
    best = max(measured, key=lambda name: (measured[name], name))
    return {
        "first": names[0],
        "really": best,
        "first_is_best": names[0] == best,
        "best_in_first_3": best in names[:3],
        "saved": measured[names[0]],
        "best": measured[best],
        "regret": measured[best] - measured[names[0]],
    }
