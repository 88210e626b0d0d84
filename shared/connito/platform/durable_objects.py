"""Give SeaweedFS what it needs to keep every object that it acknowledged, through a power cut too.

By default it syncs neither the volumes, which hold the content, nor the names. A rule of its filer makes it sync volumes, and a
database that syncs keeps the names. The index of a volume is synced by nothing, and the server cuts off the end of a volume
that its index does not know; but it reads an index that is missing from the volume. So after each start of the machine
there is none.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import grpc

from connito.files import write_durably

_DATABASE = '[sqlite]\nenabled = true\ndbFile = "objects/filer.db"\n'
_ENTRY_BYTES, _EMPTY_VOLUME_BYTES = 16, 8
_REFUSED = "/etc/connito-rules-in-force"
_RULES = json.dumps(
    {"locations": [{"locationPrefix": "/", "fsync": True}, {"locationPrefix": _REFUSED, "readOnly": True}]}
).encode()


def prepare(folder: Path) -> None:
    """Make `folder` ready for a server that starts in it: where its names go, and no index that may lack entries."""
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    write_durably(folder / "filer.toml", _DATABASE)
    mark, boot = objects / "boot", _boot_id()
    before = mark.read_text() if mark.exists() else ""
    for index in objects.glob("*.idx"):
        if not (boot and before == boot) or _is_torn(index):
            index.unlink()
    write_durably(mark, boot)


def _is_torn(index: Path) -> bool:
    """Return whether an index ends within an entry, or is empty beside a volume that is not."""
    volume, size = index.with_suffix(".dat"), index.stat().st_size
    return size % _ENTRY_BYTES > 0 or (not size and volume.exists() and volume.stat().st_size > _EMPTY_VOLUME_BYTES)


def not_synced(filer: grpc.Channel) -> str:
    """Have the server sync what it acknowledges; return what is missing until it does, or the empty string."""
    try:
        answer = _call(filer, "AssignVolume", _field(1, 1) + _field(6, f"{_REFUSED}/probe"))
        if b"read only" in answer:
            return ""
        # Taken up some time after they were stored. Stored ones are not always found at a start, so they are stored again.
        now = int(time.time())
        attributes = _field(1, len(_RULES)) + _field(2, now) + _field(3, 0o644)
        entry = _field(1, "filer.conf") + _field(4, attributes) + _field(9, _RULES)
        _call(filer, "CreateEntry", _field(1, "/etc/seaweedfs") + _field(2, entry))
        time.sleep(0.1)
    except grpc.RpcError as error:
        return f"it takes no rules yet ({error.code()})"
    return "its rules are not in force yet"


def _call(filer: grpc.Channel, method: str, message: bytes) -> bytes:
    asked = filer.unary_unary(f"/filer_pb.SeaweedFiler/{method}", request_serializer=None, response_deserializer=None)
    answer: bytes = asked(message, timeout=2)
    return answer


def _field(number: int, value: int | str | bytes) -> bytes:
    """Return one field of a message of the filer's as it is on the wire; the project compiles none of its definitions."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _boot_id() -> str:
    """Return what is another one after each start of the machine; empty where nothing says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
