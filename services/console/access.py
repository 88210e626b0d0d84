"""Who may read: on loopback everybody who sits there, elsewhere whoever knows the token. There is no third way in.

The cookie holds no token, only an expiry and a MAC of it under the token: a stolen cookie ends, and cannot be turned
into the token. Without a token the `Host` must be a loopback name, or any web page could read the console through a
name of its own that resolves to 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse

from services.console.settings import LOOPBACK

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "connito_console"
SESSION_SECONDS = 12 * 3600

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Access:
    """Checks what a request shows for itself. An empty token means that none is needed."""

    def __init__(self, token: str, clock: Callable[[], float] = time.time) -> None:
        self.token, self._clock = token, clock

    def knows(self, token: str) -> bool:
        """Whether this is the token, in constant time."""
        return bool(self.token) and hmac.compare_digest(_digest(token), _digest(self.token))

    def cookie(self) -> str:
        """What a browser shows from now on, for `SESSION_SECONDS`."""
        expiry = str(int(self._clock()) + SESSION_SECONDS)
        return f"{expiry}.{self._mac(expiry)}"

    def admits(self, headers: Headers, cookies: dict[str, str]) -> bool:
        """Whether a request may read: it has a valid cookie, or the token as a bearer."""
        if not self.token:
            return (urlsplit(f"//{headers.get('host', '')}").hostname or "") in LOOPBACK
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(bearer.strip()):
            return True
        expiry, _, mac = cookies.get(COOKIE, "").partition(".")
        genuine = hmac.compare_digest(mac.encode(), self._mac(expiry).encode())
        return genuine and expiry.isdecimal() and int(expiry) > self._clock()

    def _mac(self, expiry: str) -> str:
        return hmac.new(self.token.encode(), b"connito.console.v1\x00" + expiry.encode(), hashlib.sha256).hexdigest()


class Guard:
    """In front of every route: the headers that each answer carries, and the check of access."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or send to the login page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._choose(HTTPConnection(scope))(scope, receive, with_headers)

    def _choose(self, request: HTTPConnection) -> ASGIApp:
        if self._access.admits(request.headers, request.cookies):
            return self._app
        if not self._access.token:
            return PlainTextResponse("this console answers to 127.0.0.1 and localhost only\n", 421)
        path = request.scope["path"]
        if path == "/login" or path.startswith("/static/"):
            return self._app
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse(
            "a token is needed: send `Authorization: Bearer <token>`, or log in at /login\n",
            401,
            {"WWW-Authenticate": 'Bearer realm="connito console"'},
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
