"""Coming in with a token and going again, and reading the forms that pages send."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from .access import COOKIE, SESSION_SECONDS, Access
from .sign_in import BEGIN, SESSION

MAX_LOGIN_BYTES = 4096


def routes(access: Access, render: Callable[..., str], *, secure: bool) -> list[Route]:
    """Return the places to come in and go. `render` fills the login page; `secure`: a proxy in front speaks TLS."""

    async def login(request: Request) -> Response:
        if not access.token:
            return RedirectResponse("/" if access.sign_in is None else BEGIN, 303)
        wrong = False
        if request.method == "POST":
            if access.knows((await form(request, MAX_LOGIN_BYTES)).get("token", "").strip()):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(
                    COOKIE, access.cookie(), max_age=SESSION_SECONDS, httponly=True, samesite="strict",
                    secure=secure or request.url.scheme == "https",
                )  # fmt: skip
                return answer
            wrong = True
        begin = BEGIN if access.sign_in is not None else ""
        return HTMLResponse(render(wrong=wrong, begin=begin), 403 if wrong else 200)

    async def logout(request: Request) -> Response:
        if access.sign_in is not None:
            access.sign_in.forget(request.cookies)
        answer = RedirectResponse("/login" if access.token else "/", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        answer.delete_cookie(SESSION, httponly=True, samesite="lax")
        return answer

    coming = list(access.sign_in.routes(secure=secure)) if access.sign_in is not None else []
    return [
        *coming,
        Route("/login", login, methods=["GET", "POST"]),
        Route("/logout", logout, methods=["POST"]),
    ]


async def form(request: Request, most: int) -> dict[str, str]:
    """Return the fields of a form; none for a body that is no such form or has more than `most` bytes."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            return {}
    found = parse_qs(body.decode(errors="replace"), keep_blank_values=True)
    return {name: values[0] for name, values in found.items()}


def own_pages_only(request: Request) -> None:
    """Refuse a request for much work that another site's page has sent."""
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise HTTPException(403, "Only the console's own pages may ask for this.")
