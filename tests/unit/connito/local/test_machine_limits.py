"""A disk without room is named before anything is started on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from connito.errors import Retry
from connito.local.machine_limits import FREE_DISK, check_limits, multiplies_bf16


def test_a_disk_that_is_nearly_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FREE_DISK - 1))
    with pytest.raises(Retry, match=f"the disk of {tmp_path} has .* free, and at least .* are needed"):
        check_limits(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FREE_DISK))
    check_limits(tmp_path)


@pytest.mark.parametrize(
    ("said", "has"),
    [
        ("model name\t: A\nflags\t\t: fpu avx512_bf16 vnni\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("model name\t: bf16\n", False),
        ("", False),
    ],
)
def test_a_processor_says_whether_it_multiplies_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, has: bool
) -> None:
    monkeypatch.setattr("connito.local.machine_limits.CPUINFO", tmp_path / "cpuinfo")
    assert not multiplies_bf16()
    (tmp_path / "cpuinfo").write_text(said)
    assert multiplies_bf16() is has
