"""The library's settings."""

from __future__ import annotations

from connito.runtime.settings import ServiceSettings
from pydantic import Field


class LibrarySettings(ServiceSettings):
    """Settings of the library: those of every service, and the path of its index."""

    index_path: str = Field("", description="File of the search index; empty: a temporary one, built at each start.")
    requests_per_second: float = Field(
        5.0, gt=0, description="statements and uses that one key may write in the long run"
    )
    requests_burst: float = Field(50.0, ge=1, description="statements and uses that one key may write at once")
