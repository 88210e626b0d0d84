"""Search for the experts that a layer keeps, where there are too many subsets to try (MoE-I², Yang et al. 2024, section 3.1).

Layer by layer, a genetic search looks for the sets whose layer output is nearest to the full layer's, and keeps the best
few. Of the best few of neighbouring layers every combination is then tried on what the layers make together: the
published "block-wise KT-reception field", K candidates a layer, T layers a block.

Shapes: N experts of a layer, n of them kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from math import comb
from typing import TYPE_CHECKING, Any

import torch

from connito.experts.prune import Keep, masked
from connito.moe.layout import MoELayer, require_moe_layers

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

Kept = tuple[int, ...]
# As many subsets of a layer's experts are tried one by one.
EXACT_SUBSETS = 3000
POPULATION, GENERATIONS, MUTATION = 32, 24, 0.3
# K and T.
CANDIDATES, BLOCK = 3, 3


def fittest(total: int, count: int, error: Callable[[list[int]], float], *, seed: int = 0) -> list[Kept]:
    """Return the `CANDIDATES` sets of `count` of `total` experts with the least `error` that were found, best first.

    Few sets are all tried. Otherwise parents are drawn from the better half, a child keeps what both have and draws the
    rest from what one of them has, and some exchange an expert at random. Deterministic for a seed.
    """
    seen: dict[Kept, float] = {}

    def known(keep: Kept) -> float:
        if keep not in seen:
            seen[keep] = error(list(keep))
        return seen[keep]

    if comb(total, count) <= EXACT_SUBSETS:
        for keep in combinations(range(total), count):
            known(keep)
        return sorted(seen, key=lambda keep: (seen[keep], keep))[:CANDIDATES]
    rng = random.Random(seed)
    population = [tuple(sorted(rng.sample(range(total), count))) for _ in range(POPULATION)]
    for _ in range(GENERATIONS):
        parents = sorted(set(population), key=lambda keep: (known(keep), keep))[: POPULATION // 2]
        children = [
            _child(rng.choice(parents), rng.choice(parents), total, rng) for _ in range(POPULATION - len(parents))
        ]
        population = parents + children
    return sorted({*population}, key=lambda keep: (known(keep), keep))[:CANDIDATES]


def _child(one: Kept, other: Kept, total: int, rng: random.Random) -> Kept:
    both, either = set(one) & set(other), sorted(set(one) ^ set(other))
    keep = both | set(rng.sample(either, len(one) - len(both)))
    if len(keep) < total and rng.random() < MUTATION:
        keep.remove(rng.choice(sorted(keep)))
        keep.add(rng.choice([expert for expert in range(total) if expert not in keep]))
    return tuple(sorted(keep))


def receptive(model: nn.Module, sequences: npt.NDArray[Any], candidates: Mapping[int, Sequence[Kept]]) -> Keep:
    """Return, block by block of `BLOCK` layers, the combination of candidates whose last layer's output is nearest to the
    full model's on `sequences` int32 [n, L]; layers below are already cut.
    """
    layers, chosen = require_moe_layers(model), Keep()
    order = sorted(candidates)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        wanted = _after(model, layers[block[-1]], sequences)
        best, least = Keep(), float("inf")
        for sets in product(*(candidates[index] for index in block)):
            keep = {index: list(kept) for index, kept in zip(block, sets, strict=True)}
            with masked(model, {**chosen, **keep}):
                error = float((_after(model, layers[block[-1]], sequences) - wanted).norm())
            if error < least:
                best, least = keep, error
        chosen |= best
    return chosen


def _after(model: Any, layer: MoELayer, sequences: npt.NDArray[Any]) -> torch.Tensor:
    """Return the hidden states behind the decoder layer that `layer` is in."""
    stem, _, rest = layer.experts_name.rpartition("layers.")
    decoder = model.get_submodule(f"{stem}layers.{rest.split('.')[0]}")
    seen: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    body: Any = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    try:
        with torch.no_grad():
            ids = torch.from_numpy(sequences.astype("int64")).to(next(model.parameters()).device)
            body(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0].double()
