"""The aggregator's settings."""

from __future__ import annotations

from connito.bus.streams import LEASE_TTL
from connito.runtime.settings import ModelSettings
from pydantic import Field


class AggregatorSettings(ModelSettings):
    """Settings of the aggregator beyond those of every service."""

    lease_seconds: float = Field(
        LEASE_TTL, gt=0, description="a standby takes over when the leader has not renewed its lease for this long"
    )
