"""Branch-Attend-Mix (Zhang et al. 2024): specialists' attention becomes experts as their MLPs do.

As BTX joins branches, their MLPs are the experts of an MoE and everything else is their mean; but each layer's attention is
a soft mixture of all branches' own, y = Σ_i softmax(R·x)_i · Attention_i(x), with all of their parameters, or with keys and
values that all share, their mean. Routers of attention begin even, and the whole model is trained.

Layers run attention and MLP one after the other, as the branches do; the paper's branches run them side by side. What comes out
is no model of transformers. Shapes: B batch, L length, H hidden size, V branches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from connito.base.branches import import_branches


class SoftAttention(nn.Module):
    """Attention of all branches, mixed token by token: hidden states [B, L, H] -> [B, L, H]."""

    def __init__(self, experts: Sequence[nn.Module], size: int, *, shared: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(expert) for expert in experts)
        self.gate = nn.Parameter(torch.zeros(len(experts), size))
        first: Any = self.experts[0]
        for name in ("k_proj", "v_proj") if shared else ():
            maps = [getattr(expert, name) for expert in self.experts]
            with torch.no_grad():
                getattr(first, name).weight.copy_(torch.stack([of.weight for of in maps]).mean(dim=0))
            for expert in self.experts:
                setattr(expert, name, getattr(first, name))

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        """Return the mixture, as an attention of transformers does; nothing is cached."""
        options["past_key_values"] = None
        shares = F.linear(hidden_states, self.gate).softmax(-1)
        found = torch.stack([expert(hidden_states, **options)[0] for expert in self.experts], dim=-1)
        return (found * shares[..., None, :]).sum(-1), None


def mix_branches(
    seed: Any,
    branches: Mapping[str, Any],
    texts: Mapping[str, torch.Tensor],
    *,
    moe_layers: int,
    top_k: int = 2,
    shared: bool = False,
) -> nn.Module:
    """Return the branches of `seed` as one model, with their MLPs as experts in the last `moe_layers` layers and a mixture of
    their attention in every layer; with `shared`, of one set of keys and values. Arguments are `import_branches`'s.
    """
    model: Any = import_branches(seed, branches, texts, moe_layers=moe_layers, top_k=top_k)
    for index, layer in enumerate(model.model.layers):
        own = [branch.model.layers[index].self_attn for branch in branches.values()]
        layer.self_attn = SoftAttention(own, model.config.hidden_size, shared=shared)
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]
