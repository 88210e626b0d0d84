"""The committer's settings."""

from __future__ import annotations

from connito.bus.streams import LEASE_TTL
from connito.runtime.settings import ServiceSettings
from pydantic import Field


class CommitterSettings(ServiceSettings):
    """Settings of the committer beyond those of every service. It serves every run, whatever `run` says."""

    lease_seconds: float = Field(
        LEASE_TTL, gt=0, le=LEASE_TTL, description="how long another replica waits before it takes over the answers"
    )
    examine_slots: int = Field(2, ge=1, description="uploaded artifacts that are examined at once")
    presign_seconds: int = Field(900, ge=10, le=604800, description="how long an upload or download link is good for")
    requests_per_second: float = Field(5.0, gt=0, description="API requests that one miner may make in the long run")
    requests_burst: float = Field(50.0, ge=1, description="API requests that one miner may make at once")
