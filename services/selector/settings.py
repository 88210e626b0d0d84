"""The selector's settings."""

from __future__ import annotations

from connito.runtime.settings import ServiceSettings


class SelectorSettings(ServiceSettings):
    """Nothing beyond what every service has."""
