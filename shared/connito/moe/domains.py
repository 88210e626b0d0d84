"""Several domains selected together: who gets an expert that more than one of them chose.

Every domain first selects on its own, by the same method and threshold. An expert that one domain chose is its own. One
that several chose is contested, and a rule that is stated in the result decides:

  share      (default) it is selected once and trained on the text of all its domains. It costs its bytes once.
  duplicate  each of its domains trains its own copy, as runs of their own would; a library then holds two variants of the
             expert, and composing them is the library's business. It costs its bytes once per domain: each domain
             gets an equal part of every budget.
  exclusive  it goes to the domain that leans on it most: the largest share of the layer's best score in that domain, ties
             to the domain named first. The others do without.

What was contested is reported in every case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from connito.errors import Invalid
from connito.moe.statistics import FloatArray
from connito.protocol.policy.choices import CONTESTED
from connito.v1 import reasons_pb2

Map = dict[int, list[int]]
Scores = Mapping[int, FloatArray]


@dataclass(frozen=True)
class Joint:
    """`maps`: what each domain got; `shared`: experts of more than one; `conflicts`: each contested one, for people."""

    maps: dict[str, Map]
    shared: Map
    conflicts: list[dict[str, Any]]


def join(maps: Mapping[str, Map], scores: Mapping[str, Scores], rule: str) -> Joint:
    """Settle what several domains chose, each for itself. Raises `Invalid` for an unknown rule."""
    if rule not in CONTESTED:
        raise Invalid(
            f"unknown rule {rule!r} for contested experts: use {', '.join(CONTESTED)}",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    settled = {name: {index: list(experts) for index, experts in found.items()} for name, found in maps.items()}
    conflicts = []
    for index in sorted({index for found in maps.values() for index in found}):
        for expert in sorted({e for found in maps.values() for e in found.get(index, [])}):
            wanting = [name for name, found in maps.items() if expert in found.get(index, [])]
            if len(wanting) < 2:
                continue
            keeping = wanting if rule != "exclusive" else [max(wanting, key=lambda d: _need(scores[d][index], expert))]
            for name in set(wanting) - set(keeping):
                settled[name][index].remove(expert)
            conflicts.append(
                {
                    "layer": index,
                    "expert": expert,
                    "scores": {name: float(scores[name][index][expert]) for name in wanting},
                    "to": keeping,
                }
            )
    return Joint(settled, shared(settled), conflicts)


def shared(maps: Mapping[str, Map]) -> Map:
    """Return the expert ids, by layer, that more than one domain has."""
    out: Map = {}
    for index in sorted({index for found in maps.values() for index in found}):
        lists = [set(found.get(index, [])) for found in maps.values()]
        twice = sorted(e for e in set().union(*lists) if sum(e in one for one in lists) > 1)
        if twice:
            out[index] = twice
    return out


def union(maps: Mapping[str, Map], scores: Scores) -> Map:
    """Return the experts that any domain has, best score first, ties by id."""
    out: Map = {}
    for index in sorted({index for found in maps.values() for index in found}):
        every = {e for found in maps.values() for e in found.get(index, [])}
        out[index] = sorted(every, key=lambda e: (-float(scores[index][e]), e))
    return out


def within(maps: Mapping[str, Map], kept: Map) -> dict[str, Map]:
    """Return restrict each domain's map to the experts in `kept`."""
    return {
        name: {index: [e for e in experts if e in set(kept.get(index, []))] for index, experts in found.items()}
        for name, found in maps.items()
    }


def _need(scores: FloatArray, expert: int) -> float:
    return float(scores[expert] / max(1e-300, float(scores.max())))
