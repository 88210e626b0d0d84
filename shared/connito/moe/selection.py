"""Selection of the experts that a domain uses, from routing statistics; no model is needed.

Methods:
  esft-token    shortest prefix by descending token score whose sum reaches p (ESFT, Wang et al. 2024)
  esft-gate     the same with gate scores; scores of both are rounded and summed as the published code does it
  differential  token score of the domain minus that of general text; the prefix covers p of the positive part
  des-moe       every expert whose score reaches p of the layer's best (DES-MoE map); with earlier statistics, the score is
                their running mean A ← 0.9·A + 0.1·r
Several domains: each by itself, then `connito.moe.domains`. Caps: `connito.moe.budget`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from connito.errors import Invalid
from connito.moe.budget import Budget
from connito.moe.diagnostics import diagnose
from connito.moe.domains import Joint, join, shared, union, within
from connito.moe.statistics import FloatArray, RoutingStatistics, merge_all
from connito.protocol.policy.choices import CONTESTED_RULE, METHOD, METHODS
from connito.v1 import reasons_pb2

# The published sets come from scores that were written down with this many decimals.
DECIMALS = 4


@dataclass(frozen=True)
class Selection:
    """The selection map. `layers`: expert ids best first; `scores`: one score per expert of the layer.

    domains: what each domain got where several were selected together, shared: what more than one of them has.
    routers, probes: digests of the routers that chose and of the text they read.
    """

    method: str
    threshold: float
    layers: dict[int, list[int]]
    scores: dict[int, list[float]]
    total: int
    # Share of the domain's routing decisions that fall on selected experts, mean over layers.
    mass: float
    helpers: dict[int, list[int]] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    domains: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    shared: dict[int, list[int]] = field(default_factory=dict)
    routers: str = ""
    probes: tuple[str, ...] = ()

    @property
    def selected(self) -> int:
        """Return the number of experts over all layers."""
        return sum(len(experts) for experts in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document that `connito select --json` prints."""
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
            out["helpers"] = _named(self.helpers)
        if self.domains:
            out["domains"] = {name: _named(layers) for name, layers in self.domains.items()}
            out["shared"] = _named(self.shared)
        if self.routers:
            out["routers"] = self.routers
        if self.probes:
            out["probes"] = list(self.probes)
        if self.diagnostics:
            out["diagnostics"] = self.diagnostics
        return out

    def to_bytes(self) -> bytes:
        """Return the same as reproducible JSON bytes, for the store."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Selection:
        """Return the inverse of `to_json`."""

        def by_layer(found: Mapping[str, Any]) -> dict[int, list[Any]]:
            return {int(k): list(v) for k, v in found.items()}

        return cls(
            data["method"],
            float(data["threshold"]),
            by_layer(data["layers"]),
            by_layer(data["scores"]),
            int(data["total"]),
            float(data["mass"]),
            by_layer(data.get("helpers", {})),
            dict(data.get("diagnostics", {})),
            {name: by_layer(layers) for name, layers in data.get("domains", {}).items()},
            by_layer(data.get("shared", {})),
            data.get("routers", ""),
            tuple(data.get("probes", ())),
        )


def _named(layers: Mapping[int, list[int]]) -> dict[str, list[int]]:
    return {str(layer): experts for layer, experts in layers.items()}


def select_experts(
    target: RoutingStatistics,
    method: str = METHOD,
    threshold: float | None = None,
    *,
    general: Mapping[str, RoutingStatistics] | None = None,
    beside: Mapping[str, RoutingStatistics] | None = None,
    contested: str = CONTESTED_RULE,
    earlier: Sequence[RoutingStatistics] = (),
    budget: Budget | None = None,
    helpers_per_layer: int = 0,
    domain: str = "target",
) -> Selection:
    """Return the experts that `target`'s text uses.

    threshold: p of the method, in (0, 1]; None takes the method's own. general: statistics of other domains by name,
    needed by `differential`, used by every method for the diagnostics. beside: domains to select together with
    `domain`, by name; `contested` is the rule for experts that several choose (`connito.moe.domains`). earlier: older
    statistics of the target, oldest first, which `des-moe` takes into its running mean. budget: caps
    (`connito.moe.budget`); None is none. helpers_per_layer: frozen experts to keep beside the targets, most used first.

    Raises `Invalid` (SELECTION_FAILED) with cause and remedy.
    """
    p = METHODS.get(method, 0.0) if threshold is None else threshold
    together = {domain: target, **(beside or {})}
    _check(together, method, p, general, earlier)
    budget = budget or Budget()
    budget.check()
    scores = {
        name: {
            index: _scores(found, index, method, general, earlier if name == domain else ())
            for index in sorted(found.layers)
        }
        for name, found in together.items()
    }
    best = {index: np.max([found[index] for found in scores.values()], axis=0) for index in scores[domain]}
    alone = {name: {index: _prefix(score, method, p) for index, score in by.items()} for name, by in scores.items()}
    joint = join(alone, scores, contested)
    maps, layers = _capped(joint, scores, best, contested, budget)
    usage = {
        index: np.mean([found.layers[index].token_score for found in together.values()], axis=0) for index in layers
    }
    everyone = target if len(together) == 1 else merge_all(together.values())
    return Selection(
        method,
        float(p),
        layers,
        {index: [float(x) for x in score] for index, score in best.items()},
        sum(len(score) for score in best.values()),
        float(np.mean([usage[index][experts].sum() for index, experts in layers.items()])),
        _helpers(usage, layers, helpers_per_layer),
        diagnose({**together, **(general or {})}, layers, domain)
        | ({"contested": contested, "conflicts": joint.conflicts} if len(together) > 1 else {}),
        maps if len(together) > 1 else {},
        shared(maps),
        everyone.routers,
        everyone.probes,
    )


def _capped(
    joint: Joint, scores: Mapping[str, dict[int, FloatArray]], best: dict[int, FloatArray], rule: str, budget: Budget
) -> tuple[dict[str, dict[int, list[int]]], dict[int, list[int]]]:
    """Return (each domain's map, all together) within the budget, without empty layers."""
    maps = joint.maps
    if budget and rule == "duplicate" and len(maps) > 1:
        part = replace(budget, experts=budget.experts // len(maps), size=budget.size // len(maps))
        if (budget.experts and not part.experts) or (budget.size and not part.size):
            raise _invalid(
                f"the budget shared by {len(maps)} domains leaves nothing for each: raise it, or share experts"
            )
        part.check()
        maps = {name: part.fit(found, scores[name]) for name, found in maps.items()}
    elif budget:
        maps = within(maps, budget.fit(union(maps, best), best))
    maps = {name: {index: experts for index, experts in found.items() if experts} for name, found in maps.items()}
    layers = union(maps, best)
    if not layers:
        raise _invalid(
            "no expert scores above zero: the target text routes exactly as the general text does; use esft-token"
        )
    return maps, layers


def choose_helpers(target: RoutingStatistics, layers: Mapping[int, list[int]], count: int) -> dict[int, list[int]]:
    """Return the `count` experts per layer that the domain uses most after the selected ones, most used first."""
    return _helpers({index: target.layers[index].token_score for index in layers}, layers, count)


def _helpers(usage: Mapping[int, FloatArray], layers: Mapping[int, list[int]], count: int) -> dict[int, list[int]]:
    if count <= 0:
        return {}
    return {
        index: [e for e in _descending(usage[index]) if e not in set(experts)][:count]
        for index, experts in layers.items()
    }


def ema(previous: FloatArray | None, current: FloatArray, decay: float = 0.9) -> FloatArray:
    """Return A ← decay·A + (1 − decay)·current, the running activation map of DES-MoE; the first observation starts
    it.
    """
    return current if previous is None else np.asarray(decay * previous + (1 - decay) * current)


def _scores(
    target: RoutingStatistics,
    index: int,
    method: str,
    general: Mapping[str, RoutingStatistics] | None,
    earlier: Sequence[RoutingStatistics],
) -> FloatArray:
    layer = target.layers[index]
    if method == "esft-token":
        return np.round(layer.token_score, DECIMALS)
    if method == "esft-gate":
        return np.round(layer.gate_score, DECIMALS)
    if method == "differential":
        assert general
        others = np.mean([statistics.layers[index].token_score for statistics in general.values()], axis=0)
        return np.asarray(layer.token_score - others)
    running: FloatArray | None = None
    for statistics in (*earlier, target):
        running = ema(running, statistics.layers[index].token_score)
    assert running is not None
    return running


def _prefix(scores: FloatArray, method: str, p: float) -> list[int]:
    """Return the layer's experts, best first; equal scores by ascending id."""
    order = _descending(scores)
    if method == "des-moe":
        return [e for e in order if scores[e] >= p * scores[order[0]] and scores[e] > 0]
    if method == "differential":
        order = [e for e in order if scores[e] > 0]
        p *= float(scores[order].sum())
        p -= 1e-9
    chosen: list[int] = []
    reached = 0.0
    for expert in order:
        if chosen and reached >= p:
            break
        if scores[expert] <= 0:
            break
        chosen.append(expert)
        reached += float(scores[expert])
    return chosen


def _descending(scores: FloatArray) -> list[int]:
    return [int(e) for e in np.argsort(-scores, kind="stable")]


def _check(
    together: Mapping[str, RoutingStatistics],
    method: str,
    p: float,
    general: Mapping[str, RoutingStatistics] | None,
    earlier: Sequence[RoutingStatistics],
) -> None:
    if method not in METHODS:
        raise _invalid(f"unknown selection method {method!r}: use {', '.join(METHODS)}")
    if not 0 < p <= 1:
        raise _invalid(f"the threshold is {p}, but it is a share: give a number above 0 and at most 1")
    if method == "differential" and not general:
        raise _invalid("the differential method compares with general text: give it with --general")
    if earlier and method != "des-moe":
        raise _invalid("only des-moe keeps a running mean over earlier statistics: leave them out, or merge them")
    first = next(iter(together.values()))
    others = {**together, **(general or {}), **{f"earlier {n + 1}": part for n, part in enumerate(earlier)}}
    for name, statistics in others.items():
        if not statistics.layers:
            raise _invalid(
                "the statistics hold no MoE layer: the model is dense; turn it into an MoE with `connito base build`"
            )
        if statistics.tokens == 0:
            raise _invalid("the probe is empty: no token was routed; give text of the target domain")
        same = set(statistics.layers) == set(first.layers) and all(
            len(statistics.layers[i].counts) == len(first.layers[i].counts) for i in first.layers
        )
        if not same or (first.routers and statistics.routers and first.routers != statistics.routers):
            raise _invalid(
                f"the statistics of {name!r} are of another model than the target's: collect both on one base"
            )


def _invalid(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_SELECTION_FAILED)
