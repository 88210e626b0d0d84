"""The selector's settings."""

from __future__ import annotations

from connito.runtime.settings import ServiceSettings


class SelectorSettings(ServiceSettings):
    """Settings of the selector: those of every service."""
