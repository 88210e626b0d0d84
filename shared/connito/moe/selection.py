"""Which experts a domain uses: from routing statistics to a selection map. No model is needed, only counts.

Methods:
  esft-token    shortest prefix by descending token score whose sum reaches p (ESFT, Wang et al. 2024)
  esft-gate     the same with gate scores
  differential  token score of the domain minus γ times that of general text; the prefix covers p of the positive part
  des-moe       every expert whose score reaches p of the layer's best (DES-MoE map)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from connito.errors import Invalid
from connito.moe.statistics import FloatArray, RoutingStatistics
from connito.v1 import reasons_pb2

METHODS = ("esft-token", "esft-gate", "differential", "des-moe")
DEFAULT_THRESHOLD = {"esft-token": 0.2, "esft-gate": 0.1, "differential": 0.5, "des-moe": 0.6}
# The published sets come from scores that were written down with this many decimals.
DECIMALS = 4


@dataclass(frozen=True)
class Selection:
    """The selection map. `layers`: expert ids best first; `scores`: one score per expert of the layer."""

    method: str
    threshold: float
    layers: dict[int, list[int]]
    scores: dict[int, list[float]]
    total: int
    # Share of the domain's routing decisions that fall on selected experts, mean over layers.
    mass: float
    helpers: dict[int, list[int]] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def selected(self) -> int:
        """How many experts, over all layers."""
        return sum(len(experts) for experts in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """What `connito select --json` prints."""
        out: dict[str, Any] = {
            "method": self.method,
            "threshold": self.threshold,
            "layers": {str(layer): experts for layer, experts in self.layers.items()},
            "scores": {str(layer): scores for layer, scores in self.scores.items()},
            "selected": self.selected,
            "total": self.total,
            "mass": self.mass,
        }
        if self.helpers:
            out["helpers"] = {str(layer): experts for layer, experts in self.helpers.items()}
        if self.diagnostics:
            out["diagnostics"] = self.diagnostics
        return out

    def to_bytes(self) -> bytes:
        """The same as reproducible JSON bytes, for the store."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Selection:
        """The inverse of `to_json`."""

        def by_layer(name: str) -> dict[int, list[Any]]:
            return {int(k): list(v) for k, v in data.get(name, {}).items()}

        return cls(
            data["method"],
            float(data["threshold"]),
            by_layer("layers"),
            by_layer("scores"),
            int(data["total"]),
            float(data["mass"]),
            by_layer("helpers"),
            dict(data.get("diagnostics", {})),
        )


def select(
    target: RoutingStatistics,
    method: str = "esft-token",
    threshold: float | None = None,
    *,
    general: Mapping[str, RoutingStatistics] | None = None,
    gamma: float = 1.0,
    max_experts: int = 0,
    max_bytes: int = 0,
    expert_bytes: Mapping[int, int] | int = 0,
    max_experts_per_layer: int = 0,
    helpers_per_layer: int = 0,
    domain: str = "target",
) -> Selection:
    """The experts that `target`'s text uses.

    threshold: p of the method, in (0, 1]; None takes the method's own. general: statistics of other domains by name,
    needed by `differential`, used by every method for the diagnostics. Caps: `max_experts` and `max_bytes` over all
    layers (best total score first), `max_experts_per_layer`; 0 is no cap; `expert_bytes` is the size of one expert, by
    layer or for all. helpers_per_layer: frozen experts to keep beside the targets, most used first.

    Raises `Invalid` (SELECTION_FAILED) with cause and remedy.
    """
    p = DEFAULT_THRESHOLD.get(method, 0.0) if threshold is None else threshold
    _check(target, method, p, general, max_bytes, expert_bytes)
    scores = {index: _scores(target, index, method, general, gamma) for index in sorted(target.layers)}
    layers = {index: _prefix(scores[index], method, p) for index in scores}
    if max_experts_per_layer:
        layers = {index: experts[:max_experts_per_layer] for index, experts in layers.items()}
    sizes = {index: expert_bytes if isinstance(expert_bytes, int) else int(expert_bytes[index]) for index in layers}
    if max_experts or max_bytes:
        layers = _budgeted(layers, scores, sizes, max_experts, max_bytes)
    layers = {index: experts for index, experts in layers.items() if experts}
    if not layers:
        raise _invalid(
            "no expert scores above zero: the target text routes exactly as the general text does; use esft-token"
        )
    usage = {index: target.layers[index].token_score for index in target.layers}
    return Selection(
        method,
        float(p),
        layers,
        {index: [float(x) for x in score] for index, score in scores.items()},
        sum(len(score) for score in scores.values()),
        float(np.mean([usage[index][experts].sum() for index, experts in layers.items()])),
        choose_helpers(target, layers, helpers_per_layer),
        diagnose({domain: target, **(general or {})}, layers, domain),
    )


