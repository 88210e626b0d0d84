"""Merging states that are in memory as a run would merge files, by any of its policies and by some of the literature's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from connito.data.pseudo_gradients import expert_grams, gram_matrix
from connito.moe.training import BETAS
from connito.protocol.merging.aggregators import (
    COUNT_UTILITIES,
    aggregate,
    needs_grams,
    plan,
    plan_by_expert,
    step_tensor,
)
from connito.protocol.merging.by_expert import Use, of_equal_mass
from connito.protocol.policy.law import DEFAULTS

WHOLE = "whole"


@dataclass(frozen=True)
class Merge:
    """A policy of merging. `weighting`: whole, tokens, capped or fisher; `server`: nesterov or adam (FedAdam)."""

    aggregator: str
    weighting: str
    rate: float
    momentum: float
    server: str = "nesterov"

    @classmethod
    def default(cls) -> Merge:
        """Return what a run gets whose policy says nothing."""
        policy = DEFAULTS.merging
        weighting = getattr(policy, "weighting", WHOLE) or WHOLE
        return cls(policy.aggregator, weighting, policy.outer_learning_rate, policy.outer_momentum)

    @property
    def counts_utilities(self) -> bool:
        """Return whether utilities decide anything."""
        return self.aggregator in COUNT_UTILITIES


@dataclass(frozen=True)
class StateDeltas:
    """Pseudo-gradients θ − θ_i of states that are in memory."""

    theta: dict[str, Any]
    states: Sequence[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Return tensor names, sorted."""
        return sorted(self.theta)

    @property
    def count(self) -> int:
        """Return the number of submissions."""
        return len(self.states)

    def load(self, index: int, name: str) -> Any:
        """Return δ of one tensor of one submission."""
        return self.theta[name] - self.states[index][name].numpy()


def merged(
    how: Merge,
    theta: dict[str, Any],
    outer: Any,
    states: Sequence[dict[str, Any]],
    utilities: Sequence[float],
    routed: Sequence[dict[int, list[int]]] = (),
    moments: Sequence[Any] = (),
    use: Use = MappingProxyType({}),
) -> tuple[dict[str, Any], Any]:
    """Return the next state and what the outer step keeps. routed: tokens by layer and expert, of each miner;
    use: the same of the target's probe.
    """
    deltas, still = StateDeltas(theta, states), [0] * len(states)
    if how.weighting == WHOLE:
        made = plan(how.aggregator, utilities, still, gram_matrix(deltas))
    else:
        counts = _weights(how.weighting, theta, routed, moments)
        grams = expert_grams(deltas) if needs_grams(how.aggregator) else None
        made = plan_by_expert(how.aggregator, utilities, still, counts, grams, use)
    stepped, kept = {}, {}
    for name in deltas.names:
        before = None if outer is None else outer[name]
        if how.server == "adam":
            stepped[name], kept[name] = _adam(theta[name], aggregate(made, deltas, name), before, how.rate)
        else:
            stepped[name], kept[name] = step_tensor(made, deltas, name, theta[name], before, how.rate, how.momentum)
    return stepped, kept


def _weights(kind: str, theta: Any, routed: Sequence[dict[int, list[int]]], moments: Sequence[Any]) -> Any:
    if kind == "fisher":
        return _fisher(theta, moments)
    counts = {layer: np.array([of[layer] for of in routed]) for layer in routed[0]}
    return of_equal_mass(counts) if kind == "capped" else counts


def _fisher(theta: Any, moments: Sequence[Any]) -> dict[int, Any]:
    """Return √v of each expert, its second moment averaged over its rows, by layer: [n, S]."""
    found: dict[int, Any] = {}
    for name, rows in theta.items():
        layer = int(name.split(".")[1])
        means = [of.second[name].read(0, rows.size).view(len(rows), -1).mean(dim=1).numpy() for of in moments]
        found[layer] = found.get(layer, 0.0) + np.stack(means)
    return {layer: np.sqrt(values.astype(np.float64)) for layer, values in found.items()}


def _adam(theta: Any, delta: Any, before: Any, rate: float) -> tuple[Any, Any]:
    """Return FedAdam's step (Reddi et al., "Adaptive Federated Optimization", 2021, algorithm 2)."""
    first, second = (np.zeros_like(delta), np.zeros_like(delta)) if before is None else before
    first, second = 0.9 * first + 0.1 * delta, 0.99 * second + 0.01 * delta**2
    return (theta - rate * first / (np.sqrt(second) + 1e-3)).astype(np.float32), (first, second)


MOMENTS, BETA1 = DEFAULTS.training.moments, DEFAULTS.training.beta1


@dataclass(frozen=True)
class Arm:
    """A way to work and to merge. `rate` multiplies a miner's learning rate. `judged`: by a run's rules what does not lower the
    loss is not merged, and a merge that raises it gives way to the best submission; `by_expert`: each expert counts in it as in
    the merge. `gainless`: the merge with what gained nothing alone is tried beside the one without, and the better one stands.
    `margin`: by how much the gate lets the target's loss rise where that may be chance.
    """

    merge: Merge
    work: str = "adamw"
    moments: str = MOMENTS
    beta1: float = BETA1
    rate: float = 1.0
    judged: bool = False
    by_expert: bool = True
    gainless: bool = False
    margin: float = DEFAULTS.merging.gate_target_margin


DEFAULT = Merge.default()
PLAIN = replace(DEFAULT, aggregator="mean", weighting=WHOLE)
ARMS = {
    "default": Arm(DEFAULT, judged=True, gainless=True),
    "default, strict gate": Arm(DEFAULT, judged=True, gainless=True, margin=0.0),
    "default, gainers alone": Arm(DEFAULT, judged=True, margin=0.0),
    "default, Muon": Arm(DEFAULT, work="muon", judged=True, gainless=True, rate=4.0),
    "default, unjudged": Arm(DEFAULT, by_expert=False),
    "default, judged whole": Arm(DEFAULT, judged=True, by_expert=False, margin=0.0),
    "whole, mean": Arm(PLAIN),
    "whole, utility": Arm(replace(PLAIN, aggregator="utility-mean")),
    "tokens, utility": Arm(replace(DEFAULT, aggregator="utility-mean", weighting="tokens")),
    "capped tokens, mean": Arm(replace(DEFAULT, aggregator="mean", weighting="capped")),
    "Fisher, mean": Arm(replace(DEFAULT, aggregator="mean", weighting="fisher")),
    "tokens, geometric median": Arm(replace(DEFAULT, aggregator="geometric-median", weighting="tokens")),
    "tokens, trimmed mean": Arm(replace(DEFAULT, aggregator="trimmed-mean", weighting="tokens")),
    "tokens, norm-clipped": Arm(replace(DEFAULT, aggregator="norm-clipped-mean", weighting="tokens")),
    "tokens, no outer momentum": Arm(replace(DEFAULT, aggregator="mean", weighting="tokens", rate=1.0, momentum=0.0)),
    "FedAvg": Arm(replace(PLAIN, rate=1.0, momentum=0.0)),
    "FedProx": Arm(replace(PLAIN, rate=1.0, momentum=0.0), work="fedprox"),
    # Rates and strengths that kept most on pilot seed 901, both ways of data together, of those in the lab notes.
    "SCAFFOLD": Arm(replace(PLAIN, rate=1.0, momentum=0.0), work="scaffold", rate=0.05),
    "FedAdam": Arm(replace(PLAIN, server="adam", rate=6e-2)),
    "MuLoCo": Arm(PLAIN, work="muon", rate=4.0),
    "DiLoCo": Arm(PLAIN, moments="kept", beta1=BETAS[0], rate=0.5),
}
