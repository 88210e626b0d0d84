from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from connito.errors import Fatal, Invalid, Retry
from connito.service.oidc import Tokens
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from services.console.access import COOKIE, SESSION_SECONDS, Access, Guard
from services.console.settings import ConsoleSettings
from services.console.sign_in import ASK_SECONDS, FLOW, SESSION, SignIn

TOKEN = "correct-horse-battery"


def settings(**values: object) -> ConsoleSettings:
    return ConsoleSettings.model_validate({"key_file": Path("key"), **values})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert settings(console_host=host).check_access() == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", ""])
def test_everywhere_else_a_missing_token_ends_the_service_with_the_remedy(host: str) -> None:
    with pytest.raises(Fatal, match="CONNITO_CONSOLE_TOKEN"):
        settings(console_host=host).check_access()
    assert settings(console_host=host, console_token=TOKEN).check_access() == TOKEN


def test_a_token_that_can_be_guessed_is_none() -> None:
    with pytest.raises(Fatal, match="at least 16"):
        settings(console_token="secret").check_access()


def test_without_a_token_only_loopback_names_are_answered() -> None:
    access = Access("")
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert access.admits(Headers({"host": host}), {})
    for host in ("console.example.com", "127.0.0.1.example.com", ""):
        assert not access.admits(Headers({"host": host}), {})


def test_a_bearer_is_the_token_or_refused() -> None:
    access = Access(TOKEN)
    assert access.admits(Headers({"authorization": f"Bearer {TOKEN}"}), {})
    for wrong in ("Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer ü"):
        assert not access.admits(Headers({"authorization": wrong, "host": "127.0.0.1"}), {})


def test_a_cookie_lasts_its_time_and_cannot_be_prolonged() -> None:
    now = 1_000_000.0
    access = Access(TOKEN, lambda: now)
    cookie = access.cookie()
    assert TOKEN not in cookie
    assert access.admits(Headers(), {COOKIE: cookie})
    expiry, _, mac = cookie.partition(".")
    for forged in ("", ".", f"{int(expiry) + 1}.{mac}", f"{expiry}.{mac[:-1]}", f".{mac}", f"{expiry}.ü"):
        assert not access.admits(Headers(), {COOKIE: forged})
    assert not Access("another-token-of-length").admits(Headers(), {COOKIE: cookie})
    now += SESSION_SECONDS
    assert not access.admits(Headers(), {COOKIE: cookie})


class Asked:
    """A sign-in by ada of the clinic at a provider that gives these tokens; `says` is what it answers when asked again."""

    def __init__(self, **given: str) -> None:
        self.now, self.says = 1_000_000.0, AsyncMock(return_value={"sub": "ada", "groups": ["clinic:reader"]})
        provider = MagicMock(issuer="https://login.example.com")
        provider.about, provider.answer = AsyncMock(return_value="https://login.example.com/x"), self.says
        roster = MagicMock(organisations={"clinic"})
        self.tokens = Tokens(provider, "connito", "groups", roster)
        said = {"sub": "ada", "aud": "console", "nonce": "n", "groups": ["clinic:reader"]}
        self.tokens.claims = AsyncMock(return_value=said)  # type: ignore[method-assign]
        self.signing, self.access = self.process()
        flow = self.signing._seal(FLOW, {"state": "s", "nonce": "n", "verifier": "v"}, 600)
        self.says.side_effect = [{"id_token": "i", **given}, {"sub": "ada", "groups": ["clinic:reader"]}]
        self.cookies = {SESSION: asyncio.run(self.signing.end({"state": "s", "code": "c"}, flow))}
        self.says.reset_mock(side_effect=True)

    def process(self) -> tuple[SignIn, Access]:
        signing = SignIn(
            self.tokens, "console", "", "https://console.example.com", "openid", b"k" * 32, lambda: self.now
        )
        return signing, Access("", sign_in=signing)

    def sees(self) -> set[str] | None:
        found = asyncio.run(self.access.viewer(Headers(), self.cookies))
        return None if found is None else set(found.organisations)


def test_a_role_that_is_taken_away_is_gone_within_a_minute() -> None:
    ada = Asked(access_token="a")
    ada.now += ASK_SECONDS - 1
    assert ada.sees() == {"clinic"}
    assert not ada.says.await_count
    ada.says.return_value = {"sub": "ada", "groups": []}
    ada.now += 1
    assert ada.sees() == set()
    assert ASK_SECONDS < 60


def test_a_refresh_token_asks_where_the_access_token_has_ended() -> None:
    ada = Asked(access_token="a", refresh_token="r")
    ada.says.return_value = {"id_token": "j", "refresh_token": "r2"}
    ada.tokens.claims = AsyncMock(return_value={"sub": "ada", "aud": "console", "groups": ["clinic:reader"]})  # type: ignore[method-assign]
    for used in ("r", "r2"):
        ada.now += ASK_SECONDS
        assert ada.sees() == {"clinic"}
        assert f"refresh_token={used}&" in ada.says.await_args_list[-1].args[3].decode()
    ada.tokens.claims.return_value = {"sub": "eve", "aud": "console", "groups": ["clinic:reader"]}
    ada.now += ASK_SECONDS
    assert ada.sees() is None, "the provider speaks of somebody else"


