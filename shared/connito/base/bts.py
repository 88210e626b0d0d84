"""Branch-Train-Stitch (Zhang et al. 2025): a frozen seed and frozen specialists of it, stitched layer by layer.

The seed is the hub. Stitches lie after every few layers and take turns. One *into the hub* mixes hidden states, projected, by a
gate that reads the hub's, h₀ ← Σ_i softmax(G·h₀)_i · P_i·h_i; one *into the specialists* gives each of them some of the hub's,
h_i ← s·h_i + (1 − s)·Q_i·h₀ with s = σ(u_i·h_i). The last layer's stitch goes into the hub, whose head speaks. Nothing but
stitches is trained, so that a specialist can leave: its place in the gate is closed, and the hub alone is the seed.
Projections begin as the identity and gates even.

What comes out is no model of transformers: all layers of all models run side by side. Shapes: B batch, L length, H hidden size,
V specialists.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from connito.base.upcycle import check_source
from connito.errors import Invalid


class IntoHub(nn.Module):
    """Hidden states of hub and specialists, [V + 1, B, L, H], hub first, as one of the hub, [B, L, H]."""

    def __init__(self, models: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(models, size))
        self.project = nn.Parameter(torch.eye(size).repeat(models - 1, 1, 1))

    def forward(self, states: torch.Tensor, open_: torch.Tensor) -> torch.Tensor:
        """Return the mixture of those that are `open_`, bool [V + 1]."""
        shares = F.linear(states[0], self.gate).masked_fill(~open_, -torch.inf).softmax(-1)
        mixed = torch.einsum("vblh,vgh->vblg", states[1:], self.project)
        return shares[..., :1] * states[0] + torch.einsum("blv,vblh->blh", shares[..., 1:], mixed)


class IntoSpecialists(nn.Module):
    """The same states as those of the specialists, [V, B, L, H], with some of the hub's in each."""

    def __init__(self, models: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(models - 1, size))
        self.project = nn.Parameter(torch.eye(size).repeat(models - 1, 1, 1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the specialists' states."""
        own = torch.einsum("vblh,vh->vbl", states[1:], self.gate).sigmoid()[..., None]
        return own * states[1:] + (1 - own) * torch.einsum("blh,vgh->vblg", states[0], self.project)


class Stitched(nn.Module):
    """A seed and its specialists as one causal language model. Raises `Invalid` for models of other shapes."""

    def __init__(self, hub: Any, specialists: Mapping[str, Any], every: int = 1) -> None:
        super().__init__()
        check_source(hub, 1, 2, 1)
        depth, size = hub.config.num_hidden_layers, hub.config.hidden_size
        like = (hub.config.model_type, depth, size)
        for name, model in specialists.items():
            if (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) != like:
                raise Invalid(f"{name} is no branch of the seed: it has other layers")
        self.models, self.names = nn.ModuleList([hub, *specialists.values()]).requires_grad_(False), list(specialists)
        ends = range(depth - 1, -1, -every)
        count = len(self.models)
        self.stitches = nn.ModuleDict(
            {str(end): (IntoSpecialists if turn % 2 else IntoHub)(count, size) for turn, end in enumerate(ends)}
        )
        self.closed: Collection[str] = ()

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        """Return logits [B, L, words], and with `labels` the loss of each next token."""
        bodies: list[Any] = [model.model for model in self.models]
        length, hub = input_ids.shape[1], bodies[0]
        states = torch.stack([body.embed_tokens(input_ids) for body in bodies])
        positions = torch.arange(length, device=input_ids.device)[None]
        ahead = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        mask = torch.zeros(ahead.shape, dtype=states.dtype, device=states.device)
        mask = mask.masked_fill(ahead, torch.finfo(states.dtype).min)[None, None]
        angles = hub.rotary_emb(states[0], positions)
        open_ = torch.tensor([True, *(name not in self.closed for name in self.names)], device=input_ids.device)
        for index in range(len(hub.layers)):
            layers = [body.layers[index] for body in bodies]
            run = [
                layer(state, attention_mask=mask, position_ids=positions, position_embeddings=angles)
                for layer, state in zip(layers, states, strict=True)
            ]
            states = torch.stack(run)
            if str(index) not in self.stitches:
                continue
            stitch = self.stitches[str(index)]
            if isinstance(stitch, IntoHub):
                states = torch.cat([stitch(states, open_)[None], states[1:]])
            else:
                states = torch.cat([states[:1], stitch(states)])
        head: Any = self.models[0]
        logits = head.lm_head(hub.norm(states[0]))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
