"""One platform to a bucket: an object in it holds the public keys of the one that came first.

Two platforms in one bucket do not see each other, and whoever tidies one takes away what the other has.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from minio.error import S3Error

from connito.errors import Fatal
from connito.store.artifacts import ArtifactStore
from connito.store.explained import MISSING
from connito.wire.roster import OPERATOR, ROLES, Roster

KEY, _MOST = "public/platform", 1 << 20
# Customers and validators may be several platforms'.
_OWN = {OPERATOR, *ROLES} - {"customer", "validator"}


async def claim(store: ArtifactStore, roster: Roster, *, first: bool) -> None:
    """Return where the bucket is this platform's, or nobody's; `first`: nobody's becomes this one's.

    It is this one's where any key that its roster names or has retired is on it, so that keys may be changed one by one.
    Raises `Fatal` for another platform's, with the remedy, and what the store raises.
    """
    mine = {key for role in _OWN for key in roster.keys.get(role, ())}
    mine |= {key for key, (role, _) in roster.retired.items() if role in _OWN}
    said = json.dumps(sorted(mine)).encode()
    there = await store._call("get", KEY, lambda: _write_once(store, said) if first else _read(store))
    if not there or there == said:
        return
    try:
        known = set(map(str, json.loads(there)))
    except (ValueError, TypeError) as error:
        raise Fatal(f"{KEY} in the bucket {store.bucket} is not what a platform writes; delete that object") from error
    if not mine & known:
        raise Fatal(
            f"the bucket {store.bucket} of the store at {store.endpoint} is another platform's, whose keys its object {KEY} "
            "holds: give this platform one of its own (CONNITO_S3_BUCKET, in Helm `store.bucket`), or delete that object where "
            "the other is gone for good"
        )
    if first:
        await store._call("put", KEY, lambda: store._client._put_object(store.bucket, KEY, said))


def _read(store: ArtifactStore, none: Collection[str] = MISSING) -> bytes:
    try:
        return store._read(KEY, 0, 0, limit=_MOST)
    except S3Error as error:
        if error.code not in none:
            raise
        return b""


def _write_once(store: ArtifactStore, said: bytes) -> bytes:
    """Write the object unless it is there, and return what it holds: of several at once all are answered the same."""
    # Whoever may not list is not told that there is none.
    if there := _read(store, {*MISSING, "AccessDenied"}):
        return there
    try:
        store._client._put_object(store.bucket, KEY, said, {"If-None-Match": "*"})
    except S3Error as error:
        if error.code != "PreconditionFailed":
            raise
    return _read(store)
