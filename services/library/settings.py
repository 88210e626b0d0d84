"""The library's settings."""

from __future__ import annotations

from connito.runtime.settings import ServiceSettings
from pydantic import Field


class LibrarySettings(ServiceSettings):
    """Settings of the library: those of every service, and the path of its index."""

    index_path: str = Field("", description="File of the search index; empty: a temporary one, built at each start.")
