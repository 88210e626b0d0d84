from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from connito.errors import Fatal
from connito.library.governance import Viewer
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from services.console.access import COOKIE, SESSION_SECONDS, Access, Guard
from services.console.settings import ConsoleSettings
from services.console.sign_in import FLOW, SESSION, SignIn

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


def test_a_role_that_is_taken_away_at_the_provider_is_gone_within_the_hour() -> None:
    now = 1_000_000.0
    signing = SignIn(MagicMock(), "console", "", "https://console.example.com", "openid", b"k" * 32, lambda: now)
    signing.tokens.viewer.return_value = Viewer("ada", frozenset({"clinic"}))  # type: ignore[attr-defined]
    signing._redeem = AsyncMock(return_value={})  # type: ignore[method-assign]
    flow = signing._seal(FLOW, {"state": "s", "nonce": "n", "verifier": "v"}, 600)
    cookies = {SESSION: asyncio.run(signing.end({"state": "s", "code": "c"}, flow))}
    access = Access("", sign_in=signing)
    now += 3599
    assert asyncio.run(access.viewer(Headers(), cookies)) == Viewer("ada", frozenset({"clinic"}))
    now += 1
    assert asyncio.run(access.viewer(Headers(), cookies)) is None, "the provider is asked again"


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
