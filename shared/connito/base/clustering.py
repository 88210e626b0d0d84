"""Routers without training: spherical k-means over the hidden states that a router will see.

In torch rather than numpy, so that it keeps to the process's thread count, and gives the same result for it.

Shapes: T tokens, H hidden size, E experts, k clusters.
"""

from __future__ import annotations

import numpy as np
import torch

from connito.errors import Invalid
from connito.v1 import reasons_pb2

# Length of h − μ after scaling: what a router's largest logits are.
ROUTER_SCALE = 8.0


def cluster_router(hidden: torch.Tensor, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return router weight [E, H] from MLP inputs [T, H], each token's cluster [T], and the mean cosine to its
    centroid.

    With C the unit centroids of (h − μ)/‖h − μ‖ and s = 8 / mean‖h − μ‖, the wanted logits s·C(h − μ) need a bias −C·μ;
    W = s·(C − (C·μ)/(μ·μ)·μᵀ) folds it into the mean direction, where hidden states hardly vary.
    """
    if len(hidden) < experts:
        raise Invalid(
            f"{len(hidden)} tokens cannot form {experts} clusters; give more text to `--data`",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    mean = hidden.double().mean(dim=0)
    centred = hidden.double() - mean
    norms = centred.norm(dim=1)
    unit = (centred / norms.clamp_min(1e-12)[:, None]).float()
    centroids, labels, cohesion = spherical_kmeans(unit, experts, np.random.default_rng(seed))
    wide = centroids.double()
    folded = torch.outer(wide @ mean / (mean @ mean), mean)
    return (ROUTER_SCALE / norms.mean() * (wide - folded)).float(), labels, cohesion


def spherical_kmeans(
    unit: torch.Tensor, k: int, rng: np.random.Generator, *, restarts: int = 2, iterations: int = 25
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return (centroids [k, H], clusters [T], mean cosine): unit centroids that maximise the mean cosine of unit
    vectors [T, H] to them (Dhillon & Modha 2001), the best of some restarts.
    """
    best: tuple[torch.Tensor, torch.Tensor, float] | None = None
    for _ in range(restarts):
        centroids = _seeds(unit, k, rng)
        labels: torch.Tensor | None = None
        for _ in range(iterations):
            cosine, assigned = (unit @ centroids.T).max(dim=1)
            if labels is not None and torch.equal(assigned, labels):
                break
            labels = assigned
            centroids = _means(unit, labels, cosine, k)
        cosine, final = (unit @ centroids.T).max(dim=1)
        if best is None or float(cosine.mean()) > best[2]:
            best = centroids, final, float(cosine.mean())
    assert best is not None
    return best


def _seeds(unit: torch.Tensor, k: int, rng: np.random.Generator) -> torch.Tensor:
    """Choose start centroids by k-means++ with 1 − cosine as the distance."""
    chosen = [int(rng.integers(len(unit)))]
    distance = (1 - unit @ unit[chosen[0]]).clamp_min(0)
    while len(chosen) < k:
        share = distance.double().numpy()
        total = share.sum()
        weights = share / total if total > 0 else np.full(len(unit), 1 / len(unit))
        chosen.append(int(rng.choice(len(unit), p=weights)))
        distance = torch.minimum(distance, (1 - unit @ unit[chosen[-1]]).clamp_min(0))
    return unit[chosen]


def _means(unit: torch.Tensor, labels: torch.Tensor, cosine: torch.Tensor, k: int) -> torch.Tensor:
    """Return normalised means [k, H]; an empty cluster restarts at the token that fits its own centroid worst."""
    member = torch.nn.functional.one_hot(labels, k).to(unit.dtype)
    sums = member.T @ unit
    misfits = iter(cosine.argsort(stable=True).tolist())
    for empty in torch.nonzero(member.sum(dim=0) == 0).flatten().tolist():
        sums[empty] = unit[next(misfits)]
    means: torch.Tensor = sums / sums.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return means
