"""Skip the experts that a token can do without, by the weight that its router gave them (NAEE, Lu et al. 2024, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connito.experts.prune import record
from connito.moe.layout import require_moe_layers
from connito.moe.router import choice

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


def skip_thresholds(model: nn.Module, sequences: npt.NDArray[Any]) -> dict[int, float]:
    """Return β by layer: the median, over calibration tokens, of the second gate weight over the first (NAEE, section
    3.3).
    """
    found = {}
    for index, tape in record(model, sequences).items():
        ordered = tape.weights.float().sort(dim=-1, descending=True).values
        found[index] = float((ordered[:, 1] / ordered[:, 0]).median()) if ordered.shape[1] > 1 else 0.0
    return found


@dataclass
class Skipped:
    """Counter of the slots that were left out so far."""

    slots: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        """Return the share of slots that were skipped."""
        return self.skipped / max(1, self.slots)


@contextmanager
def skipping(model: nn.Module, betas: Mapping[int, float] | float) -> Iterator[Skipped]:
    """Make a token leave out, inside the block, every expert whose gate weight is below β times its largest; the rest
    are renormalised where the family normalises. β = 0 skips nothing and changes no bit (NAEE, Lu et al. 2024, section
    3.3).
    """
    count = Skipped()
    with ExitStack() as stack:
        for index, layer in require_moe_layers(model).items():
            beta = float(betas) if isinstance(betas, (int, float)) else float(betas.get(index, 0.0))

            def hook(
                router: Any, _: Any, output: Any, beta: float = beta, total: int = layer.num_experts
            ) -> tuple[Any, ...]:
                logits, weights, ids = choice(output)
                out = weights < beta * weights.max(dim=-1, keepdim=True).values
                count.slots += out.numel()
                count.skipped += int(out.sum())
                lighter = weights.masked_fill(out, 0)
                if getattr(router, "norm_topk_prob", False):
                    scaled = lighter * (weights.sum(-1, keepdim=True) / lighter.sum(-1, keepdim=True))
                    lighter = torch.where(out.any(dim=-1, keepdim=True), scaled, lighter)
                return (logits, lighter, ids.masked_fill(out, total), *output[3:])

            stack.callback(layer.router.register_forward_hook(hook).remove)
        yield count
