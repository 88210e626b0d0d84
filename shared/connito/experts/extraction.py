"""The smallest set of experts that still speaks a domain, and what leaving the others out costs (EMO).

Experts are ranked in each layer by how often the domain's text is routed to them; one more a layer is kept until the
domain's loss is within a margin of the full model's. What is reported is measured on other text than what decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.errors import Invalid
from connito.experts.measure import loss
from connito.experts.prune import Keep, masked
from connito.moe.statistics import RoutingStatistics, collect
from connito.runtime.progress import tell
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


@dataclass(frozen=True)
class Extraction:
    """`loss` and `full_loss`: nats per token on held-out text. `tried`: (experts a layer, loss on the deciding text)."""

    keep: Keep
    loss: float
    full_loss: float
    kept: int
    total: int
    tried: list[tuple[int, float]]

    @property
    def cost(self) -> float:
        """Return the loss added against the full model, in nats per token; negative where the subset is better."""
        return self.loss - self.full_loss


def extract_domain(
    model: nn.Module,
    probe: npt.NDArray[Any],
    held_out: npt.NDArray[Any],
    *,
    margin: float = 0.02,
    per_layer: int = 0,
    accept_loss: bool = False,
) -> Extraction:
    """Return the smallest equal number of experts a layer (`per_layer` where given) that keeps the domain's loss in
    `margin`.

    probe, held_out: int32 [n, L + 1], no text in common. The model is left whole; `prune(model, keep)` makes it small.
    Raises `Invalid` (RETENTION_BROKEN) with the cost when the held-out loss rises by more than `margin` nats per
    token, unless `accept_loss`.
    """
    tell("counting what each expert is used for")
    order = ranking(collect(model, probe[:, :-1]))
    total = sum(map(len, order.values()))
    sizes = [per_layer] if per_layer else list(range(1, max(map(len, order.values())) + 1))
    full, tried, keep = loss(model, probe), list[tuple[int, float]](), Keep()
    for size in sizes:
        keep = {index: sorted(experts[:size]) for index, experts in order.items()}
        tell(f"trying {size} experts a layer")
        try:
            with masked(model, keep):
                tried.append((size, loss(model, probe)))
        except Invalid:  # some routers need two experts
            if size == sizes[-1]:
                raise
            continue
        if tried[-1][1] <= full + margin:
            break
    whole = loss(model, held_out)
    with masked(model, keep):
        small = loss(model, held_out)
    result = Extraction(keep, small, whole, sum(map(len, keep.values())), total, tried)
    if result.cost > margin and not accept_loss:
        raise Invalid(
            f"{result.kept} of {total} experts take the domain's loss from {whole:.4f} to {small:.4f} "
            f"({result.cost:+.4f} nats per token, more than {margin:g}): keep more of them, or accept it with --accept-loss",
            reason=reasons_pb2.REASON_RETENTION_BROKEN,
        )
    return result


def ranking(statistics: RoutingStatistics) -> Keep:
    """Return expert ids by layer, most used by the domain first, ties by id."""
    return {
        index: [int(e) for e in np.argsort(-layer.token_score, kind="stable")]
        for index, layer in statistics.layers.items()
    }
