"""The coordinator's settings."""

from __future__ import annotations

from pathlib import Path

from connito.bus.streams import LEASE_TTL
from connito.runtime.settings import ServiceSettings
from pydantic import Field


class CoordinatorSettings(ServiceSettings):
    """Settings of the coordinator beyond those of every service."""

    lease_seconds: float = Field(
        LEASE_TTL, gt=0, description="a standby takes over when the leader has not renewed its lease for this long"
    )
    requests_per_second: float = Field(
        5.0, gt=0, description="enrolments and bans that one key may ask for in the long run"
    )
    requests_burst: float = Field(50.0, ge=1, description="enrolments and bans that one key may ask for at once")
    admission: Path | None = Field(
        None,
        description="folder with accounts.json and accounts/miners-*.nk of the operator's, for miners who hold an invite "
        "and no pass; empty: the operator alone admits",
    )
    admission_bus: str = Field("", description="address of the broker as such miners reach it; empty: nats_url")
