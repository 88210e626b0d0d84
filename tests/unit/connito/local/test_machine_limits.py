"""A disk without room is named before anything is started on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from connito.errors import Retry
from connito.local.machine_limits import FREE_DISK, check_limits


def test_a_disk_that_is_nearly_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FREE_DISK - 1))
    with pytest.raises(Retry, match=f"the disk of {tmp_path} has .* free, and at least .* are needed"):
        check_limits(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FREE_DISK))
    check_limits(tmp_path)
