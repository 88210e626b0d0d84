"""The validator's settings."""

from __future__ import annotations

from connito.runtime.settings import ServiceSettings
from pydantic import Field


class ValidatorSettings(ServiceSettings):
    """Settings of the validator beyond those of every service."""

    device: str = Field("", description="cpu, cuda, cuda:1, …; empty: the first GPU, or the CPU")
    batch_tokens: int = Field(2048, ge=1, description="held-out tokens that go through the model at a time")
    hidden_cache_bytes: int = Field(
        1 << 30, ge=1 << 20, description="memory for the hidden states that all submissions of a cycle share"
    )
