"""Encryption of what a run that is not public leaves in the store; its name there is the digest of the content all the same.

The customer draws one secret a run and seals it for those who work on the run; the file of that lies in the store too. Each
artifact has a key of its own, which follows from the secret and the artifact's digest, so that a miner can be told one key
and no other. Chunks under XChaCha20-Poly1305 follow a header that names the secret; a SHA-256 of all that is before it ends
the file, so that whoever copies it without a key notices damage. The same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from nacl.exceptions import CryptoError
from nacl.public import SealedBox

from connito.errors import ObjectDamaged
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef
from connito.v1.run_pb2 import RunSpec
from connito.wire.identity import Identity, exchange_key
from connito.wire.roster import Roster
from connito.wire.sealing import CHUNK, CHUNK_TAG, JUDGES, decrypted, encrypted

SECRET_BYTES = 32
READERS = (*JUDGES, "committer", "library")
_MAGIC = b"connito.v1.private\n"
_END = hashlib.sha256().digest_size
_BESIDE = len(_MAGIC) + 32 + _END


def readers(roster: Roster, owner: str) -> set[str]:
    """Return for whom a customer seals a run's secret: those who judge, the library that shelves what comes out, and the
    committer, which tells miners and readers the keys of what they are entitled to.
    """
    return {owner}.union(*(roster.keys.get(role, frozenset()) for role in READERS))


def secret_of(owner: Identity, what: str) -> bytes:
    """Return a customer's secret for a run, or for an expert that it made."""
    return owner.derive("private", what)


def is_public(spec: RunSpec) -> bool:
    """Return whether everybody may see what comes out of a run."""
    return spec.visibility in ("", "public")


def placed(spec: RunSpec) -> ArtifactRef:
    """Return where what a run makes belongs: realm and secret of a reference."""
    return at(spec.secret.digest)


def at(secret: str) -> ArtifactRef:
    """Return where belongs what is encrypted under a secret, or under none for an empty one."""
    return ArtifactRef(realm=REALM_PRIVATE if secret else REALM_PUBLIC, secret=secret)


def key_of_content(secret: bytes, digest: str) -> bytes:
    """Return the key of one artifact."""
    return hmac.new(secret, b"connito.v1.private\x00" + digest.encode(), hashlib.sha256).digest()


def boxed(key: bytes, reader: str) -> bytes:
    """Return a key in a box that only `reader` opens."""
    return bytes(SealedBox(exchange_key(reader)).encrypt(key))


def unboxed(box: bytes, me: Identity) -> bytes:
    """Return what is in a box for `me`; nothing where it does not open."""
    try:
        return bytes(SealedBox(me.exchange_key).decrypt(box))
    except (CryptoError, ValueError, TypeError):
        return b""


def stored_bytes(size: int) -> int:
    """Return how long an artifact of `size` bytes is when it is encrypted."""
    return _BESIDE + size + CHUNK_TAG * max(1, -(-size // CHUNK))


def content_bytes(stored: int) -> int:
    """Return how long the content of an encrypted object is."""
    body = max(CHUNK_TAG, stored - _BESIDE)
    return body - CHUNK_TAG * -(-body // (CHUNK + CHUNK_TAG))


class Stream:
    """A file that is made while it is read."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._rest = parts, b""

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, fewer at the end; all that is left for a negative size."""
        while size < 0 or len(self._rest) < size:
            part = next(self._parts, None)
            if part is None:
                break
            self._rest += part
        size = len(self._rest) if size < 0 else size
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


def closed(content: BinaryIO, secret: str, key: bytes) -> Stream:
    """Return the encrypted form of a file; `secret` is the digest of the sealed file that the key follows from."""
    header = _MAGIC + bytes.fromhex(secret)

    def parts() -> Iterator[bytes]:
        seen = hashlib.sha256(header)
        yield header
        for chunk in encrypted(content, header, key):
            seen.update(chunk)
            yield chunk
        yield seen.digest()

    return Stream(parts())


def opened(read: Callable[[int], bytes], ref: ArtifactRef, key: bytes) -> Stream:
    """Return the content of an encrypted object. Reading raises `ObjectDamaged` where it is another's, or damaged."""

    def parts() -> Iterator[bytes]:
        body = _Body(read)
        header = body.read(len(_MAGIC) + 32)
        if header != _MAGIC + bytes.fromhex(ref.secret):
            raise _damaged(ref)
        yield from decrypted(cast(BinaryIO, body), header, key)

    return Stream(_named(parts(), ref))


def whole(read: Callable[[int], bytes]) -> bool:
    """Return whether an encrypted object is as it was written; for who copies it and has no key."""
    body, seen = _Body(read), hashlib.sha256()
    while part := body.read(CHUNK):
        seen.update(part)
    return seen.digest() == body.end


class _Body:
    """A stream without the hash at its end, which is in `end` once all is read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self.end = read, b""

    def read(self, size: int) -> bytes:
        while len(self.end) < size + _END and (part := self._read(size + _END - len(self.end))):
            self.end += part
        cut = max(0, min(size, len(self.end) - _END))
        taken, self.end = self.end[:cut], self.end[cut:]
        return taken


def _named(parts: Iterator[bytes], ref: ArtifactRef) -> Iterator[bytes]:
    from connito.errors import VerificationFailed

    try:
        yield from parts
    except VerificationFailed as error:
        raise _damaged(ref) from error


def _damaged(ref: ArtifactRef) -> ObjectDamaged:
    return ObjectDamaged(
        f"the encrypted object of {ref.digest} does not open with its run's key: it is damaged or was replaced; restore it "
        "from a copy"
    )
