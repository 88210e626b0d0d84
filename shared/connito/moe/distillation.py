"""Router distillation (DES-MoE): routers that learn beside the shipped ones while the experts adapt, and are thrown away.

DES-MoE lets the router move during adaptation, holds it to the pre-trained router by a Kullback–Leibler term, and trains
in phases that mask who may move. Here the shipped router never moves, because every expert of the library relies on it. So
each adapted layer gets a *shadow*: a linear correction Δ(x) = x·Dᵀ to the router's scores, zero at the start, that shifts the
gate weights among the experts that the shipped router chose. Phases mask it: in the first share of a cycle's steps shadow
and experts learn together; after that the shadow is off and the experts settle under the shipped router, so that what
is uploaded was trained as it will be used.

Shapes: T tokens, H hidden size, N experts, k chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connito.moe.resident import adapted_layers
from connito.moe.router import choice

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Distillation:
    """λ, the weight of KL(shipped router ‖ shadow), and the share of a cycle's steps in which the shadow takes part."""

    weight: float
    share: float = 0.5


class ShadowRouters:
    """One shadow for the router of every adapted layer of a compressed model. `close` removes them."""

    def __init__(self, model: nn.Module, settings: Distillation) -> None:
        self._settings, self._on = settings, False
        # By layer: one that runs again for its backward pass adds nothing to the next part's sum.
        self._divergence: dict[int, torch.Tensor] = {}
        self.shift: dict[int, torch.Tensor] = {}
        self._hooks = []
        for index, (experts, router) in adapted_layers(model).items():
            device = next(router.parameters()).device
            shape = experts.connito_residents.num_experts, _hidden_size(router, model)
            self.shift[index] = torch.zeros(shape, device=device, requires_grad=True)
            self._hooks.append(router.register_forward_hook(self._hook(index), prepend=True))
        self._optimiser = torch.optim.AdamW(list(self.shift.values()), lr=1.0, weight_decay=0.0, betas=(0.9, 0.95))

    def begin(self, step: int, steps: int) -> None:
        """Turn the loss on or off for local step `step` of `steps`, by phase."""
        self._on = step < self._settings.share * steps
        self._divergence.clear()
        for shift in self.shift.values():
            shift.grad = None

    def loss(self) -> torch.Tensor:
        """Return λ · mean over layers and tokens of KL(shipped ‖ shadow), of the forward pass before; 0 when off."""
        if not self._divergence:
            return torch.zeros(())
        total = torch.stack([*self._divergence.values()]).mean() * self._settings.weight
        self._divergence.clear()
        return total

    def step(self, rate: float) -> None:
        """Apply one AdamW step to the shadow routers."""
        if not self._on:
            return
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()

    def close(self) -> None:
        """Take the shadows off the model."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not self._on:
                return output
            logits, weights, ids = choice(output)
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            shift = x @ self.shift[index].T  # [T, N]
            plain = logits.detach().reshape(-1, logits.shape[-1]).float().log_softmax(-1)
            moved = (plain + shift).log_softmax(-1)
            self._divergence[index] = (plain.exp() * (plain - moved)).sum(-1).mean()
            return (output[0], shifted(weights, shift.reshape(*ids.shape[:-1], -1), ids), *output[2:])

        return hook


def shifted(weights: torch.Tensor, shift: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the gate weights [T, k] after the chosen experts' scores moved by `shift` [T, N]: w·e^Δ, rescaled to the same sum.

    For softmax gates this is what the softmax over the chosen gives; a zero shift changes nothing.
    """
    moved = weights * shift.gather(-1, ids.long()).exp().to(weights.dtype)
    total = moved.sum(dim=-1, keepdim=True)
    return moved * (weights.sum(dim=-1, keepdim=True) / total.where(total != 0, torch.ones_like(total)))


def _hidden_size(router: nn.Module, model: Any) -> int:
    weight = getattr(router, "weight", None)
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[1])
    return int(model.config.get_text_config().hidden_size)
