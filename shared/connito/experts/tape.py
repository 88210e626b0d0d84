"""Calibration text on its way through each MoE layer: one layer is held in memory at a time.

Shapes: T calibration tokens, H hidden size, N experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from connito.errors import Invalid
from connito.moe.layout import MoELayer, require_moe_layers
from connito.moe.router import Call, choice
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

Found = TypeVar("Found")


@dataclass(frozen=True)
class Tape:
    """One layer on calibration text: the call of its router, what enters its experts [T, H], and what was chosen [T, k]."""

    layer: MoELayer
    call: Call
    inputs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def outputs(self) -> torch.Tensor:
        """Return every expert's output on every token, [N, T, H]: the largest thing here."""
        out = self.inputs.new_empty(self.layer.num_experts, *self.inputs.shape)
        for expert in range(self.layer.num_experts):
            out[expert] = self._of(expert, self.inputs)
        return out

    @cached_property
    def full(self) -> torch.Tensor:
        """Return the output of all routed experts together, [T, H]."""
        return self._mixed(self.ids, self.weights)

    def error(self, keep: list[int]) -> float:
        """Return ‖F(x) − F_keep(x)‖_F when the router chooses among `keep` only."""
        with torch.no_grad():
            places = torch.tensor(keep, device=self.ids.device)
            _, weights, ids = choice(self.call.among(places, self.layer.num_experts, alone=True))
            return float((self.full - self._mixed(_rows(ids), _rows(weights))).norm())

    def importance(self) -> npt.NDArray[np.float64]:
        """Return Σ_t g_e(x_t)·‖E_e(x_t)‖ / T per expert, [N]."""
        sums = np.zeros(self.layer.num_experts)
        for expert in range(self.layer.num_experts):
            token, slot = torch.where(self.ids == expert)
            if len(token):
                norms = self._of(expert, self.inputs[token]).norm(dim=-1)
                sums[expert] = float((norms * self.weights[token, slot]).double().sum())
        return sums / len(self.inputs)

    def _of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            slot = torch.full((len(x), 1), expert, device=x.device)
            experts: Any = self.layer.experts
            out: torch.Tensor = experts.forward(x, slot, torch.ones_like(slot, dtype=x.dtype))
            return out

    def _mixed(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens = torch.arange(len(ids), device=ids.device)[:, None]
        return (self.outputs[ids, tokens] * weights[..., None]).sum(dim=1)


def each_layer(
    model: nn.Module,
    sequences: npt.NDArray[Any],
    look: Callable[[Tape], Found],
    *,
    max_tokens: int = 2048,
    check: Callable[[MoELayer], None] = lambda _: None,
) -> dict[int, Found]:
    """Return `look(tape)` of every MoE layer, as `sequences` int32 [n, L] pass through `model`, up to `max_tokens` tokens.

    One tape is in memory at a time. What `look` changes in a layer does not show in the layers after it: the layer has
    run by then. `check` may refuse a layer before anything runs. Raises `Invalid` for an empty text.
    """
    layers = require_moe_layers(model)
    calls: dict[int, Call] = {}
    found: dict[int, Found] = {}
    text = sequences[: max(1, max_tokens // max(1, sequences.shape[1])), :max_tokens]
    if not text.size:
        raise Invalid("the calibration text is empty: give text of the domain", reason=reasons_pb2.REASON_BAD_SPEC)
    with ExitStack() as stack, torch.no_grad():
        for index, layer in layers.items():
            check(layer)

            def routed(router: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                calls[index] = Call(router, args, output, kwargs)

            def passed(
                _: nn.Module, args: Any, kwargs: Any, __: Any, index: int = index, layer: MoELayer = layer
            ) -> None:
                call = calls.pop(index)
                _logits, weights, ids = choice(call.output)
                x = args[0] if args else kwargs["hidden_states"]
                found[index] = look(Tape(layer, call, _rows(x), _rows(ids), _rows(weights)))

            stack.callback(layer.router.register_forward_hook(routed, with_kwargs=True).remove)
            stack.callback(layer.experts.register_forward_hook(passed, with_kwargs=True).remove)
        body: Any = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
        ids = torch.from_numpy(text.astype(np.int64)).to(next(model.parameters()).device)
        body(input_ids=ids, use_cache=False)
    return found


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
