"""The selector's settings."""

from __future__ import annotations

from connito.runtime.settings import ModelSettings


class SelectorSettings(ModelSettings):
    """Settings of the selector: those of every service that runs a model."""
