"""Files that only the named keys can read, wherever they lie: held-out text in a store that somebody else may look into.

A sealed file begins with a header, the owner and for each reader a sealed box (X25519, from the reader's Ed25519 key) with the
content key; chunks under XChaCha20-Poly1305 follow, which the header is bound to. Everything follows from the owner's key, the
text and the readers: to seal again gives the same bytes, so that a digest may name them, and a reader can see that every
other reader was given the same key.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from nacl import bindings
from nacl.encoding import RawEncoder
from nacl.exceptions import CryptoError
from nacl.hash import blake2b
from nacl.public import Box, PrivateKey, SealedBox

from connito.errors import Invalid, VerificationFailed
from connito.files import replacing
from connito.v1 import reasons_pb2 as reasons
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.identity import Identity, exchange_key, is_public_key, short_key
from connito.wire.roster import OPERATOR, Roster

JUDGES = ("selector", "aggregator", "validator", OPERATOR)
MEDIA_TYPE = "application/vnd.connito.sealed"
CHUNK = 1 << 20
_MAGIC = b"connito.v1.sealed\n"
_MAX_HEADER = 1 << 20
CHUNK_TAG = bindings.crypto_aead_xchacha20poly1305_ietf_ABYTES


class NoKey(Invalid):
    """Sealed content that the key at hand does not open. It says nothing of the content."""


def judges(roster: Roster, owner: str) -> set[str]:
    """Return who reads what a customer holds out: those who measure with it, the operator for an audit, and itself."""
    return {owner}.union(*(roster.keys.get(role, frozenset()) for role in JUDGES))


def seal_file(source: Path, target: Path, owner: Identity, readers: Iterable[str]) -> None:
    """Write the sealed form of a file. Raises `Invalid` for a reader's key that is none."""
    named = sorted({owner.public, *readers})
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    key = owner.derive("sealed", digest, *named)
    header = json.dumps(
        {"owner": owner.public, "boxes": {reader: _box(key, reader).hex() for reader in named}}
    ).encode()
    with source.open("rb") as plain, target.open("wb") as out:
        out.write(_MAGIC + len(header).to_bytes(4, "big") + header)
        encrypt(plain, out, header, key)


def parse_boxes(data: bytes, where: str) -> dict[str, str]:
    """Return boxes by digest, as `connito access lend` writes them. Raises `Invalid` for anything else."""
    try:
        boxes = json.loads(data)
    except (ValueError, RecursionError):
        boxes = None
    if not isinstance(boxes, dict) or not all(isinstance(box, str) for box in boxes.values()):
        raise Invalid(f"{where} is no file of `connito access lend`; ask the operator for one")
    return boxes


def lend(path: Path, me: Identity, reader: str) -> str:
    """Return the box with which another reader, who was admitted since, opens a sealed file. Raises `Invalid` as `unsealed`."""
    with path.open("rb") as file:
        return _lend(file, me, reader)


def lend_bytes(sealed: bytes, me: Identity, reader: str) -> str:
    """Return the same for a short sealed file."""
    return _lend(io.BytesIO(sealed), me, reader)


def _lend(file: BinaryIO, me: Identity, reader: str) -> str:
    return _box(_content_key(_parse(_read_header(file))["boxes"], me), reader).hex()


def unsealed(
    path: Path, ref: ArtifactRef, me: Identity | None, owner: str, lent: Mapping[str, str] = MappingProxyType({})
) -> Path:
    """Return an artifact's file in clear, kept beside a sealed one; a file that is not sealed is returned as it is.

    `lent`: by digest, the box that a reader gave to `me`. Whoever gave it: the content authenticates the key.
    Raises `Invalid` (NOT_PERMITTED) where it was sealed for others, or by another than `owner`: whoever copies somebody's
    sealed file into a run of its own must not have it judged there. Raises `VerificationFailed` for one that is damaged.
    """
    if ref.media_type != MEDIA_TYPE:
        return path
    if me is None:
        raise NoKey(
            f"{ref.digest[:12]}… is sealed, and there is no key here to open it: give one that may with CONNITO_KEY_FILE, or "
            "the data directory that has it",
            reason=reasons.REASON_NOT_PERMITTED,
        )
    target = path.with_name(f"{ref.digest}.{hashlib.sha256((me.public + owner).encode()).hexdigest()[:12]}.open")
    # Each time: opening checks every byte, which what lay there since would not be.
    with replacing(target) as draft, path.open("rb") as file:
        draft.touch(0o600)
        with draft.open("wb") as out:
            _unseal(file, out, me, owner, ref.digest, lent)
    return target


def unsealed_bytes(data: bytes, me: Identity, digest: str, lent: Mapping[str, str]) -> tuple[bytes, str]:
    """Return the content of a short sealed file, and who sealed it. Raises as `unsealed`."""
    out = io.BytesIO()
    owner = _unseal(io.BytesIO(data), out, me, None, digest, lent)
    return out.getvalue(), owner


