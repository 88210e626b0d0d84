"""The reference for experts in four bits: a full model that has them as they unpack."""

from __future__ import annotations

import copy
from typing import Any

import torch
from connito.moe.four_bit import FourBit
from connito.moe.layout import require_moe_layers


def dequantised(model: Any, packed: Any, selection: dict[int, list[int]]) -> Any:
    """The full model, with each frozen expert as the packed model unpacks it."""
    full = copy.deepcopy(model)
    modules = dict(packed.named_modules())
    for index, layer in require_moe_layers(full).items():
        frozen = [e for e in range(layer.num_experts) if e not in selection.get(index, ())]
        for name in layer.parameters:
            rows = getattr(modules[layer.experts_name], f"helper_{name}")
            for row, expert in enumerate(frozen):
                with torch.no_grad():
                    bank = getattr(layer.experts, name)
                    bank[expert] = rows.row(row) if isinstance(rows, FourBit) else rows[row]
    return full
