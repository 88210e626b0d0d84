"""Access control of the console: open on loopback, elsewhere by token, by the user that the operator's proxy names, or by what an
identity provider says of the reader (`sign_in`).

The proxy speaks OpenID Connect with the operator's identity provider and names the user in a header. That header counts
only in a connection that comes from the proxy's own address: anybody can send one.

The cookie holds no token, only an expiry and a MAC of it under the token: a stolen cookie ends, and cannot be turned
into the token. Without a token the `Host` must be a loopback name, or any web page could read the console through a
name of its own that resolves to 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from connito.errors import Invalid, Retry
from connito.library.governance import Viewer
from connito.service.oidc import Tokens
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse

from .settings import LOOPBACK
from .sign_in import BACK, BEGIN, SignIn

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
    """Checks what a request shows for itself. Without a token and a header, nothing is needed on loopback."""

    def __init__(
        self, token: str, clock: Callable[[], float] = time.time, *, user_header: str = "",
        proxies: Sequence[IPv4Network | IPv6Network] = (), public: Sequence[str] = (), tokens: Tokens | None = None,
        sign_in: SignIn | None = None,
    ) -> None:  # fmt: skip
        self.token, self._clock = token, clock
        self.tokens, self.sign_in = tokens, sign_in
        self._user_header, self._proxies = user_header, tuple(proxies)
        # Pages that everybody may see. They show what is public, whoever asks.
        self.public = frozenset(public)

    @property
    def open(self) -> bool:
        """Return whether local requests may read without a token."""
        return not self.token and not self._user_header and self.tokens is None

    def knows(self, token: str) -> bool:
        """Return whether this is the token, in constant time."""
        return bool(self.token) and hmac.compare_digest(_digest(token), _digest(self.token))

    def cookie(self) -> str:
        """Return the value of a session cookie, valid for `SESSION_SECONDS`."""
        expiry = str(int(self._clock()) + SESSION_SECONDS)
        return f"{expiry}.{self._mac(expiry)}"

    def user(self, headers: Headers, peer: str) -> str:
        """Return the user that the operator's proxy names, if `peer` is that proxy; else the empty string."""
        named = headers.getlist(self._user_header) if self._user_header else []
        try:
            trusted = any(ip_address(peer) in network for network in self._proxies)
        except ValueError:
            return ""
        # Two of them: somebody's own beside the proxy's.
        return named[0].strip() if trusted and len(named) == 1 else ""

    def admits(self, headers: Headers, cookies: dict[str, str], peer: str = "") -> bool:
        """Return whether a request may read: a valid cookie, the token as a bearer, or a user that the proxy names."""
        if self.open:
            return (urlsplit(f"//{headers.get('host', '')}").hostname or "") in LOOPBACK
        if self.user(headers, peer):
            return True
        if not self.token:
            return False
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(bearer.strip()):
            return True
        expiry, _, mac = cookies.get(COOKIE, "").partition(".")
        genuine = hmac.compare_digest(mac.encode(), self._mac(expiry).encode())
        return genuine and expiry.isdecimal() and int(expiry) > self._clock()

    async def viewer(self, headers: Headers, cookies: dict[str, str]) -> Viewer | None:
        """Return the reader for whom an identity provider vouches, None where none does. Raises `Invalid`, `Retry`."""
        if self.sign_in is not None and (found := await self.sign_in.viewer(cookies)):
            return found
        return None if self.tokens is None else await self.tokens.bearer(headers.get("authorization", ""))

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

        chosen = await self._choose(HTTPConnection(scope))
        await chosen(scope, receive, with_headers)

    async def _choose(self, request: HTTPConnection) -> ASGIApp:
        peer = request.client.host if request.client else ""
        if self._access.admits(request.headers, request.cookies, peer):
            return self._app
        try:
            if (viewer := await self._access.viewer(request.headers, request.cookies)) is not None:
                request.scope["viewer"] = viewer
                return self._app
        except (Invalid, Retry) as error:
            return PlainTextResponse(f"{error}\n", 401 if isinstance(error, Invalid) else 503)
        path = request.scope["path"]
        if self._access.sign_in is not None and path in (BEGIN, BACK):
            return self._app
        if path in self._access.public or (self._access.public and path.startswith("/static/")):
            return self._app
        if self._access.open:
            return PlainTextResponse("this console answers to 127.0.0.1 and localhost only\n", 421)
        if not self._access.token and self._access.sign_in is None:
            if self._access.tokens is not None:
                return PlainTextResponse("send a token of the identity provider\n", 401, {"WWW-Authenticate": "Bearer"})
            return PlainTextResponse("come through the operator's proxy, which asks who you are\n", 401)
        if path == "/login" or path.startswith("/static/"):
            return self._app
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login" if self._access.token else BEGIN, 303)
        return PlainTextResponse(
            "a token is needed: send `Authorization: Bearer <token>`, or log in at /login\n",
            401,
            {"WWW-Authenticate": 'Bearer realm="connito console"'},
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
