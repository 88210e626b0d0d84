"""The trainer's settings. A miner needs two of them: its key file and the broker's address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from connito.protocol.policy.choices import ADVERSARIES, one_of
from connito.runtime.settings import ModelSettings
from pydantic import Field


def default_work_dir() -> Path:
    """Return `$XDG_STATE_HOME/connito/miner`, or `~/.local/state/connito/miner`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "connito" / "miner"


class TrainerSettings(ModelSettings):
    """Settings of a miner beyond those of every service."""

    work_dir: Path = Field(
        default_factory=default_work_dir,
        description="private folder of this miner: results that are committed to but not revealed. Losing it loses them",
    )
    label: str = Field("", max_length=80, description="a name to show beside this miner's key")
    invite: str = Field("", description="the token for runs that are by invitation, from their customer or operator")
    device: str = Field(
        "",
        description="cpu, cuda, cuda:1, …; several separated by commas share the layers; empty: the first GPU, or the CPU",
    )
    bf16: bool = Field(False, description="run the forward pass in bfloat16")
    bf16_parameters: bool = Field(
        False,
        description="hold frozen weights in bfloat16 and run the forward pass in it: half the memory of a float32 base",
    )
    micro_batch: int = Field(
        0,
        ge=0,
        description="sequences that go through the model at once; gradients add up over the batch. 0: all of it",
    )
    optimizer: Literal["adamw-8bit", "adamw"] = Field(
        "adamw-8bit", description="AdamW with moments of one byte a value, or of four"
    )
    checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compute a layer's activations again in the backward pass: less memory, a third more time. auto: when "
        "memory requires it",
    )
    attention: Literal["", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "",
        description="attention kernel by its name in transformers; empty: its own choice, SDPA where the family has it",
    )
    experts: Literal["auto", "grouped", "loop"] = Field(
        "auto", description="one product for all experts of a bank, or one for each. auto: grouped on a GPU"
    )
    compile: bool = Field(False, description="compile the layers with torch.compile: slow to start, faster steps")
    offload_prefix: bool = Field(
        False, description="keep the layers below the first adapted one in the host's memory until a step needs them"
    )
    evaluation_share: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="share of this miner's text of a cycle that it measures itself by instead of training on it, where that is "
        "four sequences at least; 0: none",
    )
    patience: int = Field(
        3,
        ge=0,
        description="evaluations without a better loss after which a cycle's training ends, with the best state; 0: never",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="experts per token in adapted layers, for a miner with less compute. 0: as the model has it",
    )
    memory_bytes: int = Field(
        0, ge=0, description="memory that the training model may take; 0: what is free when it is loaded"
    )
    residency: Literal["auto", "all", "four-bit", "helpers"] = Field(
        "auto",
        description="frozen experts to hold beside the targets: all of them as stored, all in four bits, or the run's few "
        "helpers; auto: the first of these that fits",
    )
    trainer_adversary: str = Field(
        "",
        description=f"for attack drills only: misbehave as {one_of(ADVERSARIES)}",
    )
    trainer_victim_dir: Path | None = Field(
        None, description="for the copiers: the work folder of the miner whose result leaked"
    )
    trainer_second_victim_dir: Path | None = Field(
        None, description="for the mixed-copier: the work folder of another one; empty: the same"
    )

    @property
    def computes_in_bf16(self) -> bool:
        """Return whether all that goes through the model does in bfloat16: weights of that type leave no choice."""
        return self.bf16 or self.bf16_parameters
