"""Several variants of one expert in memory at once, chosen token by token.

Arrow (Ostapenko et al. 2024): the prototype of a variant is the first right singular vector of its δ, the direction of
inputs that it moves most; a token prefers the variants whose prototypes it is aligned with, whatever the sign.
MoLoRA (Zadouri et al. 2023): variants are mixed per token inside every linear map, y = Σ_v α_v(x) W_v x with Σ α = 1.

Shapes: T tokens, H hidden size, V variants, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid
from connito.experts.compose import Part, RowKey, layers_of
from connito.moe.head import Head
from connito.moe.implementation import Implementation, register
from connito.moe.layout import MoELayer, require_moe_layers
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

IMPLEMENTATION = "connito_variants"

# x [T, H] of the tokens that go to (layer, expert) -> α [T, V], rows summing to 1; V in the order of the parts.
Mixing = Callable[[int, int, torch.Tensor], torch.Tensor]


def prototype(
    rows: Mapping[RowKey, torch.Tensor],
    base: Mapping[RowKey, torch.Tensor],
    place: tuple[int, int],
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Return unit vector [H]: the first right singular vector of the δ of the maps that read the layer's input, or
    zeros.

    From the eigenvectors of δᵀδ in float64; the sign is such that the largest coordinate is positive.
    """
    deltas = [
        rows[key].double() - base[key].double()
        for key in sorted(rows)
        if key[:2] == place and key[2] in ("gate_up_proj", "up_proj")
    ]
    delta = torch.cat([d.T if transposed else d for d in deltas])
    gram = delta.T @ delta
    if not float(gram.abs().max()) > 0:
        return torch.zeros(gram.shape[0], dtype=torch.float64)
    _, vectors = torch.linalg.eigh(gram)
    top: torch.Tensor = vectors[:, -1]
    sign: torch.Tensor = top[top.abs().argmax()].sign()
    return top * sign


