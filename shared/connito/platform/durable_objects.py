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

import urllib3

from connito.files import write_durably

_DATABASE = '[sqlite]\nenabled = true\ndbFile = "objects/filer.db"\n'
# Of a folder that an earlier version made.
_UNSYNCED_DATABASE = '[leveldb2]\nenabled = true\ndir = "objects/filerldb2"\n'
_REFUSED = "/etc/connito-rules-in-force"
_RULES = json.dumps(
    {"locations": [{"locationPrefix": "/", "fsync": True}, {"locationPrefix": _REFUSED, "readOnly": True}]}
).encode()


def prepare(folder: Path) -> None:
    """Make `folder` ready for a server that starts in it: where its names go, and no index that may lack entries."""
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    unsynced = (objects / "filerldb2").exists()
    write_durably(folder / "filer.toml", _UNSYNCED_DATABASE if unsynced else _DATABASE)
    mark, boot = objects / "boot", _boot_id()
    before = mark.read_text() if mark.exists() else ""
    if not (boot and before == boot):
        for index in objects.glob("*.idx"):
            index.unlink()
    write_durably(mark, boot)


def not_synced(filer: str) -> str:
    """Have the server sync what it acknowledges; return what is missing until it does, or the empty string."""
    pool = urllib3.PoolManager(timeout=2, retries=False)
    try:
        if pool.request("PUT", f"{filer}{_REFUSED}/probe", body=b"probe").status >= 400:
            return ""
        # Taken up some time after they were stored. Stored ones are not always found at a start, so they are stored again.
        pool.request("PUT", f"{filer}/etc/seaweedfs/filer.conf", body=_RULES)
        time.sleep(0.1)
    except urllib3.exceptions.HTTPError as error:
        return f"it takes no rules yet ({type(error).__name__})"
    return "its rules are not in force yet"


def _boot_id() -> str:
    """Return what is another one after each start of the machine; empty where nothing says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
