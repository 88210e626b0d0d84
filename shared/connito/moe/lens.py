"""Early decoding: what each layer would say if the model ended there, with all of a token's experts and with the first alone.

After MoE Lens (Chaudhari et al. 2026), an extended logit lens: the hidden states behind a layer go through the model's
last norm and its output layer. The top expert alone carries the gate weight of all that were chosen, in that layer only.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.moe.batches import as_taken, positions_of
from connito.moe.batches import placed as placed_at
from connito.moe.diagnostics import first_alone
from connito.moe.layout import MoELayer, require_moe_layers

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

# What families call the norm behind their last layer.
NORMS = ("norm", "final_layernorm", "norm_f", "final_norm", "ln_f")


def early_decoding(model: nn.Module, sequences: npt.NDArray[Any]) -> dict[str, dict[str, float]]:
    """Return by layer, for `sequences` [n, L]: `cosine` of the hidden states behind it with all experts and with the first
    alone; and, where the model has one norm at its end, `agreement` of the words said first and `kl` in nats per token.
    """
    from connito.data.packing import tokens_of

    rows = as_taken(sequences, model)
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokens_of(rows).astype(np.int64)).to(device)
    layers, positions, found = require_moe_layers(model), positions_of(rows, device), {}
    with torch.inference_mode():
        whole = _behind(model, layers, ids, positions)
        for index, layer in layers.items():
            with first_alone(layer.router):
                alone = _behind(model, {index: layer}, ids, positions)[index]
            found[str(index)] = _compared(model, whole[index], alone)
    return found


def _behind(
    model: Any, layers: dict[int, MoELayer], ids: torch.Tensor, positions: torch.Tensor | None
) -> dict[int, torch.Tensor]:
    """Return the hidden states [n, L, H] that leave the decoder layers that `layers` are in."""
    seen: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for index, layer in layers.items():
            stem, _, rest = layer.experts_name.rpartition("layers.")

            def keep(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                seen[index] = output[0] if isinstance(output, tuple) else output

            decoder = model.get_submodule(f"{stem}layers.{rest.split('.')[0]}")
            stack.callback(decoder.register_forward_hook(keep).remove)
        body = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
        body(input_ids=ids, use_cache=False, **placed_at(positions))
    return seen


def _compared(model: Any, whole: torch.Tensor, alone: torch.Tensor) -> dict[str, float]:
    found = {"cosine": float(torch.cosine_similarity(whole.float(), alone.float(), dim=-1).mean())}
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    norm = next((getattr(body, name) for name in NORMS if hasattr(body, name)), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if norm is None or head is None:
        return found
    p, q = (head(norm(states)).float().log_softmax(-1) for states in (whole, alone))
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return {**found, "agreement": float(agreement), "kl": float((p.exp() * (p - q)).sum(-1).mean())}
