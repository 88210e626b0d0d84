"""Sign in at an identity provider: OpenID Connect, authorization code with PKCE.

What is kept of it lies in the reader's cookies, signed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from connito.errors import Invalid, Retry
from connito.library.governance import Viewer
from connito.service.oidc import Tokens, claims_at, refusal
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

FLOW, SESSION = "connito_sign_in", "connito_session"
# A session says what somebody was at the provider when it began: whoever loses a role there keeps it here for so long.
FLOW_SECONDS, SESSION_SECONDS = 600, 3600
# Browsers keep no larger cookie.
MAX_COOKIE = 3800
BEGIN, BACK = "/sign-in", "/sign-in/back"


class SignIn:
    """The way of a reader from here to the provider and back. `secret` signs cookies; `url` is where readers find this page."""

    def __init__(
        self, tokens: Tokens, client: str, client_secret: str, url: str, scopes: str, secret: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.tokens, self._client, self._client_secret = tokens, client, client_secret
        self._back, self._scopes = url.rstrip("/") + BACK, scopes
        self._secret, self._clock = secret, clock

    async def begin(self) -> tuple[str, str]:
        """Return where to send the reader, and the cookie that comes back with them. Raises `Retry`, `Invalid`."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        asked = {
            "response_type": "code", "client_id": self._client, "redirect_uri": self._back, "scope": self._scopes,
            "state": state, "nonce": nonce, "code_challenge": challenge, "code_challenge_method": "S256",
        }  # fmt: skip
        address = await self.tokens.provider.about("authorization_endpoint")
        cookie = self._seal(FLOW, {"state": state, "nonce": nonce, "verifier": verifier}, FLOW_SECONDS)
        return f"{address}{'&' if '?' in address else '?'}{urlencode(asked)}", cookie

    async def end(self, query: Mapping[str, str], cookie: str) -> str:
        """Return the session's cookie for a reader who comes back. Raises `Invalid` for who did not begin here, `Retry`."""
        flow = self._open(FLOW, cookie)
        if flow is None or not hmac.compare_digest(query.get("state", "").encode(), str(flow["state"]).encode()):
            raise refusal("it did not begin in this browser, or more than ten minutes ago; begin again")
        if "error" in query:
            raise refusal(f"the identity provider says {query['error'][:100]}")
        if "iss" in query and query["iss"] != self.tokens.provider.issuer:
            raise refusal("another provider answered")
        claims = await self._redeem(query.get("code", ""), flow)
        viewer = self.tokens.viewer(claims)
        sealed = self._seal(
            SESSION,
            {"name": viewer.name, "organisations": sorted(viewer.organisations), "everything": viewer.everything},
            SESSION_SECONDS,
        )
        if len(sealed) > MAX_COOKIE:
            raise refusal("it names more organisations than fit into a cookie")
        return sealed

    def viewer(self, cookies: Mapping[str, str]) -> Viewer | None:
        """Return who the session's cookie stands for, None without a valid one."""
        found = self._open(SESSION, cookies.get(SESSION, ""))
        if found is None:
            return None
        return Viewer(found["name"], frozenset(found["organisations"]), everything=bool(found["everything"]))

    def routes(self, *, secure: bool) -> list[Route]:
        """Return the two places that a browser goes to. `secure`: a proxy in front speaks TLS."""

        def keep(request: Request, place: str, name: str, cookie: str, seconds: int) -> Response:
            answer = RedirectResponse(place, 303)
            # Comes along when the provider sends the reader here, which a strict one would not.
            answer.set_cookie(
                name, cookie, max_age=seconds, httponly=True, samesite="lax",
                secure=secure or request.url.scheme == "https",
            )  # fmt: skip
            return answer

        async def begin(request: Request) -> Response:
            place, cookie = await self.begin()
            return keep(request, place, FLOW, cookie, FLOW_SECONDS)

        async def back(request: Request) -> Response:
            cookie = await self.end(request.query_params, request.cookies.get(FLOW, ""))
            answer = keep(request, "/", SESSION, cookie, SESSION_SECONDS)
            answer.delete_cookie(FLOW, httponly=True, samesite="lax")
            return answer

        return [Route(BEGIN, _explained(begin)), Route(BACK, _explained(back))]

    async def _redeem(self, code: str, flow: Mapping[str, Any]) -> dict[str, Any]:
        """Exchange the code for what the provider says of the reader, in the ID token or beside it."""
        provider = self.tokens.provider
        form = {
            "grant_type": "authorization_code", "code": code, "redirect_uri": self._back,
            "code_verifier": str(flow["verifier"]), "client_id": self._client,
        }  # fmt: skip
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        if self._client_secret:
            pair = f"{quote(self._client, safe='')}:{quote(self._client_secret, safe='')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        address = await provider.about("token_endpoint")
        answer = await provider.answer("POST", address, headers, urlencode(form).encode())
        claims = await self.tokens.claims(str(answer.get("id_token", "")), self._client)
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), str(flow["nonce"]).encode()):
            raise refusal("it answers another question (its nonce is wrong)")
        if isinstance(claims["aud"], list) and len(claims["aud"]) > 1 and claims.get("azp") != self._client:
            raise refusal("it is for several, and not first for this console")
        if claims_at(claims, self.tokens.claim) is None and isinstance(answer.get("access_token"), str):
            return await self._more(claims, answer["access_token"])
        return claims

    async def _more(self, claims: dict[str, Any], token: str) -> dict[str, Any]:
        """Ask the provider for what the ID token leaves out."""
        try:
            address = await self.tokens.provider.about("userinfo_endpoint")
        except Invalid:
            return claims
        said = await self.tokens.provider.answer("GET", address, {"Authorization": f"Bearer {token}"})
        if said.get("sub") != claims["sub"]:
            raise refusal("the provider speaks of somebody else")
        return {**said, **claims}

    def _seal(self, kind: str, content: Mapping[str, Any], seconds: int) -> str:
        body = json.dumps({**content, "until": int(self._clock()) + seconds}, separators=(",", ":")).encode()
        text = base64.urlsafe_b64encode(body).decode().rstrip("=")
        return f"{text}.{self._mac(kind, text)}"

    def _open(self, kind: str, cookie: str) -> dict[str, Any] | None:
        text, _, mac = cookie.partition(".")
        if len(cookie) > MAX_COOKIE or not hmac.compare_digest(mac.encode(), self._mac(kind, text).encode()):
            return None
        found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return found if found["until"] > self._clock() else None

    def _mac(self, kind: str, text: str) -> str:
        return hmac.new(self._secret, f"{kind}\x00{text}".encode(), hashlib.sha256).hexdigest()


def _explained(page: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await page(request)
        except (Invalid, Retry) as error:
            return PlainTextResponse(f"{error}\n", 403 if isinstance(error, Invalid) else 503)

    return answer
