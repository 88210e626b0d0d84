"""Dense specialists of one seed as an ensemble, and as one dense model (Branch-Train-Merge, Li et al. 2022).

The ensemble weighs the specialists' next-token probabilities by how likely each one's domain is after the tokens so far,
by Bayes' rule from their own likelihoods and a prior; the prior is a moving average of posteriors over text of the
target. With the same prior as weights, their parameters are averaged into one model.

Shapes: V specialists, n sequences, L predicted tokens each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid

if TYPE_CHECKING:
    from torch import nn

# How much of the prior a new posterior replaces (λ, section 3.2).
DECAY = 0.3


def log_likelihoods(models: Sequence[Any], ids: torch.Tensor) -> torch.Tensor:
    """Return log p of each next token under each model, [V, n, L], for `ids` int64 [n, L + 1]."""
    found = []
    with torch.no_grad():
        for model in models:
            rows = [model(input_ids=row[None, :-1], use_cache=False).logits.float().log_softmax(-1) for row in ids]
            found.append(torch.cat(rows).gather(-1, ids[:, 1:, None])[..., 0])
    return torch.stack(found).double()


def posteriors(log_p: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Return p(domain | tokens before), [V, n, L + 1], from log p [V, n, L] and a prior [V]; the last is after all tokens."""
    seen = torch.cat([torch.zeros_like(log_p[..., :1]), log_p.cumsum(-1)], dim=-1)
    return (prior.double().log()[:, None, None] + seen).softmax(dim=0)


def ensemble_nll(log_p: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Return −log Σ_v p(v | tokens before) p_v(token), [n, L]."""
    weights = posteriors(log_p, prior)[..., :-1]
    return -(weights.clamp_min(1e-300).log() + log_p).logsumexp(dim=0)


def estimate_prior(log_p: torch.Tensor) -> torch.Tensor:
    """Return the prior [V]: from even, after each sequence (1 − λ) of it and λ of the posterior on the whole sequence."""
    prior = torch.full((len(log_p),), 1 / len(log_p), dtype=torch.float64)
    for row in range(log_p.shape[1]):
        prior = (1 - DECAY) * prior + DECAY * posteriors(log_p[:, row : row + 1], prior)[:, 0, -1]
    return prior


def average(branches: Mapping[str, Any], weights: Sequence[float]) -> nn.Module:
    """Return a dense model whose every tensor is Σ_v w_v θ_v. Raises `Invalid` for models of different shapes."""
    import copy

    models = list(branches.values())
    states = [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if len(models) < 2 or any(shape != shapes[0] for shape in shapes[1:]):
        raise Invalid(f"{', '.join(branches)} cannot be averaged: give two or more branches of one seed")
    merged: nn.Module = copy.deepcopy(models[0])
    mixed = {
        name: sum(w * state[name].double() for w, state in zip(weights, states, strict=True)).to(first.dtype)
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }
    merged.load_state_dict(mixed)
    return merged
