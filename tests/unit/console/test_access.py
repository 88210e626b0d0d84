from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Fatal
from starlette.datastructures import Headers

from services.console.access import COOKIE, SESSION_SECONDS, Access
from services.console.settings import ConsoleSettings

TOKEN = "correct-horse-battery"


def settings(**values: object) -> ConsoleSettings:
    return ConsoleSettings.model_validate({"key_file": Path("key"), **values})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_token(host: str):
    assert settings(console_host=host).check_access() == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", ""])
def test_everywhere_else_a_missing_token_ends_the_service_with_the_remedy(host: str):
    with pytest.raises(Fatal, match="CONNITO_CONSOLE_TOKEN"):
        settings(console_host=host).check_access()
    assert settings(console_host=host, console_token=TOKEN).check_access() == TOKEN


def test_a_token_that_can_be_guessed_is_none():
    with pytest.raises(Fatal, match="at least 16"):
        settings(console_token="secret").check_access()


def test_without_a_token_only_loopback_names_are_answered():
    access = Access("")
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert access.admits(Headers({"host": host}), {})
    for host in ("console.example.com", "127.0.0.1.example.com", ""):
        assert not access.admits(Headers({"host": host}), {})


def test_a_bearer_is_the_token_or_refused():
    access = Access(TOKEN)
    assert access.admits(Headers({"authorization": f"Bearer {TOKEN}"}), {})
    for wrong in ("Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer ü"):
        assert not access.admits(Headers({"authorization": wrong, "host": "127.0.0.1"}), {})


def test_a_cookie_lasts_its_time_and_cannot_be_prolonged():
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


def test_no_token_is_never_known():
    assert not Access("").knows("")
