"""Driver experts, and more weight on them as a model runs.

After domain and driver experts (Hu et al. 2026): a driver is an expert without whose gate the output changes most, of all
experts of all layers (`connito.moe.diagnostics.causal_effects`). Steering multiplies the drivers' gate weights by a
factor wherever the router chose them; the weights of a token keep their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connito.experts.measure import loss
from connito.moe.diagnostics import causal_effects
from connito.moe.layout import require_moe_layers
from connito.moe.router import choice

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

# Factors that are tried; 1 is the model as it is.
FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)
SEQUENCES = 8


@dataclass(frozen=True)
class Steered:
    """Drivers by layer, the factor that was best on the deciding text, and nats per token without and with it on other text."""

    drivers: dict[int, list[int]]
    factor: float
    full: float
    loss: float


def steer_drivers(
    model: nn.Module, text: npt.NDArray[Any], held_out: npt.NDArray[Any], *, count: int, factor: float = 0.0
) -> Steered:
    """Raise the `count` experts of the largest causal effect on `text`, by `factor` or, at 0, by the best of `FACTORS`.

    text, held_out: int32 [n, L + 1], no text in common. The model is left as it was.
    """
    drivers = find_drivers(model, text[:SEQUENCES, :-1], count)

    def under(factor: float, table: npt.NDArray[Any]) -> float:
        with raised(model, drivers, factor):
            return loss(model, table)

    best = factor or min(FACTORS, key=lambda tried: under(tried, text))
    return Steered(drivers, best, loss(model, held_out), under(best, held_out))


def find_drivers(model: nn.Module, sequences: npt.NDArray[Any], count: int) -> dict[int, list[int]]:
    """Return the `count` experts of all layers with the largest causal effect on `sequences` [n, L], by layer."""
    everyone = {index: range(layer.num_experts) for index, layer in require_moe_layers(model).items()}
    effects = causal_effects(model, everyone, sequences)
    order = sorted((-effect, index, expert) for index, own in effects.items() for expert, effect in own.items())
    drivers: dict[int, list[int]] = {}
    for _, index, expert in order[:count]:
        drivers.setdefault(index, []).append(expert)
    return {index: sorted(drivers[index]) for index in sorted(drivers)}


@contextmanager
def raised(model: nn.Module, experts: Mapping[int, Sequence[int]], factor: float) -> Iterator[nn.Module]:
    """Multiply the gate weights of `experts`, by layer, by `factor` inside the block; a token's weights keep their sum."""
    layers = require_moe_layers(model)
    with ExitStack() as stack:
        for index, chosen in experts.items() if factor != 1.0 else ():
            wanted = torch.tensor(list(chosen))

            def hook(_: nn.Module, __: Any, output: Any, wanted: torch.Tensor = wanted) -> tuple[Any, ...]:
                logits, weights, ids = choice(output)
                more = torch.where(torch.isin(ids, wanted.to(ids.device)), weights * factor, weights)
                total = more.sum(dim=-1, keepdim=True)
                scale = weights.sum(dim=-1, keepdim=True) / total.where(total != 0, torch.ones_like(total))
                return (logits, more * scale, ids, *output[3:])

            stack.callback(layers[index].router.register_forward_hook(hook).remove)
        yield model