def _unseal(
    file: BinaryIO, out: BinaryIO, me: Identity, owner: str | None, digest: str, lent: Mapping[str, str]
) -> str:
    """Write the content; return the owner, who has to be `owner` where one is given."""
    header = _read_header(file)
    fields = _parse(header)
    if owner is not None and fields["owner"] != owner:
        raise Invalid("it was sealed by another than this run's customer", reason=reasons.REASON_NOT_PERMITTED)
    boxes = fields["boxes"]
    if me.public not in boxes and digest in lent and (reader := lent.get("reader", me.public)) != me.public:
        raise NoKey(
            f"it was lent to the key {short_key(reader)}, and this one is {short_key(me.public)}: who may read it lends it to "
            "this one, in a file of its own: `connito access lend`",
            reason=reasons.REASON_NOT_PERMITTED,
        )
    key = _content_key({**({me.public: lent[digest]} if digest in lent else {}), **boxes}, me)
    try:
        fair = all(_box(key, reader).hex() == box for reader, box in boxes.items())
    except (CryptoError, ValueError) as error:
        raise _damaged("its key does not open") from error
    if not fair:
        raise _damaged("its readers were not all given the same key")
    for chunk in decrypted(file, header, key):
        out.write(chunk)
    return str(fields["owner"])


def _content_key(boxes: Mapping[str, str], me: Identity) -> bytes:
    if me.public not in boxes:
        raise NoKey(
            f"it was sealed for {len(boxes)} other keys than {short_key(me.public)}, which was not admitted then; who may read "
            "it can lend it to that key: `connito access lend`",
            reason=reasons.REASON_NOT_PERMITTED,
        )
    try:
        return SealedBox(me.exchange_key).decrypt(bytes.fromhex(boxes[me.public]))
    except (CryptoError, ValueError) as error:
        raise _damaged("its key does not open") from error


def _read_header(file: BinaryIO) -> bytes:
    start = file.read(len(_MAGIC) + 4)
    length = int.from_bytes(start[len(_MAGIC) :], "big")
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + 4 or length > _MAX_HEADER:
        raise _damaged("it does not begin like a sealed file")
    return file.read(length)


def _parse(header: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(header)
        boxes = fields["boxes"]
        whole = isinstance(fields["owner"], str) and isinstance(boxes, dict)
        if whole and all(isinstance(box, str) and is_public_key(reader) for reader, box in boxes.items()):
            return fields
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _damaged("its header is none")


def _box(key: bytes, reader: str) -> bytes:
    """Return the sealed box of a content key: as `SealedBox` makes it, but with a sender that follows from key and reader."""
    theirs = exchange_key(reader)
    sender = PrivateKey(hashlib.sha256(b"connito.v1.sender\x00" + key + reader.encode()).digest())
    nonce = blake2b(bytes(sender.public_key) + bytes(theirs), digest_size=Box.NONCE_SIZE, encoder=RawEncoder)
    return bytes(sender.public_key) + Box(sender, theirs).encrypt(key, nonce).ciphertext


def encrypt(plain: BinaryIO, out: BinaryIO, header: bytes, key: bytes) -> None:
    """Write what `encrypted` yields."""
    for chunk in encrypted(plain, header, key):
        out.write(chunk)


def encrypted(plain: BinaryIO, header: bytes, key: bytes) -> Iterator[bytes]:
    """Yield what is left of `plain` in chunks that are bound to a header and to their order. A key is for one content."""
    work = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt
    for chunk, nonce in _chunks(plain, CHUNK):
        yield work(chunk, hashlib.sha256(header).digest(), nonce, key)


def decrypted(file: BinaryIO, header: bytes, key: bytes) -> Iterator[bytes]:
    """Yield the chunks that `encrypt` wrote, in clear. Raises `VerificationFailed` at the first that is not of header and key."""
    work = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt
    for index, (chunk, nonce) in enumerate(_chunks(file, CHUNK + CHUNK_TAG)):
        try:
            yield work(chunk, hashlib.sha256(header).digest(), nonce, key)
        except (CryptoError, ValueError) as error:
            raise _damaged(f"chunk {index} does not open") from error


def _chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield chunks, an empty one of an empty file, each with a nonce of its place and of whether it is the last."""
    chunk, index, last = file.read(size), 0, False
    while not last:
        following = file.read(size)
        last = not following
        yield chunk, index.to_bytes(23, "big") + bytes([last])
        chunk, index = following, index + 1


def _damaged(what: str) -> VerificationFailed:
    return VerificationFailed(
        f"a sealed file is damaged, or whoever made it cheats: {what}", reason=reasons.REASON_DIGEST_MISMATCH
    )
