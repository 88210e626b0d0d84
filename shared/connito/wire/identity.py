"""Identities: ed25519 nkeys, one seed for the broker's authentication and, domain-separated, for signatures."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import nkeys
from nacl.exceptions import BadSignatureError
from nacl.public import PrivateKey, PublicKey
from nacl.signing import SigningKey, VerifyKey

from connito.errors import Invalid
from connito.files import write_durably
from connito.wire import passes

# Everything that Connito signs starts with this. A broker's login nonce never may (see `sign_nonce`).
SIGNATURE_TAG = b"connito.v1.signature\x00"


@dataclass(frozen=True)
class Identity:
    """A private key. `public` is the nkey (`U…`, 56 characters) that the rest of the world knows.

    `passes` open the broker to it: one for everything, or one to speak with and one to read with. A broker that lets
    everybody in needs none.
    """

    seed: str = field(repr=False)
    public: str
    _key: SigningKey = field(repr=False)
    passes: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_seed(cls, seed: str) -> Identity:
        """Read an nkey user seed (`SU…`). Raises `Invalid` if it is not one."""
        text = seed.strip()
        try:
            prefix, raw = nkeys.decode_seed(text.encode())
            pair = nkeys.from_seed(bytearray(text.encode()))
            intact = nkeys.encode_seed(bytes(raw), prefix).decode() == text
        except (nkeys.NkeysError, ValueError) as error:
            raise Invalid("this is not an nkey seed; make one with `connito miner init`") from error
        if prefix != nkeys.PREFIX_BYTE_USER or not intact:
            raise Invalid(
                "this seed is damaged or not a user's (SU…); copy it again or make one with `connito miner init`"
            )
        return cls(text, pair.public_key.decode(), SigningKey(bytes(raw)))

    @classmethod
    def generate(cls, entropy: bytes | None = None) -> Identity:
        """Return a new identity. `entropy` (32 bytes) makes it reproducible, for tests and seeded runs only."""
        raw = entropy if entropy is not None else os.urandom(32)
        return cls.from_seed(nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER).decode())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file: a seed, and after it the key's passes. Raises `Invalid` when it is missing or something else."""
        try:
            seed, _, tokens = path.read_text().strip().partition("\n")
            identity = cls.from_seed(seed)
            return identity.with_passes(passes.parse(tokens, identity.public)) if tokens.strip() else identity
        except (Invalid, UnicodeDecodeError) as error:
            why = error if isinstance(error, Invalid) else "it is not text; a key file is made by `connito miner init`"
            raise Invalid(f"the key file {path} is damaged or another kind of file: {why}") from error
        except OSError as error:
            raise Invalid(
                f"cannot read the key file {path}: {error.strerror}; make one with `connito miner init`"
            ) from error

    def with_passes(self, tokens: tuple[str, ...]) -> Identity:
        """Return the same key with these passes."""
        return replace(self, passes=tokens)

    def save(self, path: Path) -> None:
        """Write the seed and the passes, readable by the owner only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "\n".join((self.seed, *self.passes)) + "\n", 0o600)

    def sign(self, message: bytes) -> bytes:
        """Return 64-byte ed25519 signature over the tag and `message`."""
        signature = bytes(self._key.sign(SIGNATURE_TAG + message).signature)
        _remember((self.public, message, signature), True)
        return signature

    def sign_nonce(self, nonce: bytes) -> bytes:
        """Answer a broker's login challenge, unless the challenge is crafted to be something that we sign."""
        if nonce.startswith(SIGNATURE_TAG[:8]) or b"\n" in nonce:
            raise Invalid("the broker sent a login challenge in the form of a Connito signature: refusing to sign it")
        return bytes(self._key.sign(nonce).signature)

    def sign_text(self, text: bytes) -> bytes:
        """Return the signature over lines of text as they are, for notes that other programs verify (`wire.checkpoint`)."""
        if text.startswith(SIGNATURE_TAG) or not text.endswith(b"\n"):
            raise Invalid("only lines of text are signed without a tag")
        return bytes(self._key.sign(text).signature)

    @property
    def exchange_key(self) -> PrivateKey:
        """Return the X25519 key that opens what is sealed to `public`."""
        return self._key.to_curve25519_private_key()

    def derive(self, *context: str) -> bytes:
        """Return 32 secret bytes that only this key can produce for `context`: salts and beacon secrets survive a
        restart.
        """
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in context)
        return hmac.new(
            hashlib.sha256(b"connito.v1.derive\x00" + bytes(self._key)).digest(), message, hashlib.sha256
        ).digest()


@lru_cache(maxsize=4096)
def _verify_key(public: str) -> VerifyKey:
    """Decode `U…`: base32 of prefix byte, 32 key bytes and a little-endian CRC-16."""
    raw = base64.b32decode(public.encode())
    if len(raw) != 35 or raw[0] != nkeys.PREFIX_BYTE_USER:
        raise ValueError("not a public user nkey")
    if int.from_bytes(raw[33:], "little") != nkeys.crc16(bytearray(raw[:33])):
        raise ValueError("the public nkey's checksum is wrong")
    return VerifyKey(raw[1:33])


def exchange_key(public: str) -> PublicKey:
    """Return the X25519 key that seals to a public nkey. Raises `Invalid` for what is none."""
    try:
        return _verify_key(public).to_curve25519_public_key()
    except (ValueError, RuntimeError) as error:
        raise Invalid(f"{public[:60]!r} is no public key that could be sealed to") from error


def short_key(public: str) -> str:
    """Return the start of a public key, enough to tell people apart."""
    return f"{public[:12]}…"


def is_public_key(text: str) -> bool:
    """Return whether `text` is a well-formed public user nkey."""
    try:
        _verify_key(text)
    except ValueError:
        return False
    return True


# Whoever reads a message from the log and from a work queue looks at it twice, and whoever signs one reads it back.
_REMEMBERED = 4096
_known: dict[tuple[str, bytes, bytes], bool] = {}


def _remember(signed: tuple[str, bytes, bytes], holds: bool) -> bool:
    _known[signed] = holds
    if len(_known) > _REMEMBERED:
        # The oldest; another thread may have taken it meanwhile.
        with suppress(StopIteration, RuntimeError):
            _known.pop(next(iter(_known)), None)
    return holds


def verify(public: str, message: bytes, signature: bytes) -> bool:
    """Return whether `signature` is `public`'s over `message`. Malformed keys and signatures are simply not valid."""
    signed = (public, message, signature)
    known = _known.get(signed)
    return known if known is not None else _remember(signed, verify_text(public, SIGNATURE_TAG + message, signature))


def raw_key(public: str) -> bytes:
    """Return the 32 bytes of a public key. Raises `ValueError` for what is none."""
    return bytes(_verify_key(public))


def verify_text(public: str, text: bytes, signature: bytes) -> bool:
    """Return whether `signature` is `public`'s over `text` as it is (see `Identity.sign_text`)."""
    try:
        _verify_key(public).verify(text, signature)
    except (BadSignatureError, ValueError, TypeError):
        return False
    return True
