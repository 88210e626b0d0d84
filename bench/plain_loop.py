"""ESFT as a script on transformers does it: the whole model in memory, each selected expert a parameter of its own, the
family's loss over all logits, torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import nn


class SingleExperts(torch.nn.Module):
    """A bank of experts as a list of matrices, of which the selected ones can be trained."""

    def __init__(self, bank: Any, trained: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.act_fn = bank.act_fn
        pairs = zip(bank.gate_up_proj.detach(), bank.down_proj.detach(), strict=True)
        self.experts = torch.nn.ParameterList()
        for expert, matrices in enumerate(pairs):
            wanted = expert in set(trained)
            for matrix in matrices:
                copy = matrix.to(dtype if wanted else matrix.dtype, copy=True)
                self.experts.append(torch.nn.Parameter(copy, requires_grad=wanted))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return Σ_k w_k · expert_k(x) for x [T, hidden], visiting every expert that some token chose."""
        out = torch.zeros_like(x)
        for expert in torch.unique(ids).tolist():
            token, slot = torch.where(ids == expert)
            gate, up = F.linear(x[token], self.experts[2 * expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.experts[2 * expert + 1])
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out


def singled(model: nn.Module, targets: Mapping[int, Sequence[int]], dtype: torch.dtype) -> nn.Module:
    """Return the model with experts stored singly; the selected ones are trained, in `dtype`."""
    from connito.moe.layout import require_moe_layers

    model.requires_grad_(False)
    for index, layer in require_moe_layers(model).items():
        parent = model.get_submodule(layer.experts_name.rpartition(".")[0])
        parent.experts = SingleExperts(layer.experts, targets.get(index, ()), dtype)
    return model


class PlainLoop:
    """One step after another: forward pass with labels, backward pass, clipping, AdamW."""

    def __init__(self, model: Any, rate: float, *, autocast: bool) -> None:
        self.model, self._autocast = model, autocast
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self._trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, ids: torch.Tensor) -> None:
        """Make one step on ids [B, L + 1]; transformers shifts the labels itself."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Return the bytes that AdamW keeps."""
        return sum(
            part.numel() * part.element_size()
            for state in self.optimiser.state.values()
            for part in state.values()
            if isinstance(part, torch.Tensor) and part.dim()
        )
