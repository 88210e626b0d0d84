"""Memory of a GPU's attention kernels, for rehearsals on a machine without one.

Flash and memory-efficient attention (Dao et al. 2022; Rabe & Staats 2021) keep queries, keys, values, their output and one
float32 a row, and sum the gradient of the queries in float32; scores of all pairs are never there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F


@contextmanager
def fused_attention() -> Iterator[None]:
    """Give torch's attention the shapes and the memory of a fused kernel, and no values, inside the block."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        summed = query.new_empty(query.shape, dtype=torch.float32)
        return summed.to(query.dtype), torch.empty_like(key), torch.empty_like(value)
