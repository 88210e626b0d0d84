"""The secrets of runs that are not public, as far as somebody may open them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.identity import Identity
from connito.wire.private import SECRET_BYTES, key_of_content
from connito.wire.sealing import NoKey, parse_boxes, unsealed_bytes


class Keyring:
    """Opens each secret once. `lent`: the file of `connito access lend`, read when it is needed."""

    def __init__(self, me: Identity | None = None, lent: Path | None = None) -> None:
        self._me, self._lent = me, lent
        self._known: dict[str, tuple[bytes, str]] = {}

    def keep(self, secret: str, value: bytes, owner: str) -> None:
        """Take a secret that is known, by the digest of its sealed file."""
        self._known[secret] = (value, owner)

    def key(self, ref: ArtifactRef, read: Callable[[str], bytes]) -> bytes:
        """Return the key of an encrypted artifact. `read` returns the sealed file of a digest. Raises `NoKey`."""
        return key_of_content(self._open(ref.secret, read)[0], ref.digest)

    def owner(self, secret: str, read: Callable[[str], bytes]) -> str:
        """Return whose secret it is. Raises `NoKey`."""
        return self._open(secret, read)[1]

    def _open(self, secret: str, read: Callable[[str], bytes]) -> tuple[bytes, str]:
        if secret not in self._known:
            if self._me is None:
                raise NoKey("it is private, and there is no key here to open it", reason=reasons.REASON_NOT_PERMITTED)
            value, owner = unsealed_bytes(read(secret), self._me, secret, self._boxes())
            if len(value) != SECRET_BYTES:
                raise Invalid(f"the secret {secret[:12]}… has {len(value)} bytes, not {SECRET_BYTES}")
            self.keep(secret, value, owner)
        return self._known[secret]

    def _boxes(self) -> dict[str, str]:
        path = self._lent
        return {} if path is None or not path.exists() else parse_boxes(path.read_bytes(), str(path))
