"""Choices of a machine that trains: what a step costs and how fast it is. What is learned differs by rounding at most.

Everything here is a miner's own choice and none of it is part of a run. No torch before a model is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.errors import Invalid
from connito.v1 import reasons_pb2

# AdamW with moments of one byte a value, or of four.
COMPACT, EXACT = OPTIMIZERS = ("adamw-8bit", "adamw")
# Attention as transformers picks it for the family (SDPA where it can), or one of its implementations by name.
ATTENTION = ("", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# One product for all experts of a bank where the device has it, or one for each expert.
EXPERTS = ("auto", "grouped", "loop")
# Logits computed at a time: 64 MB in float32. Fewer make the output layer slower, more do not make it faster.
HEAD_VALUES = 1 << 24


@dataclass(frozen=True)
class Engine:
    """Choices of a machine. `checkpointing`: activations inside a layer are computed again in the backward pass. `devices`:
    several share the layers. `offload_prefix`: layers below the first adapted one lie in the host's memory."""

    optimizer: str = COMPACT
    checkpointing: bool = False
    attention: str = ATTENTION[0]
    experts: str = EXPERTS[0]
    compile: bool = False
    offload_prefix: bool = False
    devices: tuple[str, ...] = ()


def is_compact(optimizer: str) -> bool:
    """Return whether moments take one byte a value. Raises `Invalid` for an unknown optimiser."""
    if optimizer not in OPTIMIZERS:
        raise Invalid(
            f"unknown optimizer {optimizer!r}: use {' or '.join(OPTIMIZERS)}", reason=reasons_pb2.REASON_BAD_SPEC
        )
    return optimizer == COMPACT
