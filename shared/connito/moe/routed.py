"""Counting the tokens that a router sends to the selected experts, on a full model or on a training model of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.data.packing import Rows, text_of, tokens_of
from connito.moe.batches import as_taken, home_of, placed, positions_of, separates
from connito.moe.layout import as_targets, require_moe_layers
from connito.moe.resident import adapted_layers
from connito.moe.router import choice

if TYPE_CHECKING:
    from torch import nn


def routed_tokens(model: nn.Module, selection: Any, rows: Rows) -> dict[int, list[int]]:
    """Return, by layer, how many tokens of rows [n, L + 1] the router itself sends to each selected expert, in
    the order of a state's rows.

    What fills rows up does not count, nor does the last token of a row, which nothing is predicted from. In a training
    model the router is asked before its choice is rewritten: a token whose expert is not resident is none of a helper's.
    """
    targets = as_targets(selection)
    rows = as_taken(np.ascontiguousarray(rows[:, :-1]), model)
    separates(model)
    text, device = torch.from_numpy(text_of(rows).reshape(-1)), home_of(model)
    counts = {layer: torch.zeros(len(experts), dtype=torch.long) for layer, experts in targets.items()}

    def hook(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        ids = choice(output)[2]
        ids = ids.reshape(-1, ids.shape[-1]).cpu()[text]
        wanted = torch.tensor(targets[layer])
        counts[layer] += (ids[:, :, None] == wanted).sum(dim=(0, 1))

    handles = [
        router.register_forward_hook(partial(hook, layer), prepend=True)
        for layer, router in _routers(model).items()
        if layer in targets
    ]
    body: Any = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    try:
        with torch.inference_mode():
            ids = torch.from_numpy(tokens_of(rows).astype(np.int64)).to(device)
            body(input_ids=ids, use_cache=False, **placed(positions_of(rows, device)))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: found.tolist() for layer, found in counts.items()}


def _routers(model: nn.Module) -> dict[int, Any]:
    compressed = {layer: router for layer, (_, router) in adapted_layers(model).items()}
    return compressed or {layer: found.router for layer, found in require_moe_layers(model).items()}
