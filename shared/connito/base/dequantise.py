"""Weights of quantised checkpoints as numbers: FP8 in blocks as DeepSeek-V3 is published, MXFP4 as gpt-oss is.

Values of FP8 are 8-bit floats, of MXFP4 4-bit floats, two in a byte; each block of values has a scale. Both come out as
transformers' own dequantisation makes them, blocks that a matrix's edge cuts off as the publisher's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from connito.base.stored import Source
from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch

# Values under one scale of MXFP4, and bytes that hold them.
MXFP4_BLOCK, MXFP4_BYTES = 32, 16


@dataclass(frozen=True)
class Packed:
    """One weight that is stored as two tensors, `values` and `scales`. `block`: rows and columns under one scale of FP8, none
    for one scale of the whole; MXFP4 (`four_bit`) has its own. `shape`: what it comes out as."""

    values: str
    scales: str
    shape: tuple[int, ...]
    four_bit: bool = False
    block: tuple[int, int] | None = None

    def unpack(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, or the rows of some experts of one."""
        return mxfp4(values, scales, dtype) if self.four_bit else fp8_blocks(values, scales, self.block, dtype)


def fp8_blocks(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return weight [..., r, c] times the scale of each block [..., ⌈r / b₀⌉, ⌈c / b₁⌉], in float32, as `dtype`.

    scales: `weight_scale_inv`, which in spite of its name is what a value is multiplied by; bytes are powers of two (E8M0).
    """
    import torch

    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    for axis, size in zip((-2, -1), block or (), strict=False):
        factors = factors.repeat_interleave(size, dim=axis).narrow(axis, 0, weight.shape[axis])
    return (weight.float() * factors).to(dtype)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [experts, c, r] from blocks [experts, r, c / 32, 16] and scales [experts, r, c / 32]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    return weight


def unpacked(source: Source, packed: Mapping[str, Packed], dtype: Callable[[str], torch.dtype]) -> Source:
    """Return a source that gives packed weights, by name, as numbers of the type that `dtype` says."""

    def read(name: str) -> torch.Tensor:
        if name not in packed:
            return source.read(name)
        weight = packed[name]
        return weight.unpack(source.read(weight.values), source.read(weight.scales), dtype(name))

    def rows(name: str, experts: Sequence[int]) -> torch.Tensor:
        if name not in packed:
            return source.rows(name, experts)
        weight = packed[name]
        return weight.unpack(source.rows(weight.values, experts), source.rows(weight.scales, experts), dtype(name))

    return Source(read, rows)


def check_shapes(weight: str, values: Sequence[int], scales: Sequence[int], packed: Packed) -> None:
    """Raise `Invalid` unless there is one scale for each block of a weight."""
    if packed.four_bit:
        fits = len(values) == 4 and values[-1] == MXFP4_BYTES and (*values[:-1],) == (*scales,)
    elif packed.block is None:
        fits = not scales or (*scales,) == (1,)
    else:
        wanted = [-(-length // size) for length, size in zip(values[-2:], packed.block, strict=True)]
        fits = len(values) >= 2 and [*scales] == [*values[:-2], *wanted]
    if not fits:
        raise Invalid(
            f"{weight} has values of shape {tuple(values)} and scales of shape {tuple(scales)}, which is not one for each block"
            f"{'' if packed.block is None else ' of ' + ' × '.join(map(str, packed.block))}; fetch the checkpoint again",
            reason=reasons_pb2.REASON_WRONG_SHAPE,
        )