@pytest.mark.parametrize("given", [{"access_token": "a"}, {"access_token": "a", "refresh_token": "r"}])
def test_a_session_that_the_provider_ended_is_over_and_one_that_is_away_ends_none(given: dict[str, str]) -> None:
    ada = Asked(**given)
    ada.now += ASK_SECONDS
    ada.says.side_effect = Retry("away")
    assert ada.sees() == {"clinic"}
    assert (ada.sees(), ada.says.await_count) == ({"clinic"}, 1), "it is not asked with every request"
    ada.now += ASK_SECONDS
    ada.says.side_effect = Invalid("invalid_grant")
    assert ada.sees() is None
    ada.says.side_effect = None
    assert ada.sees() is None, "it does not come back"


def test_without_anything_to_ask_with_a_session_ends_with_its_hour() -> None:
    ada = Asked()
    ada.now += 3599
    assert ada.sees() == {"clinic"}
    ada.now += 1
    assert ada.sees() is None


def test_another_process_knows_a_session_as_long_as_nobody_has_to_be_asked() -> None:
    ada = Asked(access_token="a")
    ada.signing, ada.access = ada.process()
    ada.now += ASK_SECONDS - 1
    assert ada.sees() == {"clinic"}
    ada.now += 1
    assert ada.sees() is None


def test_who_has_logged_out_stays_out() -> None:
    ada = Asked(access_token="a")
    ada.signing.forget(ada.cookies)
    ada.now += ASK_SECONDS
    assert ada.sees() is None


def test_requests_at_once_ask_the_provider_once() -> None:
    ada = Asked(access_token="a", refresh_token="r")
    ada.says.return_value = {"id_token": "j"}
    ada.now += ASK_SECONDS

    async def together() -> None:
        await asyncio.gather(*(ada.access.viewer(Headers(), ada.cookies) for _ in range(8)))

    asyncio.run(together())
    assert ada.says.await_count == 1


def test_no_token_is_never_known() -> None:
    assert not Access("").knows("")


HEADER = "X-Forwarded-Email"


def test_a_user_header_counts_only_from_the_proxy() -> None:
    with pytest.raises(Fatal, match="CONNITO_CONSOLE_PROXIES"):
        settings(console_host="0.0.0.0", console_user_header=HEADER).check_access()
    with pytest.raises(Fatal, match="addresses or networks"):
        settings(console_user_header=HEADER, console_proxies="proxy.example.com").check_access()
    named = settings(console_host="0.0.0.0", console_user_header=HEADER, console_proxies="10.1.0.0/16, ::1")
    assert named.check_access() == ""
    access = Access("", user_header=HEADER, proxies=named.proxies())
    user = Headers({HEADER: "ada@example.com"})
    for proxy in ("10.1.2.3", "::1"):
        assert access.admits(user, {}, proxy)
    for elsewhere in ("10.2.0.1", "127.0.0.1", "", "unix:"):
        assert not access.admits(user, {}, elsewhere)
    # Nobody is named, or one by the proxy and one by somebody else.
    twice = Headers(raw=[(b"x-forwarded-email", b"ada@example.com"), (b"x-forwarded-email", b"eve@example.com")])
    for nobody in (Headers(), Headers({HEADER: " "}), twice, Headers({"host": "127.0.0.1"})):
        assert not access.admits(nobody, {}, "10.1.2.3")


def test_a_token_opens_beside_the_proxy() -> None:
    access = Access(TOKEN, user_header=HEADER, proxies=settings(console_proxies="10.1.0.0/16").proxies())
    assert access.admits(Headers({"authorization": f"Bearer {TOKEN}"}), {}, "192.0.2.1")
    assert access.admits(Headers({HEADER: "ada"}), {}, "10.1.0.1")
    assert not access.admits(Headers({HEADER: "ada"}), {}, "192.0.2.1")


async def test_a_public_page_is_the_only_one_that_strangers_see() -> None:
    async def page(scope: object, receive: object, send: object) -> None:
        await PlainTextResponse("shown")(scope, receive, send)  # type: ignore[arg-type]

    always = {"/static/console.css", "/login"}
    for public, seen in ((["/leaderboard"], {"/leaderboard", *always}), ([], always)):
        guard = Guard(page, Access(TOKEN, public=public))
        paths = ["/", "/leaderboard", "/leaderboard/", "/leaderboardx", "//leaderboard", "/runs/leaderboard", "/login",
                 "/bus", "/static/console.css", "/library"]  # fmt: skip
        answered = {path for path in paths if await asked(guard, path) == 200}
        assert answered == seen, public


async def asked(app: Guard, path: str) -> int:
    status: list[int] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": [],
        "query_string": b"",
        "client": ("192.0.2.1", 1),
    }
    await app(scope, receive, send)
    return status[0]
