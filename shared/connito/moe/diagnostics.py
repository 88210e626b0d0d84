"""Diagnostics shown beside a selection map; none of them affects a decision.

From counts: who shares experts with whom, how evenly a layer is used, which experts go together. By intervening in
the model (after MoE Lens and driver-expert analysis): what the output loses without an expert, and how far a token's
first expert alone carries it.

Shapes: N experts, D domains, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.data.packing import counted, text_of, tokens_of
from connito.errors import Invalid
from connito.moe.statistics import FloatArray, LayerRouting, RoutingStatistics
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import nn

# An expert that gets less than this share of what it would get if all were used alike is under-used.
LOW_SHARE = 0.1
# Tables of logits held at a time when output distributions are compared: two of so many tokens.
KL_TOKENS = 256


def diagnose(domains: Mapping[str, RoutingStatistics], layers: Mapping[int, list[int]], domain: str) -> dict[str, Any]:
    """Return the diagnostics that need counts alone.

    Per layer: `domain_entropy` H_e = −Σ_d p ln p / ln D of each expert (0 = one domain only, 1 = all alike; needs two
    domains), `unused` and `low_use` experts of the target, its `utilisation`, `first_choice` shares, `coactivation` of
    selected pairs. For all layers: `tokens`, `mass_by_domain`, the share of each domain's routing that falls on the
    selected experts, `utilisation` and `overlap` of every two domains' routing.
    """
    out: dict[str, Any] = {
        "tokens": {name: statistics.tokens for name, statistics in domains.items()},
        "mass_by_domain": {name: mass(statistics, layers) for name, statistics in domains.items()},
        "utilisation": {
            name: float(np.mean([utilisation(layer) for layer in statistics.layers.values()]))
            for name, statistics in domains.items()
        },
        "layers": {},
    }
    if len(domains) > 1:
        out["overlap"] = {f"{a}|{b}": overlap(domains[a], domains[b]) for a, b in combinations(domains, 2)}
    for index, experts in layers.items():
        own = domains[domain].layers[index]
        entry: dict[str, Any] = {
            "unused": [int(e) for e in np.flatnonzero(own.counts == 0)],
            "low_use": low_use(own),
            "utilisation": utilisation(own),
            "first_choice": [float(x) for x in own.first / max(1, own.tokens)],
            "coactivation": {
                f"{a}-{b}": float(own.together[a, b] / max(1, own.tokens))
                for i, a in enumerate(experts)
                for b in experts[i + 1 :]
            },
        }
        if len(domains) > 1:
            entry["domain_entropy"] = [
                float(x) for x in domain_entropy([s.layers[index].token_score for s in domains.values()])
            ]
        out["layers"][str(index)] = entry
    return out


def mass(statistics: RoutingStatistics, layers: Mapping[int, list[int]]) -> float:
    """Return the share of routing decisions that fall on `layers`' experts, mean over those layers."""
    return float(np.mean([statistics.layers[i].token_score[e].sum() for i, e in layers.items()]))


def domain_entropy(scores: Sequence[FloatArray]) -> FloatArray:
    """Return H_e = −Σ_d p_d ln p_d / ln D with p_d = r_d[e] / Σ_d r_d[e], [N], for D ≥ 2 tables of scores [N]."""
    table = np.stack(scores)
    share = table / np.maximum(table.sum(axis=0), 1e-300)
    logs = np.log(np.where(share > 0, share, 1.0))
    return np.asarray(-(share * logs).sum(axis=0) / np.log(len(scores)))


def utilisation(layer: LayerRouting) -> float:
    """Return the evenness with which a layer's experts are used: exp(entropy of the shares) / N. 1 = all alike, 1/N =
    a single one.
    """
    share = layer.counts / max(1, layer.counts.sum())
    used = share[share > 0]
    return float(np.exp(-(used * np.log(used)).sum()) / len(share)) if len(used) else 0.0


def low_use(layer: LayerRouting) -> list[int]:
    """Return the experts that get less than a tenth of an even share."""
    return [int(e) for e in np.flatnonzero(layer.token_score < LOW_SHARE / len(layer.counts))]


def overlap(one: RoutingStatistics, other: RoutingStatistics) -> float:
    """Return Σ_e min(r_1[e], r_2[e]), mean over layers: the share of routing that two domains have in common."""
    common = [np.minimum(layer.token_score, other.layers[i].token_score).sum() for i, layer in one.layers.items()]
    return float(np.mean(common))


def overlaps(domains: Mapping[str, RoutingStatistics]) -> FloatArray:
    """Return `overlap` of every two domains, [D, D]."""
    return np.array([[overlap(a, b) for b in domains.values()] for a in domains.values()])


def coactivation(layer: LayerRouting) -> FloatArray:
    """Return P(b chosen | a chosen), [N, N]; rows of unused experts are 0. The diagonal, which is 1 by definition, is
    set to 0.
    """
    table = layer.together / np.maximum(1, layer.counts)[:, None]
    np.fill_diagonal(table, 0.0)
    return np.asarray(table)


