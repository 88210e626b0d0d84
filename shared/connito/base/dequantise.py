"""Weights of quantised checkpoints as numbers: FP8 in blocks as DeepSeek-V3 publishes them, MXFP4 as gpt-oss does.

Values of FP8 are 8-bit floats; of MXFP4, 4-bit floats, two in a byte. Each block of them has a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch


def fp8_blocks(
    weight: torch.Tensor, scales: torch.Tensor, block: Sequence[int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return weight [..., rows, columns] times the scale of each block [..., ⌈rows / b₀⌉, ⌈columns / b₁⌉], in float32, as `dtype`.

    The last blocks may be cut, as those of DeepSeek-V3's attention are. scales: `weight_scale_inv`, in spite of its name what a
    value is multiplied by; bytes are powers of two (E8M0). block None: one scale for the whole matrix. Raises `Invalid` for
    scales of another shape.
    """
    import torch

    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    if block is not None and factors.dim() > 1:
        for axis, size in zip((-2, -1), block, strict=True):
            length = weight.shape[axis]
            if factors.shape[axis] != -(-length // size):
                raise Invalid(
                    f"a weight of shape {tuple(weight.shape)} has scales of shape {tuple(scales.shape)}, which is not one for each "
                    f"block of {' × '.join(map(str, block))}; fetch the checkpoint again",
                    reason=reasons_pb2.REASON_WRONG_SHAPE,
                )
            factors = factors.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return (weight.float() * factors).to(dtype)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [experts, columns, rows] from blocks [experts, rows, columns / 32, 16] and scales [experts, rows, columns / 32].

    Raises `Invalid` for scales of another shape.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if blocks.shape[:-1] != scales.shape:
        raise Invalid(
            f"blocks of shape {tuple(blocks.shape)} have scales of shape {tuple(scales.shape)}: there must be one for each 32 "
            "values; fetch the checkpoint again",
            reason=reasons_pb2.REASON_WRONG_SHAPE,
        )
    weight: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return weight
