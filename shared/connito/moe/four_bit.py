"""Frozen experts in four bits, so that all of them can stay in memory and the router's own choice holds.

Experts of a base that is published in four bits stay as they are (`PublishedFourBit`); others are packed here.

NF4 (Dettmers et al. 2023, QLoRA, section 3): sixteen quantiles of a normal distribution times the largest magnitude of 64
values, those magnitudes in eight bits again. An expert is unpacked when tokens reach it, in the forward and once more in the
backward pass, so that never more than one of them is in memory as numbers.

Shapes: a row of n values is packed as B = ⌈n / 64⌉ blocks, the last one filled up with zeros. It is unpacked as [B, 64]: the
library's kernel for processors mistakes the scale of blocks in rows shorter than one, and has none for odd lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from connito.moe.residency import BLOCK, BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterator


class FourBit(nn.Module):
    """Rows of one tensor of a bank, packed. `put` fills them one by one, `row` unpacks one."""

    codes: torch.Tensor
    scales: torch.Tensor
    outer: torch.Tensor
    offset: torch.Tensor

    def __init__(self, rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Reserve memory for `rows` rows of `shape`, which unpack to `dtype`."""
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype
        self.blocks = -(-self.shape.numel() // BLOCK)
        for name, width, kind in (
            ("codes", self.blocks * BLOCK // 2, torch.uint8),
            ("scales", self.blocks, torch.uint8),
            ("outer", -(-self.blocks // BLOCKS), torch.float32),
            ("offset", 1, torch.float32),
        ):
            self.register_buffer(name, torch.empty(rows, width, dtype=kind), persistent=False)

    def put(self, index: int, row: torch.Tensor) -> None:
        """Pack a row of `shape`."""
        filled = F.pad(row.reshape(-1), (0, self.blocks * BLOCK - row.numel()))
        filled = filled.float() if filled.dtype == torch.float64 else filled
        codes, state = _library().quantize_4bit(filled, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        self.codes[index] = codes.view(-1)
        self.scales[index], self.outer[index], self.offset[index] = state.absmax, state.state2.absmax, state.offset

    def row(self, index: int) -> torch.Tensor:
        """Return a row of `shape`, unpacked: always the same numbers."""
        library, codes = _library(), self.codes[index].view(-1, 1)
        scales = library.dequantize_blockwise(self.scales[index], absmax=self.outer[index], blocksize=BLOCKS)
        state = library.QuantState(
            absmax=scales + self.offset[index],
            shape=torch.Size((self.blocks, BLOCK)),
            dtype=torch.float32 if self.dtype == torch.float64 else self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        unpacked: torch.Tensor = library.dequantize_4bit(codes, state)
        return unpacked.view(-1)[: self.shape.numel()].view(self.shape).to(self.dtype)


class PublishedFourBit(FourBit):
    """Rows of MXFP4 as a checkpoint has them: they unpack to the very numbers that are trained and judged with."""

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Hold blocks [rows, out, in / 32, 16] and scales [rows, out, in / 32], which unpack to rows [in, out]."""
        nn.Module.__init__(self)
        self.shape, self.dtype = torch.Size((32 * blocks.shape[2], blocks.shape[1])), dtype
        self.register_buffer("codes", blocks, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def row(self, index: int) -> torch.Tensor:
        """Return a row of `shape`, unpacked."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        part = slice(index, index + 1)
        unpacked: torch.Tensor = convert_moe_packed_tensors(self.codes[part], self.scales[part], dtype=self.dtype)
        return unpacked[0]


def hold(rows: Iterable[torch.Tensor], count: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | FourBit:
    """Return `count` rows of `shape`, matrices packed and biases as they are. Each row is read when the one before is packed."""
    if len(shape) < 2:
        return torch.stack([row.to(dtype) for row in rows]) if count else torch.empty(0, *shape, dtype=dtype)
    packed = FourBit(count, shape, dtype)
    for index, row in enumerate(rows):
        packed.put(index, row)
    return packed


def frozen_linear(
    x: torch.Tensor, bank: FourBit, index: int, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """Return x·Wᵀ + b for x [t, in] and row W [out, in], x·W + b for [in, out] where `transposed`; gradients reach x alone."""
    out: torch.Tensor = _Frozen.apply(x, bank, index, bias, transposed)  # type: ignore[no-untyped-call]
    return out


class _Frozen(torch.autograd.Function):
    """The product with an unpacked row, which is unpacked again for the backward pass instead of kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bank: FourBit, index: int, bias: torch.Tensor | None, transposed: bool
    ) -> torch.Tensor:
        ctx.bank, ctx.index, ctx.transposed, ctx.dtype = bank, index, transposed, x.dtype
        weight = bank.row(index)
        if not transposed:
            return F.linear(x, weight, bias)
        product = x @ weight
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        weight = ctx.bank.row(ctx.index).to(gradient.dtype)
        return (gradient @ (weight.T if ctx.transposed else weight)).to(ctx.dtype), None, None, None, None


@cache
def _library() -> Any:
    """Import bitsandbytes, offline: on some processors it would fetch and run code from a hub where `kernels` is there."""
    import logging

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with _without("kernels"):
        from bitsandbytes import functional
    return functional


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let imports of `module` fail inside the block."""
    before = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before
