"""A folder that is not at rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Retry
from connito.platform import resting
from connito.platform.datadir import DataDir


def test_where_a_platform_runs_nothing_is_read(tmp_path: Path) -> None:
    data = DataDir.at(tmp_path)
    for name in ("nats", "objects", "keys"):
        (tmp_path / name).mkdir()
    for name in ("roster.json", "keys/store.secret", "keys/customer.nk"):
        (tmp_path / name).touch()
    data.platform_file.touch()
    with data.lock(), pytest.raises(Retry):
        resting.wake(data)
