"""Sign in at an identity provider: OpenID Connect, authorization code with PKCE.

Who somebody is lies in a signed cookie. What the provider is asked again with, to hear of a role that was taken away, is in
this process's memory alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from connito.errors import Invalid, Retry
from connito.library.governance import Viewer
from connito.service.oidc import Tokens, claims_at, refusal
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

FLOW, SESSION = "connito_sign_in", "connito_session"
FLOW_SECONDS, SESSION_SECONDS = 600, 3600
# The provider is asked again, when the reader comes, after so long; whoever loses a role there keeps it here no longer. Where it
# gives nothing to ask with, the session's hour is the limit.
ASK_SECONDS = 45
# The oldest is forgotten for one more; its reader is sent to the provider again.
MOST_SESSIONS = 10_000
# Browsers keep no larger cookie.
MAX_COOKIE = 3800
BEGIN, BACK = "/sign-in", "/sign-in/back"


@dataclass
class _Session:
    """A reader as the provider saw them at `asked_at`, and the tokens it is asked again with."""

    subject: str
    viewer: Viewer
    asked_at: float
    access: str = ""
    refresh: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SignIn:
    """The way of a reader from here to the provider and back. `secret` signs cookies; `url` is where readers find this page."""

    def __init__(
        self, tokens: Tokens, client: str, client_secret: str, url: str, scopes: str, secret: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.tokens, self._client, self._client_secret = tokens, client, client_secret
        self._back, self._scopes = url.rstrip("/") + BACK, scopes
        self._secret, self._clock = secret, clock
        self._sessions: dict[str, _Session] = {}

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
        claims, session = await self._redeem(query.get("code", ""), flow)
        viewer, name = self.tokens.viewer(claims), secrets.token_urlsafe(16)
        session.viewer = viewer
        what = {"name": viewer.name, "organisations": sorted(viewer.organisations), "everything": viewer.everything}
        asked = {"id": name, "asked": int(self._clock())} if session.refresh or session.access else {}
        sealed = self._seal(SESSION, {**what, **asked}, SESSION_SECONDS)
        if len(sealed) > MAX_COOKIE:
            raise refusal("it names more organisations than fit into a cookie")
        if asked:
            while len(self._sessions) >= MOST_SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[name] = session
        return sealed

    async def viewer(self, cookies: Mapping[str, str]) -> Viewer | None:
        """Return who the session's cookie stands for, None without a valid one, or where the provider takes it back."""
        found = self._open(SESSION, cookies.get(SESSION, ""))
        if found is None:
            return None
        session = self._sessions.get(str(found.get("id", "")))
        if session is not None:
            return await self._still(str(found["id"]), session)
        # Begun at another process, or before this one was started: the reader is sent to the provider again soon.
        if "asked" in found and self._clock() - found["asked"] >= ASK_SECONDS:
            return None
        return Viewer(found["name"], frozenset(found["organisations"]), everything=bool(found["everything"]))

    async def _still(self, name: str, session: _Session) -> Viewer | None:
        """Ask the provider, where that is due, who the reader is by now; while it is away, what it said last counts."""
        async with session.lock:
            if self._clock() - session.asked_at >= ASK_SECONDS:
                session.asked_at = self._clock()
                try:
                    session.viewer = self.tokens.viewer(await self._again(session))
                except Retry:
                    pass
                except Invalid:
                    self._sessions.pop(name, None)
                    return None
        return session.viewer if name in self._sessions else None

    async def _again(self, session: _Session) -> dict[str, Any]:
        """Return what the provider says of a session's reader now. Raises `Invalid` where it has ended there, `Retry`."""
        claims: dict[str, Any] = {"sub": session.subject}
        if session.refresh:
            answer = await self._token({"grant_type": "refresh_token", "refresh_token": session.refresh})
            session.refresh = str(answer.get("refresh_token") or session.refresh)
            session.access = str(answer.get("access_token") or session.access)
            if answer.get("id_token"):
                claims = await self.tokens.claims(str(answer["id_token"]), self._client)
                if claims["sub"] != session.subject:
                    raise refusal("the provider speaks of somebody else")
        return claims if claims_at(claims, self.tokens.claim) is not None else await self._more(claims, session.access)

    def forget(self, cookies: Mapping[str, str]) -> None:
        """End a session here, whoever still has its cookie."""
        found = self._open(SESSION, cookies.get(SESSION, "")) or {}
        self._sessions.pop(str(found.get("id", "")), None)

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

    async def _redeem(self, code: str, flow: Mapping[str, Any]) -> tuple[dict[str, Any], _Session]:
        """Exchange the code for what the provider says of the reader, in the ID token or beside it, and what asks it again."""
        answer = await self._token(
            {
                "grant_type": "authorization_code",
                "code": code,
                "redirect_uri": self._back,
                "code_verifier": str(flow["verifier"]),
            }
        )
        claims = await self.tokens.claims(str(answer.get("id_token", "")), self._client)
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), str(flow["nonce"]).encode()):
            raise refusal("it answers another question (its nonce is wrong)")
        if isinstance(claims["aud"], list) and len(claims["aud"]) > 1 and claims.get("azp") != self._client:
            raise refusal("it is for several, and not first for this console")
        access, refresh = (str(answer.get(name) or "") for name in ("access_token", "refresh_token"))
        beside = dict(claims)
        if access and (not refresh or claims_at(claims, self.tokens.claim) is None):
            try:
                beside = await self._more({"sub": claims["sub"]}, access)
            except (Invalid, Retry):
                if claims_at(claims, self.tokens.claim) is None:
                    raise
        # An access token asks again only where what lies beside the ID token says what somebody may see.
        asks = access if refresh or claims_at(beside, self.tokens.claim) is not None else ""
        nobody = Viewer(f"oidc:{claims['sub']}")
        return {**beside, **claims}, _Session(claims["sub"], nobody, self._clock(), asks, refresh)

    async def _token(self, form: Mapping[str, str]) -> dict[str, Any]:
        """Return what the provider gives for a code or a refresh token. Raises `Invalid` where it gives nothing, `Retry`."""
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        if self._client_secret:
            pair = f"{quote(self._client, safe='')}:{quote(self._client_secret, safe='')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        address = await self.tokens.provider.about("token_endpoint")
        return await self.tokens.provider.answer(
            "POST", address, headers, urlencode({**form, "client_id": self._client}).encode()
        )

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
