"""A folder that is not at rest."""

from __future__ import annotations

import os
from contextlib import ExitStack
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


def test_a_second_readers_servers_write_to_nothing_of_the_first(tmp_path: Path) -> None:
    """Servers that start mend what they find in place: a broker cuts the torn end of its last block, the store its volume."""
    data = DataDir.at(tmp_path)
    files = (
        "nats/jetstream/A/streams/RUNS/msgs/1.blk",
        "objects/objects/connito_1.dat",
        "objects/objects/connito_1.idx",
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"acknowledged")
    with ExitStack() as stack:
        copy = resting._copy(data, stack)
        for name in files:
            assert (copy / name).read_bytes() == b"acknowledged"
            os.truncate(copy / name, 3)
        assert [(tmp_path / name).read_bytes() for name in files] == [b"acknowledged"] * 3
    assert not list(tmp_path.glob(f"{resting.READER}*"))
