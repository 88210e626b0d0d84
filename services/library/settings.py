"""The library's settings."""

from __future__ import annotations

from connito.runtime.settings import ServiceSettings
from pydantic import Field


class LibrarySettings(ServiceSettings):
    """What every service has, and where its index lies."""

    index_path: str = Field("", description="File of the search index; empty: a temporary one, built at each start.")
