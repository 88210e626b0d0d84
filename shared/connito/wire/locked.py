"""Files that nobody reads before their key is told: what a miner uploads, until it reveals.

A locked file begins with a hash of its key and of what is inside: so the digest that was committed to is of one key and one
content, though the key is told later. Chunks under XChaCha20-Poly1305 follow, each bound to that header and to its place.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from connito.errors import Invalid, VerificationFailed
from connito.v1 import reasons_pb2 as reasons
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.hashing import hash_fields, is_digest
from connito.wire.sealing import CHUNK, CHUNK_TAG, decrypted, encrypt

KEY_BYTES = 32
_MAGIC = b"connito.v1.locked\n"
_TAG = b"connito.v1.locked"


def locked_bytes(size: int) -> int:
    """Return how long a file of `size` bytes is when it is locked."""
    return len(_MAGIC) + hashlib.sha256().digest_size + size + CHUNK_TAG * max(1, -(-size // CHUNK))


def is_key(ref: ArtifactRef) -> bool:
    """Return whether a reference tells a key, and what it opens to."""
    return len(ref.key) == KEY_BYTES and is_digest(ref.content)


def lock_file(source: Path, target: Path, key: bytes, content: str) -> None:
    """Write the locked form of a file, readable by its owner alone. `content`: its SHA-256 in hex; one key is for one content."""
    header = _header(key, content)
    target.touch(0o600)
    with source.open("rb") as plain, target.open("wb") as out:
        out.write(header)
        encrypt(plain, out, header, key)


def unlocked(path: Path, ref: ArtifactRef, folder: Path) -> Path:
    """Return a file in clear, a new one in `folder`; a file whose reference tells no key is returned as it is.

    Raises `Invalid` (KEY_MISMATCH) where the key told does not open it, or to something else than was said. Memory: two chunks.
    """
    if not ref.key:
        return path
    target, header, read = folder / f"{ref.digest}.clear", _header(ref.key, ref.content), hashlib.sha256()
    with path.open("rb") as file:
        # Before anything is written: the file in clear of the one whose upload it is may lie there.
        if not hmac.compare_digest(file.read(len(header)), header):
            raise _mismatch("the key in the reveal is not the one that the upload was locked with")
        target.touch(0o600)
        try:
            with target.open("wb") as out:
                for chunk in decrypted(file, header, ref.key):
                    read.update(chunk)
                    out.write(chunk)
        except VerificationFailed as error:
            raise _mismatch("a part of the upload does not open") from error
    if read.hexdigest() != ref.content:
        raise _mismatch("what is inside of the upload is not what the reveal says")
    return target


def _header(key: bytes, content: str) -> bytes:
    return _MAGIC + hash_fields(_TAG, key, content)


def _mismatch(what: str) -> Invalid:
    return Invalid(f"{what}; lock the file, commit and reveal with one key", reason=reasons.REASON_KEY_MISMATCH)
