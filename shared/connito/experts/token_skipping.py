"""Fewer experts for a token as a model runs: those of little weight left out, or experts that choose their tokens.

NAEE (Lu et al. 2024, section 3.3) skips by gate weight. Expert Choice (Zhou et al. 2022) lets every expert take the
C = T·c/N tokens of a text that score it best, so that loads are even and a token gets as many experts as want it; which
tokens those are depends on the whole text, so it measures and does not generate.

Shapes: T tokens of a batch, N experts, c the capacity: experts per token on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from connito.errors import Invalid
from connito.experts.tape import Tape, each_layer
from connito.moe.layout import require_moe_layers
from connito.moe.router import Call, choice

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


def skip_thresholds(model: nn.Module, sequences: npt.NDArray[Any]) -> dict[int, float]:
    """Return β by layer: the median, over calibration tokens, of the second gate weight over the first (NAEE, section
    3.3).
    """

    def ratio(tape: Tape) -> float:
        ordered = tape.weights.float().sort(dim=-1, descending=True).values
        return float(np.median((ordered[:, 1] / ordered[:, 0]).cpu().numpy())) if ordered.shape[1] > 1 else 0.0

    return each_layer(model, sequences, ratio)


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
    get the weights that the family's own router gives to them alone. β = 0 skips nothing and changes no bit (NAEE, Lu et
    al. 2024, section 3.3).
    """
    count = Skipped()
    with ExitStack() as stack:
        for index, layer in require_moe_layers(model).items():
            beta = float(betas) if isinstance(betas, (int, float)) else float(betas.get(index, 0.0))

            def hook(router: nn.Module, args: Any, kwargs: Any, output: Any, beta: float = beta) -> tuple[Any, ...]:
                heavy = choice(output)[1].abs()
                # The heaviest stays, whatever β is.
                out = heavy < min(beta, 1.0) * heavy.max(dim=-1, keepdim=True).values
                count.slots += out.numel()
                count.skipped += int(out.sum())
                call = Call(router, args, output, kwargs)
                return _without(call, out.reshape(-1, out.shape[-1])) if out.any() else call.output

            stack.callback(layer.router.register_forward_hook(hook, with_kwargs=True).remove)
        yield count


@contextmanager
def experts_choose(model: nn.Module, capacity: float) -> Iterator[Skipped]:
    """Let experts choose tokens inside the block, with the scores as gate weights: softmax over the experts, never renormalised.

    Counts as skipped the share of the family's own slots that nobody took. Raises `Invalid` for a capacity that is none.
    """
    if not capacity > 0:
        raise Invalid(f"the capacity is {capacity:g}: give the number of experts a token gets on average, above 0")
    count = Skipped()
    with ExitStack() as stack:
        for layer in require_moe_layers(model).values():

            def hook(_: nn.Module, __: Any, output: Any, total: int = layer.num_experts) -> tuple[Any, ...]:
                logits, weights, ids = choice(output)
                scores = logits.reshape(-1, logits.shape[-1])[:, :total].float().softmax(-1)  # [T, N]
                size = max(1, min(len(scores), round(len(scores) * capacity / total)))
                taken = torch.zeros_like(scores).scatter_(0, scores.topk(size, dim=0).indices, 1.0)
                count.slots += ids.numel()
                count.skipped += max(0, ids.numel() - int(taken.sum()))
                best = (scores * taken).topk(int(taken.sum(-1).max()), dim=-1)
                shape = (*ids.shape[:-1], best.values.shape[-1])
                return (
                    logits,
                    best.values.to(weights.dtype).view(shape),
                    best.indices.to(ids.dtype).view(shape),
                    *output[3:],
                )

            stack.callback(layer.router.register_forward_hook(hook).remove)
        yield count


def _without(call: Call, out: torch.Tensor) -> tuple[Any, ...]:
    """Return what the router reports when a token does without its slots `out`, bool [T, k].

    Tokens are asked for together that keep equally many.
    """
    logits, weights, ids = choice(call.output)
    slots, kept = out.shape[-1], (~out).sum(-1)
    chosen = ids.reshape(-1, slots)
    allowed = torch.zeros(len(out), call.classes, dtype=torch.bool, device=out.device).scatter_(1, chosen, ~out)
    parts = [part.clone() for part in (weights.reshape(-1, slots), chosen, *call.output[3:])]
    for number in set(kept.tolist()) - {slots}:
        again = call.fewer(number, allowed)
        _, some_weights, some_ids = choice(again)
        rows = kept == number
        # A slot without weight adds nothing wherever it goes; not every family knows an id for nowhere.
        parts[0][rows] = F.pad(some_weights.reshape(-1, number), (0, slots - number))[rows]
        parts[1][rows] = torch.cat([some_ids.reshape(-1, number), chosen[:, : slots - number]], dim=-1)[rows]
        for place, extra in enumerate(again[3:], 2):
            parts[place].view(len(out), -1)[rows] = extra.reshape(len(out), -1)[rows]
    return (logits, parts[0].view(weights.shape), parts[1].view(ids.shape), *parts[2:])