def choose_helpers(target: RoutingStatistics, layers: Mapping[int, list[int]], count: int) -> dict[int, list[int]]:
    """The `count` experts per layer that the domain uses most after the selected ones, most used first."""
    if count <= 0:
        return {}
    out = {}
    for index, experts in layers.items():
        order = _descending(target.layers[index].token_score)
        out[index] = [e for e in order if e not in set(experts)][:count]
    return out


def des_moe_map(domains: Mapping[str, RoutingStatistics], threshold: float = 0.6) -> dict[int, dict[str, list[int]]]:
    """M[d, e] = 1 iff A[d, e] ≥ threshold · max_e A[d, e], by layer and domain, best first, for several domains at once."""
    indices = sorted({index for statistics in domains.values() for index in statistics.layers})
    return {
        index: {
            name: _prefix(statistics.layers[index].token_score, "des-moe", threshold)
            for name, statistics in domains.items()
            if index in statistics.layers
        }
        for index in indices
    }


def ema(previous: FloatArray | None, current: FloatArray, decay: float = 0.9) -> FloatArray:
    """A ← decay·A + (1 − decay)·current, the running activation map of DES-MoE; the first observation starts it."""
    return current if previous is None else np.asarray(decay * previous + (1 - decay) * current)


def diagnose(domains: Mapping[str, RoutingStatistics], layers: Mapping[int, list[int]], domain: str) -> dict[str, Any]:
    """What a person wants to see beside the map: nothing here decides.

    Per layer: `domain_entropy` H_e = −Σ_d p ln p / ln D of each expert (0 = one domain only, 1 = all alike; needs two
    domains), `unused` experts of the target, `utilisation` of the others' text, `coactivation` of selected pairs; and
    `mass_by_domain`, the share of each domain's routing that falls on the selected experts.
    """
    out: dict[str, Any] = {
        "tokens": {name: statistics.tokens for name, statistics in domains.items()},
        "mass_by_domain": {
            name: float(np.mean([statistics.layers[i].token_score[e].sum() for i, e in layers.items()]))
            for name, statistics in domains.items()
        },
        "layers": {},
    }
    for index, experts in layers.items():
        own = domains[domain].layers[index]
        entry: dict[str, Any] = {
            "unused": [int(e) for e in np.flatnonzero(own.counts == 0)],
            "first_choice": [float(x) for x in own.first / max(1, own.tokens)],
            "coactivation": {
                f"{a}-{b}": float(own.together[a, b] / max(1, own.tokens))
                for i, a in enumerate(experts)
                for b in experts[i + 1 :]
            },
        }
        if len(domains) > 1:
            entry["domain_entropy"] = [
                float(x) for x in _entropy([s.layers[index].token_score for s in domains.values()])
            ]
        out["layers"][str(index)] = entry
    return out


