"""A miner's own routers, which learn beside the shipped ones while its experts adapt (FFT-MoE, Hu et al. 2025).

In FFT-MoE each client trains a gate of its own and sends a token to as many experts as its means allow, while experts alone
are merged; a loss keeps the client's experts in even use, the more the less evenly they are used. Here the shipped router
never moves, because every expert of the library relies on it. So each adapted layer gets a correction Δ = x·Dᵀ to the shipped
router's scores, zero at the start, and the family's own router chooses by the corrected scores, at the miner's number of
experts a token. KL(shipped ‖ own) holds it near. In the first share of a cycle's steps own routers and experts learn
together; after that the shipped router is back, so that what is uploaded was trained as it will be used. D stays with the
miner from cycle to cycle.

Weighing the balance by how uneven the use is, 1 − H(f) / ln N, is our reading of the paper's "heterogeneity-aware".

Shapes: T tokens, H hidden size, N experts, k chosen per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from connito.moe.resident import adapted_layers
from connito.moe.router import Call, choice, linear_map, scores_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Personal:
    """λ, the weight of KL(shipped ‖ own); the share of a cycle's steps in which the own one chooses; the weight of balance."""

    weight: float
    share: float = 0.5
    balance: float = 0.01


class PersonalRouters:
    """An own router for every adapted layer of a compressed model. `close` gives the shipped ones back for good."""

    def __init__(self, model: nn.Module, settings: Personal, start: Mapping[str, torch.Tensor] | None = None) -> None:
        """Begin with the corrections of `start`, [N, H] by layer, where there are any that fit."""
        self._settings, self._on, self.thin = settings, False, dict[int, int]()
        # By layer: one that runs again for its backward pass adds nothing to the next part's sum.
        self._terms: dict[int, torch.Tensor] = {}
        self.shift: dict[int, torch.Tensor] = {}
        self._layers, self._hooks = adapted_layers(model), []
        for index, (experts, router) in self._layers.items():
            weight, _ = linear_map(router)
            before = (start or {}).get(str(index))
            if before is None or before.shape != weight.shape:
                before = torch.zeros(weight.shape)
            self.shift[index] = before.to(weight.device, torch.float32, copy=True).requires_grad_(True)
            self.thin[index] = experts.connito_reroute.top_k
            self._hooks.append(router.register_forward_hook(self._hook(index), prepend=True, with_kwargs=True))
        self._optimiser = torch.optim.AdamW(list(self.shift.values()), lr=1.0, weight_decay=0.0, betas=(0.9, 0.95))

    def begin(self, step: int, steps: int) -> None:
        """Let own or shipped routers choose in local step `step` of `steps`, by phase."""
        self._choose(step < self._settings.share * steps)
        self._terms.clear()
        for shift in self.shift.values():
            shift.grad = None

    def loss(self) -> torch.Tensor:
        """Return λ · KL(shipped ‖ own) plus the balance, means over layers, of the forward pass before; 0 when off."""
        if not self._terms:
            return torch.zeros(())
        total = torch.stack([*self._terms.values()]).mean()
        self._terms.clear()
        return total

    def step(self, rate: float) -> None:
        """Apply one AdamW step to the corrections."""
        if not self._on:
            return
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()

    def close(self) -> None:
        """Take the own routers off the model."""
        self._choose(False)
        for hook in self._hooks:
            hook.remove()

    def save(self, path: Path) -> None:
        """Keep the corrections for the next cycle."""
        from safetensors.torch import save_file

        save_file({str(index): shift.detach().cpu().contiguous() for index, shift in self.shift.items()}, path)

    def _choose(self, own: bool) -> None:
        self._on = own
        for index, (experts, _) in self._layers.items():
            # The own router takes as many experts as the miner does; what comes after it finds nothing left to thin.
            experts.connito_reroute.top_k = 0 if own else self.thin[index]

    def _hook(self, index: int) -> Any:
        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            if not self._on:
                return output
            tokens = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            shipped = scores_of(router, tokens).detach()
            own = shipped + tokens @ self.shift[index].T
            again = Call(router, args, output, kwargs).scored(own, self.thin[index])
            held, spread = distance(shipped, own), balance(own, choice(again)[2])
            self._terms[index] = self._settings.weight * held + self._settings.balance * spread
            return again

        return hook


def distance(shipped: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(shipped) ‖ softmax(own)), the mean over tokens, [], of scores [T, N]."""
    return F.kl_div(own.log_softmax(-1), shipped.detach().log_softmax(-1), reduction="batchmean", log_target=True)


def balance(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return (1 − H(f) / ln N) · N · Σ f·P, []: f the shares of slots `ids` [T, k] by expert, P the mean softmax of scores."""
    experts = scores.shape[-1]
    used = torch.bincount(ids.flatten(), minlength=experts)[:experts].float() / max(1, ids.numel())
    uneven = 1 - float(torch.special.entr(used).sum()) / math.log(max(2, experts))
    return uneven * experts * (used * scores.softmax(-1).mean(dim=0)).sum()