def causal_effects(
    model: nn.Module,
    layers: Mapping[int, Sequence[int]],
    sequences: npt.NDArray[Any],
    *,
    budget: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, dict[int, float]]:
    """Return CE_e = E[KL(P ‖ P_do(gate_e → 0))] in nats per token, by layer and expert: what the next-token
    distribution loses when the expert's gate is zero and nothing takes its place. Large ones are driver experts.

    sequences [n, L], ids or records. Each expert costs one forward pass from its layer up; `budget` caps how many are measured
    (0: all of `layers`), best of every layer first. The model is left as it was.
    """
    import torch

    from connito.moe.batches import as_taken, positions_of
    from connito.moe.evaluate import PartialForward
    from connito.moe.layout import require_moe_layers

    sequences = as_taken(sequences, model)
    tokens = max(1, int(text_of(sequences).sum()))
    found = require_moe_layers(model)
    order = _by_rank(layers)[: budget or None]
    effects: dict[int, dict[int, float]] = {index: {} for index in sorted({index for index, _ in order})}
    device, size = next(model.parameters()).device, max(1, KL_TOKENS // max(1, sequences.shape[1]))
    totals, done = dict.fromkeys(order, 0.0), 0
    starts = range(0, len(sequences), size) if order else ()
    with torch.inference_mode():
        for start in starts:
            rows = sequences[start : start + size]
            ids = torch.from_numpy(tokens_of(rows).astype(np.int64)).to(device)
            text = torch.from_numpy(text_of(rows)).to(device)
            names = {index: found[index].experts_name for index in effects}
            forward = PartialForward(model, names.values(), ids, positions_of(rows, device))
            logits = forward.begin()
            for name in names.values():
                forward.check(name, logits)
            whole = logits.float().log_softmax(dim=-1)
            for index, expert in order:
                with _gates(found[index].router, partial(_without, expert)):
                    changed = forward.logits(names[index]).float().log_softmax(dim=-1)
                totals[index, expert] += float((whole.exp() * (whole - changed)).sum(dim=-1)[text].double().sum())
                done += 1
                if progress is not None:
                    progress(done, len(order) * len(starts))
    for (index, expert), total in totals.items():
        effects[index][expert] = max(0.0, total / tokens)
    return effects


def _without(expert: int, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return weights.masked_fill(ids == expert, 0)


def top1_ratio(model: nn.Module, sequences: npt.NDArray[Any], batch_tokens: int = 2048) -> float:
    """Return the perplexity when each token's strongest expert takes the weight of all its k, over the model's own; 1
    where k is 1.

    sequences [n, L + 1], ids or records. Near 1: the layers' first experts carry the text alone.
    """
    import torch

    from connito.moe.batches import batch_of
    from connito.moe.head import Head
    from connito.moe.layout import require_moe_layers

    head, tokens = Head(model), max(1, int(counted(sequences).sum()))

    def loss() -> float:
        total, size = 0.0, max(1, batch_tokens // (sequences.shape[1] - 1))
        for start in range(0, len(sequences), size):
            batch = batch_of(sequences[start : start + size], model)
            total += float(head.nll(*batch).double().sum())
        return float(total / tokens)

    with torch.inference_mode(), ExitStack() as stack:
        whole = loss()
        for layer in require_moe_layers(model).values():
            stack.enter_context(first_alone(layer.router))
        return math.exp(min(700.0, loss() - whole))


def first_alone(router: nn.Module) -> AbstractContextManager[None]:
    """Give each token's strongest expert the gate weight of all its k inside the block; the others get none."""
    return _gates(router, _strongest)


def _strongest(weights: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    import torch

    first = weights.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(weights).scatter(-1, first, weights.sum(dim=-1, keepdim=True))


def _by_rank(layers: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    deepest = max(map(len, layers.values()), default=0)
    return [(i, experts[rank]) for rank in range(deepest) for i, experts in layers.items() if rank < len(experts)]


@contextmanager
def _gates(router: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Give experts `change(weights, ids)` inside the block, instead of the gate weights [T, k] that the router reported."""
    from connito.moe.router import choice

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        logits, weights, ids = choice(output)
        return (logits, change(weights, ids), ids, *output[3:])

    handle = router.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def measure(
    model: nn.Module,
    layers: Mapping[int, list[int]],
    sequences: npt.NDArray[Any],
    *,
    budget: int,
    max_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the diagnostics that need the model, on the first `max_tokens` of `sequences` [n, L + 1]:
    `causal_effect` by layer and expert, of at most `budget` selected experts, `drivers` (more than half of the largest
    effect), `top1_perplexity_ratio`.
    """
    if not len(sequences):
        raise Invalid(
            "the probe is shorter than one sequence: give more text", reason=reasons_pb2.REASON_SELECTION_FAILED
        )
    rows = sequences[: max(1, max_tokens // max(1, sequences.shape[1] - 1))]
    effects = causal_effects(model, layers, rows[:, :-1], budget=budget, progress=progress)
    largest = max((ce for layer in effects.values() for ce in layer.values()), default=0.0)
    return {
        "causal_effect": {str(i): {str(e): ce for e, ce in layer.items()} for i, layer in effects.items()},
        "drivers": [[i, e] for i, layer in effects.items() for e, ce in layer.items() if ce > largest / 2],
        "measured_on_tokens": int(rows[:, :-1].size),
        "top1_perplexity_ratio": top1_ratio(model, rows),
    }
