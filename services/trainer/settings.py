"""The trainer's settings. A miner needs two of them: its key file and the broker's address."""

from __future__ import annotations

import os
from pathlib import Path

from connito.settings import ServiceSettings
from pydantic import Field


def default_work_dir() -> Path:
    """`$XDG_STATE_HOME/connito/miner`, or `~/.local/state/connito/miner`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "connito" / "miner"


class TrainerSettings(ServiceSettings):
    """What a miner may set beside what every service has."""

    work_dir: Path = Field(
        default_factory=default_work_dir,
        description="private folder of this miner: results that are committed to but not revealed. Losing it loses them",
    )
    label: str = Field("", max_length=80, description="a name to show beside this miner's key")
    device: str = Field("", description="cpu, cuda, cuda:1, …; empty: the first GPU, or the CPU")
    bf16: bool = Field(False, description="run the forward pass in bfloat16")
    trainer_adversary: str = Field(
        "",
        description="for attack drills only: misbehave as copier, noisy-copier, freerider, noise, nan, oversized or late",
    )
    trainer_victim_dir: Path | None = Field(
        None, description="for the copiers: the work folder of the miner whose result leaked"
    )
