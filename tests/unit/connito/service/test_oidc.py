"""Tokens of an identity provider: which are believed, what they open, and what hostile ones do."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from connito.errors import Fatal, Invalid, Retry
from connito.library.governance import Viewer
from connito.service import oidc
from connito.service.oidc import Provider, Tokens, tokens_of
from connito.v1 import reasons_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from cryptography.hazmat.primitives import serialization

from tests.support.provider import AUDIENCE, ISSUER, InMemory, ec_key, public_jwk, rsa_key, sign

MEMBER = Identity.generate(b"1" * 32).public
ROSTER = Roster({}, organisations={"clinic": frozenset({MEMBER}), "a:b": frozenset({MEMBER}), "bank": frozenset()})


class Desk:
    def __init__(self) -> None:
        self.now, self.there = 0.0, InMemory()
        self.tokens = Tokens(Provider(ISSUER, self.there.ask, lambda: self.now), AUDIENCE, "groups", ROSTER)

    async def bearer(self, token: str) -> Viewer | None:
        return await self.tokens.bearer(f"Bearer {token}")


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_a_token_says_who_reads_and_which_organisations_they_belong_to(desk: Desk) -> None:
    groups = ["clinic:reader", "a:b:owner", "bank:nobody", "unknown:owner", "clinic", ":", "", 7, None, {"x": 1}]
    viewer = await desk.bearer(sign(groups=groups))
    assert viewer == Viewer("oidc:ada", frozenset({"clinic", "a:b"}))
    assert await desk.bearer(sign(groups="clinic:submitter  other")) == Viewer("oidc:ada", frozenset({"clinic"}))
    assert await desk.bearer(sign()) == Viewer("oidc:ada")
    everything = await desk.bearer(sign(groups=["operator"]))
    assert everything is not None
    assert everything.everything
    assert await desk.bearer(sign(key=rsa_key("two"), kid="two", alg="PS256")) == Viewer("oidc:ada")
    assert await desk.tokens.bearer("Basic abc") is None
    assert await desk.tokens.bearer("") is None


@pytest.mark.parametrize("claim", ["realm_access.roles", "https://example.com/connito.groups"])
async def test_the_claim_may_lie_deeper_or_have_dots_in_its_name(claim: str, desk: Desk) -> None:
    tokens = Tokens(desk.tokens.provider, AUDIENCE, claim, ROSTER)
    said: dict[str, Any] = {
        "realm_access": {"roles": ["clinic:reader"]},
        "https://example.com/connito.groups": ["clinic:reader"],
    }
    assert (await tokens.bearer(f"bearer {sign(**said)}")) == Viewer("oidc:ada", frozenset({"clinic"}))
    assert (await tokens.bearer(f"bearer {sign(realm_access='x')}")) == Viewer("oidc:ada")


def forged(header: dict[str, Any], claims: dict[str, Any] | None = None, signature: bytes = b"") -> str:
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    now = int(time.time())
    body = claims or {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": now + 300}
    return ".".join((part(json.dumps(header).encode()), part(json.dumps(body).encode()), part(signature)))


def public_pem() -> bytes:
    return (
        rsa_key("two")
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def with_public_key_as_secret() -> str:
    """The oldest trick: the public key is known to all, and some libraries take it for a shared secret."""
    import hashlib
    import hmac

    unsigned = forged({"alg": "HS256", "kid": "two"}).rpartition(".")[0]
    mac = hmac.new(public_pem(), unsigned.encode(), hashlib.sha256).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


HOSTILE: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "words": lambda: "let me in",
    "dots": lambda: "..",
    "no algorithm": lambda: forged({"alg": "none", "kid": "one"}),
    "no algorithm, written otherwise": lambda: forged({"alg": "NoNe", "kid": "one"}),
    "an algorithm that is no word": lambda: forged({"alg": ["ES256"], "kid": "one"}),
    "the public key as a secret": with_public_key_as_secret,
    "a secret of its own": lambda: jwt.encode({"sub": "ada"}, "s" * 32, "HS256", {"kid": "one"}),
    "another key": lambda: sign(key=ec_key("mallory")),
    "another key of the same name": lambda: sign(key=rsa_key("mallory"), kid="two", alg="RS256"),
    "the name of another key": lambda: sign(kid="two"),
    "the name of another key, and its algorithm": lambda: forged({"alg": "RS256", "kid": "one"}, signature=b"x" * 64),
    "a key that nobody has": lambda: sign(kid="three"),
    "a key's name that is a path": lambda: sign(kid="../../etc/passwd"),
    "a key's name that is a number": lambda: forged({"alg": "ES256", "kid": 1}, signature=b"x" * 64),
    "no name, of two keys": lambda: sign(kid=None),
    "a key that it brings along": lambda: sign(
        key=ec_key("mallory"), kid="mallory", header={"jwk": public_jwk(ec_key("mallory"))}
    ),
    "an address of a key": lambda: sign(
        key=ec_key("mallory"), kid="mallory", header={"jku": "https://evil.example.com"}
    ),
    "what has to be understood": lambda: sign(header={"crit": ["exp"]}),
    "expired": lambda: sign(exp=int(time.time()) - 61),
    "not valid yet": lambda: sign(nbf=int(time.time()) + 120),
    "issued in the future": lambda: sign(iat=int(time.time()) + 120),
    "never expires": lambda: sign(exp=None),
    "an end that is no time": lambda: sign(exp="tomorrow"),
    "an end beyond numbers": lambda: forged({"alg": "ES256", "kid": "one"}, {"exp": 1e400, "sub": "ada"}),
    "for another": lambda: sign(aud="another"),
    "for nobody": lambda: sign(aud=None),
    "for one who is called alike": lambda: sign(aud="connito2"),
    "by another": lambda: sign(iss="https://evil.example.com"),
    "by one who is called alike": lambda: sign(iss=f"{ISSUER}/"),
    "by nobody": lambda: sign(iss=None),
    "of nobody": lambda: sign(sub=""),
    "without a name": lambda: sign(sub=None),
    "of a number": lambda: sign(sub=7),
    "of a very long name": lambda: sign(sub="a" * 256),
    "cut off": lambda: sign()[:-4],
    "changed": lambda: sign().replace(".", ".A", 1),
    "a body that is a list": lambda: forged({"alg": "ES256", "kid": "one"}, claims=["x"]),  # type: ignore[arg-type]
    "nested without end": lambda: ".".join(
        (base64.urlsafe_b64encode(b"[" * 8000 + b"]" * 8000).decode()[:8000], "e30", "AA")
    ),
    "huge": lambda: sign(groups=["x" * 20_000]),
    "a million dots": lambda: "." * 1_000_000,
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_what_is_not_signed_for_us_is_refused_in_a_sentence(what: str, desk: Desk) -> None:
    with pytest.raises(Invalid, match="this sign-in does not count: ") as refused:
        await desk.bearer(HOSTILE[what]())
    assert refused.value.reason == reasons_pb2.REASON_BAD_SIGNATURE
    assert len(str(refused.value)) < 200
    assert desk.there.asked in ([], [f"{ISSUER}/.well-known/openid-configuration", f"{ISSUER}/keys"]), "asked elsewhere"


async def test_nobody_is_asked_for_the_key_of_an_algorithm_that_is_not_accepted(desk: Desk) -> None:
    for what in ("no algorithm", "no algorithm, written otherwise", "the public key as a secret", "huge"):
        with pytest.raises(Invalid):
            await desk.bearer(HOSTILE[what]())
    assert desk.there.asked == []


async def test_clocks_may_be_a_minute_apart(desk: Desk) -> None:
    for good in (sign(exp=int(time.time()) - 50), sign(nbf=int(time.time()) + 50), sign(iat=int(time.time()) + 50)):
        assert await desk.bearer(good)


async def test_many_who_bring_unknown_keys_do_not_make_us_ask_without_end(desk: Desk) -> None:
    for number in range(50):
        with pytest.raises(Invalid):
            await desk.bearer(sign(kid=f"key-{number}"))
    assert len(desk.there.asked) == 2


async def test_keys_are_replaced_without_a_restart(desk: Desk) -> None:
    assert await desk.bearer(sign())
    desk.there.jwks = [public_jwk(ec_key("next"), kid="next")]
    desk.now += oidc.ASK_AGAIN_S + 1
    assert await desk.bearer(sign(key=ec_key("next"), kid="next"))
    with pytest.raises(Invalid, match="nobody there has the key"):
        await desk.bearer(sign())
    # The only one may go unnamed.
    assert await desk.bearer(sign(key=ec_key("next"), kid=None))


async def test_of_two_keys_of_one_name_either_signs(desk: Desk) -> None:
    desk.there.jwks.append(public_jwk(ec_key("other"), kid="one"))
    assert await desk.bearer(sign(key=ec_key("other")))
    assert await desk.bearer(sign())


@pytest.mark.parametrize(
    "jwk",
    [
        {"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", "kid": "bad"},
        {"kty": "RSA", "kid": "bad"},
        {"kty": "EC", "crv": "P-256", "x": "!", "y": "!", "kid": "bad"},
        {"kid": "bad"},
        "bad",
        7,
    ],
)
async def test_what_is_no_key_is_left_out(jwk: Any, desk: Desk) -> None:
    desk.there.jwks = [jwk, public_jwk(ec_key("enc"), kid="bad", use="enc"), *desk.there.jwks]
    assert await desk.bearer(sign())
    with pytest.raises(Invalid):
        await desk.bearer(sign(key=ec_key("enc"), kid="bad"))


async def test_a_provider_that_is_away_is_no_refusal(desk: Desk) -> None:
    desk.there.down = True
    with pytest.raises(Retry, match="is away"):
        await desk.bearer(sign())
    desk.there.down = False
    desk.now += oidc.ASK_AGAIN_S + 1
    assert await desk.bearer(sign())


async def test_known_keys_count_for_a_day_while_the_provider_is_away(desk: Desk) -> None:
    assert await desk.bearer(sign())
    desk.there.down = True
    desk.now += oidc.KEYS_S + 1
    asked = len(desk.there.asked)
    for _ in range(20):
        assert await desk.bearer(sign())
        with pytest.raises(Retry, match="is away"):
            await desk.bearer(sign(kid="new"))
    assert len(desk.there.asked) == asked + 1, "one that hangs is not waited for by everybody"
    desk.now += oidc.AWAY_S
    with pytest.raises(Retry, match="is away"):
        await desk.bearer(sign())


async def test_nobody_whose_key_is_known_waits_for_a_provider_that_hangs(desk: Desk) -> None:
    assert await desk.bearer(sign())
    hanging, reached, ask = threading.Event(), threading.Event(), desk.there.ask

    def hang(*said: Any) -> tuple[int, bytes]:
        reached.set()
        hanging.wait(20)
        return ask(*said)

    desk.tokens.provider._ask = hang
    desk.now += oidc.ASK_AGAIN_S + 1
    unknown = asyncio.create_task(desk.bearer(sign(kid="new")))
    await asyncio.to_thread(reached.wait, 20)
    try:
        async with asyncio.timeout(10):
            assert await desk.bearer(sign())
        assert not unknown.done()
    finally:
        hanging.set()
    with pytest.raises(Invalid, match="nobody there has the key"):
        await unknown


async def test_keys_that_moved_are_found(desk: Desk) -> None:
    assert await desk.bearer(sign())
    desk.there.about["jwks_uri"] = f"{ISSUER}/keys2"
    desk.now += oidc.KEYS_S + 1
    assert await desk.bearer(sign())
    assert desk.there.asked[-1] == f"{ISSUER}/keys2"


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"issuer": "https://evil.example.com"}, "says that it is"),
        ({}, "says that it is"),
        ({"issuer": ISSUER}, "has no jwks_uri"),
        ({"issuer": ISSUER, "jwks_uri": "http://login.example.com/keys"}, "has to begin with https://"),
        ({"issuer": ISSUER, "jwks_uri": "file:///etc/passwd"}, "has to begin with https://"),
    ],
)
async def test_a_provider_that_says_strange_things_of_itself_is_not_asked_further(
    about: dict[str, object], words: str, desk: Desk
) -> None:
    desk.there.about = about
    with pytest.raises(Invalid, match=words):
        await desk.bearer(sign())
    assert len(desk.there.asked) == 1


class Settings:
    oidc_issuer, oidc_audience, oidc_claim = ISSUER, AUDIENCE, "groups"


def test_settings_are_whole_or_say_what_is_missing() -> None:
    settings = Settings()
    assert tokens_of(settings, ROSTER) is not None
    settings.oidc_audience = ""
    with pytest.raises(Fatal, match="CONNITO_OIDC_AUDIENCE is not"):
        tokens_of(settings, ROSTER)
    settings.oidc_audience, settings.oidc_issuer = AUDIENCE, "http://login.example.com"
    with pytest.raises(Invalid, match="https://"):
        tokens_of(settings, ROSTER)
    settings.oidc_issuer = ""
    assert tokens_of(settings, ROSTER) is None