def _entropy(scores: list[FloatArray]) -> FloatArray:
    table = np.stack(scores)
    share = table / np.maximum(table.sum(axis=0), 1e-300)
    logs = np.log(np.where(share > 0, share, 1.0))
    return np.asarray(-(share * logs).sum(axis=0) / np.log(len(scores)))


def _scores(
    target: RoutingStatistics, index: int, method: str, general: Mapping[str, RoutingStatistics] | None, gamma: float
) -> FloatArray:
    layer = target.layers[index]
    if method == "esft-token":
        return np.round(layer.token_score, DECIMALS)
    if method == "esft-gate":
        return layer.gate_score
    if method == "differential":
        assert general
        others = np.mean([statistics.layers[index].token_score for statistics in general.values()], axis=0)
        return np.asarray(layer.token_score - gamma * others)
    return layer.token_score


def _prefix(scores: FloatArray, method: str, p: float) -> list[int]:
    """The layer's experts, best first; equal scores by ascending id."""
    order = _descending(scores)
    if method == "des-moe":
        return [e for e in order if scores[e] >= p * scores[order[0]] and scores[e] > 0]
    if method == "differential":
        order = [e for e in order if scores[e] > 0]
        p *= float(scores[order].sum())
    chosen: list[int] = []
    reached = 0.0
    for expert in order:
        if chosen and reached >= p - 1e-9:
            break
        if scores[expert] <= 0:
            break
        chosen.append(expert)
        reached += float(scores[expert])
    return chosen


def _descending(scores: FloatArray) -> list[int]:
    return [int(e) for e in np.argsort(-scores, kind="stable")]


def _budgeted(
    layers: Mapping[int, list[int]],
    scores: Mapping[int, FloatArray],
    sizes: Mapping[int, int],
    max_experts: int,
    max_bytes: int,
) -> dict[int, list[int]]:
    """Best scores first over all layers, until a cap is met; an expert that does not fit is passed over."""
    ranked = sorted(
        ((float(scores[i][e]), i, rank, e) for i, experts in layers.items() for rank, e in enumerate(experts)),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    kept: dict[int, list[int]] = {i: [] for i in layers}
    count = used = 0
    for _, index, _, expert in ranked:
        if max_experts and count >= max_experts:
            break
        if max_bytes and used + sizes[index] > max_bytes:
            continue
        kept[index].append(expert)
        count, used = count + 1, used + sizes[index]
    return kept


def _check(
    target: RoutingStatistics,
    method: str,
    p: float,
    general: Mapping[str, RoutingStatistics] | None,
    max_bytes: int,
    expert_bytes: Mapping[int, int] | int,
) -> None:
    if method not in METHODS:
        raise _invalid(f"unknown selection method {method!r}: use {', '.join(METHODS)}")
    if not 0 < p <= 1:
        raise _invalid(f"the threshold is {p}, but it is a share: give a number above 0 and at most 1")
    if not target.layers:
        raise _invalid(
            "the statistics hold no MoE layer: the model is dense; turn it into an MoE with `connito base build`"
        )
    if target.tokens == 0:
        raise _invalid("the probe is empty: no token was routed; give text of the target domain")
    if method == "differential" and not general:
        raise _invalid("the differential method compares with general text: give it with --general")
    for name, statistics in (general or {}).items():
        if set(statistics.layers) != set(target.layers) or any(
            len(statistics.layers[i].counts) != len(target.layers[i].counts) for i in target.layers
        ):
            raise _invalid(
                f"the statistics of {name!r} are of another model than the target's: collect both on one base"
            )
    if max_bytes:
        smallest = expert_bytes if isinstance(expert_bytes, int) else min(expert_bytes.values(), default=0)
        if smallest <= 0:
            raise _invalid("a cap in bytes needs the size of an expert: give --base, or cap with --max-experts")
        if max_bytes < smallest:
            raise _invalid(
                f"the budget of {max_bytes} bytes is too small for one expert, which takes {smallest}: raise --max-bytes"
            )


def _invalid(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_SELECTION_FAILED)
