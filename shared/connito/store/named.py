"""Keys of artifacts in the store, by what a reference says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from connito.errors import Invalid
from connito.store.cache import digest_of_file
from connito.v1 import artifacts_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.hashing import is_digest

PRIVATE = artifacts_pb2.REALM_PRIVATE
REALMS = {
    artifacts_pb2.REALM_PUBLIC: "public",
    artifacts_pb2.REALM_HOLDOUT: "holdout",
    artifacts_pb2.REALM_SUBMISSION: "submissions",
    PRIVATE: "private",
}
# What is listed to find every object: those of a secret lie together.
PREFIXES = tuple(f"{name}/" if realm == PRIVATE else f"{name}/sha256/" for realm, name in REALMS.items())
# The form of a key, for whoever reads one from a file.
KEYS = r"(?:(?:public|holdout|submissions)/sha256|private/[0-9a-f]{64})/[0-9a-f]{64}"


@dataclass(frozen=True)
class StoredObject:
    """An artifact in the store; `age_s` seconds since it was written, by the store's clock."""

    key: str
    digest: str
    size: int
    age_s: float
    media_type: str


def key_of(ref: ArtifactRef) -> str:
    """Return `<realm>/sha256/<hex>`, or `private/<secret>/<hex>`. Raises `Invalid` for a reference without a realm or with a
    digest that is none.
    """
    if ref.realm not in REALMS:
        raise Invalid(f"the reference to {ref.digest[:12]}… names no realm")
    for digest in (ref.digest, *([ref.secret] if ref.realm == PRIVATE else [])):
        if not is_digest(digest):
            raise Invalid(f"{digest[:80]!r} is not a SHA-256 in lower-case hex")
    return f"{REALMS[ref.realm]}/{ref.secret if ref.realm == PRIVATE else 'sha256'}/{ref.digest}"


def ref_of_key(key: str, size: int, media_type: str = "") -> ArtifactRef:
    """Return the reference to what lies at a key that `objects` told."""
    name, between, digest = key.split("/")
    realm = next(realm for realm, its in REALMS.items() if its == name)
    secret = between if realm == PRIVATE else ""
    return ArtifactRef(digest=digest, size=size, media_type=media_type, realm=realm, secret=secret)


def ref_of_bytes(data: bytes, media_type: str, place: artifacts_pb2.Realm.ValueType | ArtifactRef) -> ArtifactRef:
    """Return the reference that these bytes have in a realm, or where another reference says (`wire.private.placed`)."""
    return _ref(hashlib.sha256(data).hexdigest(), len(data), media_type, place)


def ref_of_file(path: Path, media_type: str, place: artifacts_pb2.Realm.ValueType | ArtifactRef) -> ArtifactRef:
    """Return the reference that a file's bytes have in a realm, or where another reference says."""
    return _ref(*digest_of_file(path), media_type, place)


def beside(ref: ArtifactRef, digest: str, size: int = 0, media_type: str = "") -> ArtifactRef:
    """Return the reference to what an artifact names by its digest, and lies where that does."""
    return _ref(digest, size, media_type, ref)


def _ref(digest: str, size: int, media_type: str, place: artifacts_pb2.Realm.ValueType | ArtifactRef) -> ArtifactRef:
    where = place if isinstance(place, ArtifactRef) else ArtifactRef(realm=place)
    return ArtifactRef(digest=digest, size=size, media_type=media_type, realm=where.realm, secret=where.secret)
