"""What the store acknowledged is on disk: it syncs before it answers, and is whole after a power cut."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from connito.platform.servers import ObjectStore
from minio import Minio

pytestmark = pytest.mark.integration

BODIES = {f"{number:02}": os.urandom(10_000 + number) for number in range(12)}


def client(server: ObjectStore) -> Minio:
    return Minio(server.url.removeprefix("http://"), server.access_key, server.secret_key, secure=False)


def put(server: ObjectStore) -> None:
    minio = client(server)
    if not minio.bucket_exists("kept"):
        minio.make_bucket("kept")
    for name, body in BODIES.items():
        minio.put_object("kept", name, io.BytesIO(body), len(body))


def kept(server: ObjectStore) -> dict[str, bytes]:
    return {name: client(server).get_object("kept", name).read() for name in BODIES}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path / "a folder, ünïcode $HOME") as server:
        yield server


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows what is synced")
def test_every_acknowledged_object_and_its_name_are_synced(server: ObjectStore, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    watch = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace), "-p", str(server.pid)]
    with subprocess.Popen(watch, stderr=subprocess.PIPE) as tracing:
        assert tracing.stderr is not None
        assert b"attached" in tracing.stderr.readline()
        put(server)
        tracing.send_signal(signal.SIGINT)
    synced = Counter(Path(name).suffix for name in re.findall(r"f(?:data)?sync\(\d+<([^>]*)>", trace.read_text()))
    assert synced[".dat"] >= len(BODIES)
    assert synced[".db"] >= len(BODIES)


def another_key(record: bytes) -> bytes:
    """Return a record (cookie, key, size, body …) under a key that was not given yet."""
    return record[:4] + bytes.fromhex("00000000ffffff00") + record[12:]


def cut_power(server: ObjectStore, lost: str) -> None:
    """Leave of the folder what was certainly synced: indexes may be gone, or torn, and what was under way half there."""
    server.kill()
    objects = server.data_dir / "objects"
    (objects / "boot").write_text("another start of the machine")
    for index in objects.glob("*.idx"):
        if lost == "indexes":
            index.unlink()
        elif lost == "all entries":
            os.truncate(index, 0)
        elif lost == "part of an entry":
            os.truncate(index, max(0, index.stat().st_size - 7))
    for volume in objects.glob("*.dat"):
        half = another_key(volume.read_bytes()[8:5008])
        with volume.open("ab") as file:
            file.write({"zeros written": bytes(4096), "half a record written": half}.get(lost, b""))


@pytest.mark.parametrize(
    "lost", ["indexes", "all entries", "part of an entry", "zeros written", "half a record written"]
)
def test_acknowledged_objects_outlive_a_power_cut(server: ObjectStore, lost: str) -> None:
    put(server)
    cut_power(server, lost)
    server.start()
    assert kept(server) == BODIES
    put(server)
    assert kept(server) == BODIES
