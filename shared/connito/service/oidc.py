"""People who an identity provider vouches for: tokens of OpenID Connect, checked, as whoever reads.

A token is believed for its issuer, audience, time and signature, by keys that the issuer publishes, with algorithms of this
list. What it says of organisations counts where the roster knows them. Nobody changes anything with a token: commands are
signed by keys.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from connito.errors import Fatal, Invalid, Retry
from connito.library.governance import Viewer
from connito.v1 import reasons_pb2
from connito.wire.roster import DUTIES, OPERATOR, Roster

if TYPE_CHECKING:
    from jwt import PyJWK

# Signatures by a private key that the issuer alone has. `none` and secrets that are shared are no such thing.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_S = 60.0
MAX_TOKEN, MAX_ANSWER, MAX_ENTRIES = 16 << 10, 1 << 20, 1000
# Keys are asked for again after an hour, and for one that is not known, at most so often. While the provider is away, those
# that are known count for a day.
KEYS_S, ASK_AGAIN_S, AWAY_S = 3600.0, 10.0, 24 * 3600.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Settings(Protocol):
    @property
    def oidc_issuer(self) -> str: ...
    @property
    def oidc_audience(self) -> str: ...
    @property
    def oidc_claim(self) -> str: ...


Ask = Callable[[str, str, Mapping[str, str], bytes | None], tuple[int, bytes]]


@dataclass
class _Keys:
    by_id: dict[str, list[PyJWK]]
    read_at: float


class Provider:
    """An issuer of tokens: what it says of itself, and its keys. `ask(method, url, headers, body)` reaches it."""

    def __init__(self, issuer: str, ask: Ask | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.issuer = issuer
        secure(issuer, "CONNITO_OIDC_ISSUER")
        self._ask, self._clock = ask or _ask, clock
        self._about: dict[str, Any] = {}
        self._keys = _Keys({}, -float("inf"))
        self._asked_at = -float("inf")
        self._problem: Invalid | Retry | None = None
        self._lock = asyncio.Lock()

    async def about(self, name: str) -> str:
        """Return an address of the provider by its name in its metadata. Raises `Retry` while it is away, `Invalid`."""
        if not self._about:
            await self._introduce()
        address = self._about.get(name)
        if not isinstance(address, str):
            raise Invalid(f"the identity provider {self.issuer} has no {name}")
        return secure(address, name)

    async def _introduce(self) -> None:
        found = await self.answer("GET", f"{self.issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != self.issuer:
            raise Invalid(
                f"{self.issuer} says that it is {str(found.get('issuer'))[:200]!r}; set CONNITO_OIDC_ISSUER to that, to the "
                "letter"
            )
        self._about = found

    async def keys(self, key_id: str | None) -> list[PyJWK]:
        """Return the keys of that id; without one, the only key that there is. Asks the provider where it knows none.

        Nobody whose key is known waits for a provider that hangs, except the first after an hour. Raises `Retry` while it is
        away.
        """
        if self._due(key_id) or not self._knows(key_id):
            async with self._lock:
                if self._due(key_id):
                    await self._ask_for_keys()
        if self._problem and not (self._knows(key_id) and self._clock() - self._keys.read_at < AWAY_S):
            raise self._problem.with_traceback(None)
        if key_id is not None:
            return self._keys.by_id.get(key_id, [])
        every = [key for keys in self._keys.by_id.values() for key in keys]
        return every if len(every) == 1 else []

    def _due(self, key_id: str | None) -> bool:
        """Return whether the provider is to be asked, which it is not twice in a few seconds, whatever it answered."""
        now = self._clock()
        return now - self._asked_at > ASK_AGAIN_S and (not self._knows(key_id) or now - self._keys.read_at > KEYS_S)

    def _knows(self, key_id: str | None) -> bool:
        return bool(self._keys.by_id) if key_id is None else key_id in self._keys.by_id

    async def _ask_for_keys(self) -> None:
        self._asked_at = self._clock()
        try:
            # What it says of itself too: its keys may have moved.
            await self._introduce()
            self._keys = _Keys(_read_keys(await self.answer("GET", await self.about("jwks_uri"))), self._clock())
            self._problem = None
        except (Invalid, Retry) as error:
            self._problem = error

    async def answer(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> dict[str, Any]:
        """Return the JSON object that the provider answers. Raises `Retry` while it is away, `Invalid` for anything else."""
        try:
            status, data = await asyncio.to_thread(self._ask, method, url, headers or {}, body)
        except OSError as error:
            raise Retry(f"the identity provider {self.issuer} is away ({error})") from error
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if status >= 500:
            raise Retry(f"the identity provider {self.issuer} answers {status}")
        if status != 200 or not isinstance(found, dict):
            said = str(found.get("error", ""))[:100] if isinstance(found, dict) else ""
            raise refusal(f"the identity provider answers {status} {said}".rstrip())
        return found


class Tokens:
    """Turns tokens for `audience` into whoever reads."""

    def __init__(self, provider: Provider, audience: str, claim: str, roster: Roster) -> None:
        self.provider, self.claim = provider, claim
        self._audience, self._roster = audience, roster

    async def claims(self, token: str, audience: str = "") -> dict[str, Any]:
        """Return what a token says, verified. Raises `Invalid` (BAD_SIGNATURE) for one that is not believed, `Retry`."""
        import jwt

        if len(token) > MAX_TOKEN:
            raise refusal("it is too large")
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise refusal("it is no signed token") from error
        if header.get("alg") not in ALGORITHMS or not isinstance(header.get("kid", ""), str) or "crit" in header:
            raise refusal("its header is not one that is accepted here")
        problem = "nobody there has the key that it names"
        for key in await self.provider.keys(header.get("kid")):
            if key.algorithm_name != header["alg"] and key.key_type != "RSA":
                continue
            try:
                found: dict[str, Any] = jwt.decode(
                    token, key.key, algorithms=[header["alg"]], audience=audience or self._audience,
                    issuer=self.provider.issuer, leeway=LEEWAY_S, options={"require": ["exp", "iss", "aud", "sub"]},
                )  # fmt: skip
            except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError) as error:
                problem = _plain(error)
                continue
            if not found["sub"] or len(found["sub"]) > 255:
                raise refusal("it names nobody")
            return found
        raise refusal(problem)

    def viewer(self, claims: Mapping[str, Any]) -> Viewer:
        """Return who reads: entries `ORGANISATION:DUTY` of the claim where the roster has the organisation, and `operator`."""
        given = claims_at(claims, self.claim)
        entries = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
        organisations, everything = set(), False
        for entry in entries[:MAX_ENTRIES]:
            name, _, duty = entry.rpartition(":") if isinstance(entry, str) else ("", "", "")
            everything = everything or entry == OPERATOR
            if duty in DUTIES and name in self._roster.organisations:
                organisations.add(name)
        # No key has such a name.
        return Viewer(f"oidc:{claims['sub']}", frozenset(organisations), everything=everything)

    async def bearer(self, header: str) -> Viewer | None:
        """Return who `Authorization: Bearer …` stands for, None where it is nothing of the kind. Raises as `claims`."""
        scheme, _, token = header.partition(" ")
        return self.viewer(await self.claims(token.strip())) if scheme.lower() == "bearer" else None


def tokens_of(settings: _Settings, roster: Roster) -> Tokens | None:
    """Return what checks tokens, None where the settings name no provider. Raises `Fatal` where they are not whole."""
    if not settings.oidc_issuer:
        return None
    if not settings.oidc_audience:
        raise Fatal(
            "CONNITO_OIDC_ISSUER is set and CONNITO_OIDC_AUDIENCE is not: tokens that the provider made for anybody else would "
            "open this; set it to the name that tokens for Connito carry"
        )
    try:
        import jwt  # noqa: F401 - said now, not to the first who comes
    except ImportError as error:
        raise Fatal("CONNITO_OIDC_ISSUER is set, but PyJWT is not installed: pip install 'connito[oidc]'") from error
    return Tokens(Provider(settings.oidc_issuer), settings.oidc_audience, settings.oidc_claim, roster)


def claims_at(claims: Mapping[str, Any], name: str) -> Any:
    """Return a claim by its name, or by its path with dots; None where there is none."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def secure(url: str, name: str) -> str:
    """Return an address that nobody on the way can change. Raises `Invalid` for any other."""
    parts = urlsplit(url)
    if parts.hostname and (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)):
        return url
    raise Invalid(f"{name} has to begin with https://, and {url[:200]!r} does not")


