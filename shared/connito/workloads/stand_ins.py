"""Substitutes for the engine's code during a rehearsal, with the same memory at its peak in fewer operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from connito.errors import Invalid
from connito.moe import adamw
from connito.moe.four_bit import FourBit
from connito.moe.fused_attention import fused_attention
from connito.moe.residency import BLOCK
from connito.v1 import reasons_pb2


@contextmanager
def stand_ins(*, cuda: bool) -> Iterator[None]:
    """Use them inside the block."""
    from transformers import masking_utils

    size = adamw.CHUNK["cuda" if cuda else "cpu"]
    with ExitStack() as stack:
        # Masks are chosen as for real tensors; for fake ones transformers builds each, as an export needs it.
        stack.enter_context(patch.object(masking_utils, "is_tracing", lambda *_: False))
        # Every chunk of a tensor is like its first one.
        stack.enter_context(patch.object(adamw, "_chunks", lambda tensor: [(0, min(size, tensor.numel()))]))
        stack.enter_context(patch.object(FourBit, "row", _row))
        if cuda:
            stack.enter_context(fused_attention())
        yield


@contextmanager
def computable(family: str) -> Iterator[None]:
    """Say as `Invalid` that a model which can be built from its configuration cannot be computed."""
    try:
        yield
    except (
        RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError
    ) as error:  # fmt: skip
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")
        raise Invalid(
            f"a training step of the model that config.json describes ({family}) cannot be made: {why}; copy config.json "
            "again from where the weights are from",
            reason=reasons_pb2.REASON_BAD_SPEC,
        ) from error


def _row(self: Any, index: int) -> torch.Tensor:
    """Return a row without values, when its scales and they with their offset have been there, as `FourBit.row` has them."""
    scales = torch.empty(self.blocks, dtype=torch.float32)
    shifted = scales + self.offset[index]
    row = torch.empty(self.blocks * BLOCK, dtype=self.dtype, device=shifted.device)
    return row[: self.shape.numel()].view(self.shape)
