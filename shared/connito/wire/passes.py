"""Passes: what a broker lets a key in with, in the form that NATS calls a JWT. Whoever admits signs; no server need hear of it.

A pass names a key (`sub`), who signed it (`iss`) and the account that it opens. It is no secret: without the key's seed nobody
gets in with it. The same form says what an account may do; then its subject is the account, and the signer the operator.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nkeys
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from connito.errors import Invalid
from connito.files import write_durably

OPERATOR, ACCOUNT = nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT
# Between the passes of one key, where they are handed over as one word.
JOINT = "~"
MAX_PASSES, MAX_PASS = 2, 4096
_HEAD = {"typ": "JWT", "alg": "ed25519-nkey"}


@dataclass(frozen=True)
class Authority:
    """A key that signs passes, or accounts: an account's (`SA…`) or an operator's (`SO…`)."""

    public: str
    seed: str = field(repr=False)

    @classmethod
    def generate(cls, kind: int) -> Authority:
        """Return a new one, of kind `OPERATOR` or `ACCOUNT`."""
        return cls.from_seed(nkeys.encode_seed(os.urandom(32), kind).decode())

    @classmethod
    def from_seed(cls, seed: str) -> Authority:
        """Read a seed. Raises `Invalid` for anything else."""
        try:
            return cls(nkeys.from_seed(bytearray(seed.strip().encode())).public_key.decode(), seed.strip())
        except (nkeys.NkeysError, ValueError) as error:
            raise Invalid("this is not the seed of an account or an operator (SA…, SO…)") from error

    @classmethod
    def load(cls, path: Path) -> Authority:
        """Read a file that `save` wrote. Raises `Invalid` naming it."""
        try:
            return cls.from_seed(path.read_bytes().decode("ascii", "replace"))
        except Invalid as error:
            raise Invalid(f"{path} is damaged: {error}; put back its copy") from error
        except OSError as error:
            raise Invalid(f"cannot read {path}: {error.strerror}; it is the operator's, and admits with it") from error

    def save(self, path: Path) -> None:
        """Write the seed, readable by the owner only."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(path, self.seed + "\n", 0o600)

    def sign(self, subject: str, name: str, kind: str, body: Mapping[str, Any], issued_at: int) -> str:
        """Return a token for `subject` (a public key). `kind`: user, account or operator; `issued_at`: Unix seconds."""
        claims = {
            "iat": issued_at,
            "iss": self.public,
            "name": name,
            "sub": subject,
            "nats": {**body, "type": kind, "version": 2},
        }
        claims["jti"] = base64.b32encode(hashlib.sha256(_json(claims)).digest()).decode().rstrip("=")
        signed = f"{_base64(_json(_HEAD))}.{_base64(_json(claims))}"
        pair = nkeys.from_seed(bytearray(self.seed.encode()))
        return f"{signed}.{_base64(pair.sign(signed.encode()))}"


def claims_of(token: str) -> dict[str, Any]:
    """Return what a token says; the broker checks the signature. Raises `Invalid` for what is no token."""
    try:
        _, body, _ = token.split(".")
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if isinstance(claims["sub"], str) and isinstance(claims["name"], str):
            return dict(claims)
    except (ValueError, binascii.Error, KeyError, TypeError):
        pass
    raise Invalid("this is not a pass; copy all of what the operator gave you")


def admitted(token: str, key: str, signers: Collection[str]) -> bool:
    """Return whether one of `signers` (public keys of accounts) has signed this pass for `key`."""
    try:
        signed, _, signature = token.rpartition(".")
        claims = claims_of(token)
        if claims["sub"] != key or claims.get("iss") not in signers or claims["nats"]["type"] != "user":
            return False
        raw = base64.b32decode(claims["iss"] + "=" * (-len(claims["iss"]) % 8))
        VerifyKey(raw[1:33]).verify(signed.encode(), base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4)))
    except (Invalid, BadSignatureError, ValueError, KeyError, TypeError):
        return False
    return True


def parse(text: str, key: str) -> tuple[str, ...]:
    """Return the passes in what an operator handed over for `key`. Raises `Invalid` for anything else."""
    tokens = tuple(text.replace(JOINT, "\n").split())
    if not 1 <= len(tokens) <= MAX_PASSES or any(len(token) > MAX_PASS for token in tokens):
        raise Invalid("this is not a pass; copy all of what the operator gave you")
    for token in tokens:
        if (other := claims_of(token)["sub"]) != key:
            raise Invalid(f"this pass is for {other}, and the key is {key}; ask the operator for one for your key")
    return tokens


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