def refusal(why: str) -> Invalid:
    """Return the error for a token that is not believed."""
    return Invalid(f"this sign-in does not count: {why}", reason=reasons_pb2.REASON_BAD_SIGNATURE)


def _read_keys(found: Mapping[str, Any]) -> dict[str, list[PyJWK]]:
    import jwt

    keys: dict[str, list[PyJWK]] = {}
    listed = found.get("keys")
    for raw in listed if isinstance(listed, list) else []:
        # One that is secret, or for another purpose, verifies nothing.
        if not isinstance(raw, dict) or raw.get("kty") not in ("RSA", "EC", "OKP") or raw.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(
                {name: value for name, value in raw.items() if name not in ("d", "p", "q", "dp", "dq", "qi")}
            )
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue
        keys.setdefault(str(raw.get("kid", "")), []).append(key)
    return keys


def _plain(error: Exception) -> str:
    import jwt

    for kind, text in (
        (jwt.ExpiredSignatureError, "it has expired; sign in again"),
        (jwt.ImmatureSignatureError, "it is not valid yet; is this machine's clock right?"),
        (jwt.InvalidAudienceError, "it is for somebody else (its audience is not CONNITO_OIDC_AUDIENCE)"),
        (jwt.InvalidIssuerError, "another provider issued it"),
        (jwt.MissingRequiredClaimError, "it does not say what it has to"),
        (jwt.InvalidSignatureError, "its signature is wrong"),
    ):
        if isinstance(error, kind):
            return text
    return "it is malformed"


def _ask(method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[int, bytes]:
    """Reach a provider: no redirects, a few seconds, a bounded answer. Raises `OSError`."""
    import urllib3

    with urllib3.PoolManager(retries=False, timeout=5.0) as pool:
        try:
            response = pool.request(
                method, url, body=body, headers=dict(headers), redirect=False, preload_content=False
            )
            data = response.read(MAX_ANSWER + 1, decode_content=False)
            response.close()
        except urllib3.exceptions.HTTPError as error:
            raise OSError(str(error)) from error
    return response.status, data if len(data) <= MAX_ANSWER else b""