def arrow(
    parts: Sequence[Part],
    base: Mapping[RowKey, torch.Tensor],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    transposed: bool = False,
) -> Mixing:
    """Return α = softmax over the variants of |x·v| / temperature, only the `top_k` best if that is not 0.

    `transposed`: the family stores its maps as [in, out], as the experts module's `is_transposed` says.
    """
    prototypes: dict[tuple[int, int], torch.Tensor] = {}
    for layer, experts in layers_of({key: None for part in parts for key in part.rows}).items():
        for expert in experts:
            known = [
                prototype(part.rows, base, (layer, expert), transposed=transposed)
                if any(key[:2] == (layer, expert) for key in part.rows)
                else None
                for part in parts
            ]
            width = next(len(vector) for vector in known if vector is not None)
            prototypes[layer, expert] = torch.stack([torch.zeros(width) if v is None else v.float() for v in known])

    def mix(layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        scores = (x.float() @ prototypes[layer, expert].T.to(x.device)).abs() / temperature
        if 0 < top_k < scores.shape[-1]:
            worst = scores.topk(top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < worst, float("-inf"))
        return scores.softmax(dim=-1)

    return mix


def fixed(weights: Sequence[float]) -> Mixing:
    """Return the same α for every token. One-hot is the single expert, exactly."""
    if abs(sum(weights) - 1) > 1e-6:
        raise Invalid(f"mixing weights sum to {sum(weights)}, not to 1")

    def mix(_: int, __: int, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(weights, dtype=torch.float32, device=x.device).expand(len(x), -1)

    return mix


def linear_router(gates: Mapping[int, torch.Tensor]) -> Mixing:
    """Return MoLoRA's router: α = softmax(G_l x), G_l [V, H] by layer. Differentiable in the gates, which can be
    trained.
    """

    def mix(layer: int, _: int, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ gates[layer].T.to(x.device)).softmax(dim=-1)

    return mix


def train_router(
    model: nn.Module,
    parts: Sequence[Part],
    base: Mapping[RowKey, torch.Tensor],
    sequences: npt.NDArray[Any],
    *,
    steps: int = 40,
    learning_rate: float = 0.05,
) -> dict[int, torch.Tensor]:
    """Return gates G_l [V, H] of MoLoRA's router, trained on `sequences` int32 [n, L + 1] with everything else frozen.

    Starts at zero, the uniform mixture; each step is one sequence, in their order. Adam. Deterministic.
    """
    if not len(sequences):
        raise Invalid("there is no text to train the router on: give some of every expert's domain")
    touched = layers_of({key: None for part in parts for key in part.rows})
    layers = require_moe_layers(model)
    gates = {index: _gate(layers[index].experts, len(parts)) for index in touched if index in layers}
    optimiser = torch.optim.Adam(list(gates.values()), lr=learning_rate)
    head, device = Head(model), next(model.parameters()).device
    with variants(model, parts, base, linear_router(gates)):
        for step in range(steps):
            ids = torch.from_numpy(sequences[step % len(sequences)][None].astype("int64")).to(device)
            loss = head.nll(ids[:, :-1], ids[:, 1:]).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return {index: gate.detach().cpu() for index, gate in gates.items()}


def _gate(experts: Any, count: int) -> torch.Tensor:
    """Return G = 0 [V, H], beside the experts that it mixes."""
    bank = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return torch.zeros(count, bank.shape[1 if experts.is_transposed else 2], device=bank.device, requires_grad=True)


@contextmanager
def variants(
    model: nn.Module, parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor], mixing: Mixing
) -> Iterator[nn.Module]:
    """Mix the experts that a part has rows of from all parts inside the block, token by token; the base's row stands in for a
    part without that row. The parameters of `model` are not touched."""
    layers = require_moe_layers(model)
    touched = layers_of({key: None for part in parts for key in part.rows})
    register(IMPLEMENTATION, mixed_experts_forward)
    plugged: list[tuple[Any, Any]] = []
    try:
        for index, experts in touched.items():
            if index not in layers or experts[-1] >= layers[index].num_experts:
                raise Invalid(
                    f"layer {index} of this model does not have experts {experts}; they are of another base",
                    reason=reasons_pb2.REASON_STALE_BASE,
                )
            module: Any = layers[index].experts
            plugged.append((module, module.config))
            module.config = Implementation(module.config, IMPLEMENTATION)
            module.connito_variants = _rows_by_expert(layers[index], experts, parts, base)
            module.connito_mixing = (index, mixing)
        yield model
    finally:
        for module, config in plugged:
            module.config = config
            for name in ("connito_variants", "connito_mixing"):
                if hasattr(module, name):
                    delattr(module, name)


def _rows_by_expert(
    layer: MoELayer, experts: Sequence[int], parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor]
) -> dict[int, list[dict[str, torch.Tensor]]]:
    device = next(layer.experts.parameters()).device
    return {
        expert: [
            {
                name: part.rows.get((layer.index, expert, name), base[layer.index, expert, name]).to(device)
                for name in layer.parameters
            }
            for part in parts
        ]
        for expert in experts
    }


def mixed_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return Σ_k w_k · expert_k(x), [T, H], in the order in which the family's own loop sums."""
    layer, mixing = self.connito_mixing
    output = torch.zeros_like(hidden_states)
    total = getattr(self, "down_proj").shape[0]  # noqa: B009
    for expert in range(total):
        token, slot = torch.where((top_k_index == expert).T)[::-1]
        if token.numel() == 0:
            continue
        x = hidden_states[token]
        rows = self.connito_variants.get(expert) or [
            {name: bank[expert] for name, bank in self.named_parameters(recurse=False)}
        ]
        alpha = mixing(layer, expert, x).to(x.dtype) if len(rows) > 1 else x.new_ones(len(x), 1)
        current = _expert(self, x, rows, alpha) * top_k_weights[token, slot, None]
        output = output.index_add(0, token, current.to(output.dtype))
    return output


def _expert(self: Any, x: torch.Tensor, rows: list[dict[str, torch.Tensor]], alpha: torch.Tensor) -> torch.Tensor:
    up = "gate_up_proj" if self.has_gate else "up_proj"
    x = _mixed_linear(self, x, rows, alpha, up)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _mixed_linear(self, x, rows, alpha, "down_proj")
    return self.post_expert_norm(x) if self.has_post_expert_norm else x


def _mixed_linear(
    self: Any, x: torch.Tensor, rows: list[dict[str, torch.Tensor]], alpha: torch.Tensor, name: str
) -> torch.Tensor:
    out: torch.Tensor | None = None
    for variant, row in enumerate(rows):
        weight = row[name]
        y = x @ weight if self.is_transposed else torch.nn.functional.linear(x, weight)
        if self.has_bias:
            y = y + row[f"{name}_bias"]
        y = alpha[:, variant, None] * y
        out = y if out is None else out + y
    assert out is not None
    return out
