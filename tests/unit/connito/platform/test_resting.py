"""A folder at rest that somebody else reads already."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Retry
from connito.platform import resting
from connito.platform.datadir import DataDir


def test_who_reads_already_is_not_taken_for_a_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resting, "WAIT_SECONDS", 0.0)
    data = DataDir.at(tmp_path)
    for name in ("nats", "objects", "keys"):
        (tmp_path / name).mkdir()
    for name in ("roster.json", "keys/store.secret", "keys/customer.nk"):
        (tmp_path / name).touch()
    with data.lock(), pytest.raises(Retry, match=r"another command .* reads .* end it"):
        resting.wake(data)
