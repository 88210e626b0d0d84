"""Indexes that a server would believe although they lack entries."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.platform import durable_objects


@pytest.mark.parametrize(
    ("index", "volume", "kept"),
    [(32, 500, True), (0, 8, True), (0, 0, True), (0, 500, False), (33, 500, False), (15, 500, False)],
)
def test_a_torn_index_goes_so_that_the_server_makes_it_anew(
    tmp_path: Path, index: int, volume: int, kept: bool
) -> None:
    durable_objects.prepare(tmp_path)
    for ending, size in ((".idx", index), (".dat", volume)):
        (tmp_path / "objects" / f"connito_1{ending}").write_bytes(bytes(size))
    durable_objects.prepare(tmp_path)
    assert (tmp_path / "objects" / "connito_1.idx").exists() == kept
    assert (tmp_path / "objects" / "connito_1.dat").stat().st_size == volume
