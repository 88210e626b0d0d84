"""An identity provider in memory: metadata, keys, a token endpoint; `sign` makes tokens as a test wants them."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://login.example.com"
AUDIENCE = "connito"


@cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_jwk(private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, **more: str) -> dict[str, str]:
    algorithm = RSAAlgorithm if isinstance(private, rsa.RSAPrivateKey) else ECAlgorithm
    return {**json.loads(algorithm.to_jwk(private.public_key())), **more}  # type: ignore[arg-type]


class InMemory:
    """`ask` is what `Provider` reaches. `down` and `about` are for tests to change."""

    def __init__(self) -> None:
        self.jwks = [public_jwk(ec_key("one"), kid="one"), public_jwk(rsa_key("two"), kid="two", use="sig")]
        self.about: dict[str, object] = {
            "issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys", "authorization_endpoint": f"{ISSUER}/authorize",
            "token_endpoint": f"{ISSUER}/token", "userinfo_endpoint": f"{ISSUER}/me",
        }  # fmt: skip
        self.down, self.asked = False, list[str]()
        # What the token endpoint and the userinfo endpoint answer, and by code the challenge that was sent.
        self.challenges: dict[str, str] = {}
        self.id_token: Mapping[str, Any] = {}
        self.me: Mapping[str, Any] = {}

    def ask(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[int, bytes]:
        self.asked.append(url)
        if self.down:
            raise OSError("connection refused")
        path = url.removeprefix(ISSUER)
        if path == "/token":
            return self._redeem(parse_qs((body or b"").decode()))
        answers = {
            "/.well-known/openid-configuration": self.about,
            "/keys": {"keys": self.jwks},
            "/keys2": {"keys": self.jwks},
            "/me": self.me,
        }
        return 200, json.dumps(answers[path]).encode()

    def _redeem(self, form: Mapping[str, list[str]]) -> tuple[int, bytes]:
        challenge = (
            base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"][0].encode()).digest()).decode().rstrip("=")
        )
        if self.challenges.pop(form["code"][0], None) != challenge:
            return 400, b'{"error": "invalid_grant"}'
        return 200, json.dumps({"id_token": sign(**self.id_token), "access_token": "opaque"}).encode()


def sign(
    *,
    key: Any = None,
    kid: str | None = "one",
    alg: str = "ES256",
    header: Mapping[str, Any] | None = None,
    **claims: Any,
) -> str:
    """A token that is good unless a claim says otherwise; a claim of None is left out."""
    now = int(time.time())
    said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 300, **claims}
    headers = {**({} if kid is None else {"kid": kid}), **(header or {})}
    return jwt.encode(
        {name: value for name, value in said.items() if value is not None}, key or ec_key("one"), alg, headers
    )
