"""The routes of OpenAI's interface: models, chat and completions, whole or as server-sent events; health and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from connito.curation.serving.errors import RefusedError
from connito.curation.serving.requests import ChatRequest, CompletionRequest, read_request
from connito.curation.serving.server import Piece, Server, Work
from connito.data.documents import parse_json
from connito.errors import Environment
from connito.library.governance import Viewer
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks

log = get_logger(__name__)
MAX_BODY = 4 << 20
_PATHS = "/v1/models, /v1/completions, /v1/chat/completions, /healthz, /readyz, /metrics"
Keys = Mapping[str, Viewer]


def application(server: Server, viewer: Viewer, keys: Keys) -> Starlette:
    """Return the application. `keys`: who asks, by bearer key; without any everybody is `viewer`."""

    def who(request: Request) -> Viewer:
        if not keys:
            return viewer
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or key.strip() not in keys:
            raise RefusedError(
                401, "the API key is missing or wrong: send `Authorization: Bearer KEY`", code="invalid_api_key"
            )
        return keys[key.strip()]

    async def models(request: Request) -> Response:
        names = await asyncio.to_thread(server.roster.names, who(request))
        return JSONResponse({"object": "list", "data": [_model(name) for name in names]})

    async def model(request: Request) -> Response:
        name, asked = request.path_params["name"], server.roster.read(request.path_params["name"])
        await asyncio.to_thread(server.roster.permit, asked, who(request), 0.0)
        return JSONResponse(_model(name))

    async def complete(request: Request) -> Response:
        asked = read_request(CompletionRequest, await _body(request))
        return await _answer(request, server, await server.prepare(asked, who(request)), asked, _COMPLETION)

    async def chat(request: Request) -> Response:
        asked = read_request(ChatRequest, await _body(request))
        return await _answer(request, server, await server.prepare(asked, who(request)), asked, _CHAT)

    async def health(_: Request) -> Response:
        alive = server.generator.alive()
        return PlainTextResponse("ok" if alive else "the model is not running", 200 if alive else 503)

    async def figures(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/v1/models", counted(models)),
        Route("/v1/models/{name:path}", counted(model)),
        Route("/v1/completions", counted(complete), methods=["POST"]),
        Route("/v1/chat/completions", counted(chat), methods=["POST"]),
        Route("/healthz", health),
        Route("/readyz", health),
        Route("/metrics", figures),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


def counted(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Answer refusals in the interface's shape, and count how requests went."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except RefusedError as error:
            response = JSONResponse(error.document(), error.status)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Environment as error:
            response = JSONResponse(RefusedError(503, f"{error}; try again").document(), 503)
        except Exception:
            log.exception("a request failed")
            response = JSONResponse(RefusedError(500, "the server failed; see its log").document(), 500)
        metrics.SERVE_REQUESTS.labels(str(response.status_code)).inc()
        return response

    return answer


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = str(error.detail) if error.status_code != 404 else f"there is none of that here; this server has {_PATHS}"
    return JSONResponse(RefusedError(error.status_code, said).document(), error.status_code, error.headers)


async def _body(request: Request) -> object:
    data = bytearray()
    async for block in request.stream():
        data += block
        if len(data) > MAX_BODY:
            raise RefusedError(413, f"the request has more than {MAX_BODY} bytes")
    try:
        return parse_json(bytes(data))
    except ValueError as error:
        raise RefusedError(400, f"the request is not JSON: {error}") from error


async def _answer(
    request: Request, server: Server, work: Work, asked: ChatRequest | CompletionRequest, form: Form
) -> Response:
    if asked.stream:
        return StreamingResponse(_events(server, work, asked, form), media_type="text/event-stream")
    gathering = asyncio.create_task(_gather(server, work))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not gathering.done():
            return Response(status_code=499)
        answers = gathering.result()
    finally:
        await end_tasks((gathering, leaving))
    choices = [form.whole(piece) for piece in answers]
    return JSONResponse(form.head(work, asked.model, whole=True) | {"choices": choices, "usage": work.usage.document()})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _gather(server: Server, work: Work) -> list[Piece]:
    found = [Piece(index, "") for index in range(len(work.prompts) * work.n)]
    async with aclosing(server.pieces(work)) as pieces:
        async for piece in pieces:
            found[piece.index] = replace(piece, text=found[piece.index].text + piece.text)
    return found


async def _events(server: Server, work: Work, asked: ChatRequest | CompletionRequest, form: Form) -> AsyncIterator[str]:
    head = form.head(work, asked.model, whole=False)
    try:
        for choice in form.first(len(work.prompts) * work.n):
            yield _event(head | {"choices": [choice]})
        async with aclosing(server.pieces(work)) as pieces:
            async for piece in pieces:
                yield _event(head | {"choices": [form.part(piece)]})
        if asked.with_usage():
            yield _event(head | {"choices": [], "usage": work.usage.document()})
    except RefusedError as error:
        yield _event(error.document())
    yield "data: [DONE]\n\n"


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "connito"}


class Form:
    """The objects that one endpoint writes answers as."""

    def __init__(self, prefix: str, whole: str, part: str) -> None:
        """Keep the names of its objects."""
        self._prefix, self._whole, self._part = prefix, whole, part

    def head(self, work: Work, model: str, *, whole: bool) -> dict[str, object]:
        """Return what every document of an answer begins with."""
        kind = self._whole if whole else self._part
        return {"id": f"{self._prefix}-{work.name}", "object": kind, "created": work.created, "model": model}

    def first(self, _: int) -> list[dict[str, object]]:
        """Return the choices that open a stream."""
        return []

    def whole(self, piece: Piece) -> dict[str, object]:
        """Return a whole answer."""
        return self.part(piece)

    def part(self, piece: Piece) -> dict[str, object]:
        """Return a piece of an answer."""
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": piece.logprobs}


class _Chat(Form):
    def first(self, count: int) -> list[dict[str, object]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "finish_reason": None, "logprobs": None} for index in range(count)]

    def whole(self, piece: Piece) -> dict[str, object]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, "finish_reason": piece.finish, "logprobs": None}

    def part(self, piece: Piece) -> dict[str, object]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.index, "delta": delta, "finish_reason": piece.finish, "logprobs": None}


_COMPLETION = Form("cmpl", "text_completion", "text_completion")
_CHAT = _Chat("chatcmpl", "chat.completion", "chat.completion.chunk")
