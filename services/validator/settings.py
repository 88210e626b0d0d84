"""The validator's settings."""

from __future__ import annotations

from pathlib import Path

from connito.runtime.settings import ModelSettings
from pydantic import Field


class ValidatorSettings(ModelSettings):
    """Settings of the validator beyond those of every service."""

    label: str = Field("", max_length=80, description="a name to show beside this validator's key")
    batch_tokens: int = Field(2048, ge=1, description="held-out tokens that go through the model at a time")
    hidden_cache_bytes: int = Field(
        1 << 30, ge=1 << 20, description="memory for the hidden states that all submissions of a cycle share"
    )
    losses_dir: Path | None = Field(
        None,
        description="folder of this user's own in which validators of one owner share what they measured; empty: none",
    )
