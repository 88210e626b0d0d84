"""The library's settings."""

from __future__ import annotations

from connito.settings import ServiceSettings


class LibrarySettings(ServiceSettings):
    """Nothing beyond what every service has."""
