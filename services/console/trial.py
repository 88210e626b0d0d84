"""Try an expert beside its base: a reader's text goes on to the `connito serve` that the console knows; both answers come back.

The server permits what it permits its own users, of whom the console is one. What a reader may not see, pages do not offer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from connito.errors import Invalid, Retry
from connito.render import formats

SIDES = ("base", "expert")
MAX_TEXT, EXAMPLE_TEXT, MAX_FORM_BYTES, MAX_LINE = 4000, 1000, 64 << 10, 1 << 20
LENGTHS = (32, 64, 128)
# Readers whose answers are computed at once; offers are asked for again after so long.
AT_ONCE, FRESH_SECONDS = 4, 5.0
# An answer is cut when its time is up, long before its socket would end by itself, and is told as late.
ASK_SECONDS, ANSWER_SECONDS = 2.0, 120.0
# What reading an answer raises that is not what it should be.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Offer:
    """The names under which a server has an expert and its base, or the sentence that says why it cannot be tried."""

    models: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Asked:
    """A reader's wish: the text to go on with, the most tokens, and whether words are drawn or the likeliest."""

    text: str
    tokens: int = LENGTHS[1]
    drawn: bool = False

    @classmethod
    def read(cls, form: Mapping[str, str]) -> Asked:
        """Read a form. Raises `Invalid` for one that the page cannot have sent."""
        asked = cls.kept(form)
        if not asked.text.strip():
            raise Invalid("There is no text to go on with.")
        if len(asked.text) > MAX_TEXT:
            raise Invalid(f"The text has {formats.count(len(asked.text), 'character')}; try at most {MAX_TEXT:,}.")
        if str(asked.tokens) != form.get("tokens"):
            raise Invalid(f"An answer has {', '.join(map(str, LENGTHS))} tokens.")
        return asked

    @classmethod
    def kept(cls, form: Mapping[str, str]) -> Asked:
        """Return what a form says, to be shown again whether or not it can be answered."""
        # A browser sends lines as CR LF, and counts an end of line as one character.
        text = form.get("text", "").replace("\r\n", "\n").replace("\r", "\n")
        tokens = next((length for length in LENGTHS if str(length) == form.get("tokens")), LENGTHS[1])
        return cls(text, tokens, form.get("words") == "drawn")


def example_of(text: str) -> str:
    """Return a text that experts are measured on. Raises `Invalid` for one that is too short or too long."""
    if len(text.strip()) < 2:
        raise Invalid("There is no text to measure.")
    if len(text) > EXAMPLE_TEXT:
        raise Invalid(f"The text has {formats.count(len(text), 'character')}; measure at most {EXAMPLE_TEXT:,}.")
    return text


@dataclass(frozen=True)
class Piece:
    """Some of the answer of one side; `problem`: why there will be no more of it."""

    side: str
    text: str = ""
    problem: str = ""


async def as_events(pieces: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
    """Give pieces as events of a stream, and a last one with the name `end`."""
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield f"event: piece\ndata: {json.dumps(vars(piece))}\n\n"
        except Retry as error:
            yield f"event: piece\ndata: {json.dumps(vars(Piece(SIDES[0], problem=str(error))))}\n\n"
    yield "event: end\ndata:\n\n"


class _Line:
    """A connection in the hand of a thread, which anybody may cut: what the thread waits for then ends at once."""

    def __init__(self) -> None:
        self._lock, self.over = threading.Lock(), False
        self._socket: socket.socket | None = None

    def hold(self, line: socket.socket) -> None:
        """Make known what is to be cut. Raises `ConnectionAbortedError` where it was cut before."""
        with self._lock:
            self._socket = line
            if self.over:
                raise ConnectionAbortedError("nobody waits any more")

    def cut(self) -> None:
        """End it, also under a thread that reads: the server then computes no more."""
        with self._lock:
            self.over = True
            if self._socket is not None:
                # Not closed: its number could be another's by the time the thread looks.
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it and give the socket back; its thread does."""
        self.cut()
        with self._lock:
            if self._socket is not None:
                self._socket.close()


def _told(document: Mapping[str, Any]) -> str:
    """Return what an error says: its message, or itself where it is only that."""
    error = document["error"]
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _cut(lines: Iterable[_Line]) -> None:
    for line in lines:
        line.cut()


@dataclass(frozen=True)
class _Models:
    """The names that a server has, and when it gave them; or the sentence that says why none are known."""

    names: tuple[str, ...] = ()
    problem: str = ""
    at: float = field(default_factory=time.monotonic)


class Trial:
    """A server of experts as the console asks it. Without an address nothing can be tried."""

    def __init__(self, url: str = "", key: str = "") -> None:
        self._parts, self.url = urlsplit(url), url.rstrip("/")
        # A file or a line of shell leaves a newline behind.
        self._key, self._running = key.strip(), 0
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None
        self._models: _Models | None = None
        self._question: tuple[_Line, asyncio.Future[_Models]] | None = None
        # Not asyncio's threads: whoever waits for this server holds up nothing else, and all tries find a thread.
        self._sides = ThreadPoolExecutor(len(SIDES) * AT_ONCE, "try")
        self._asking = ThreadPoolExecutor(1, "models")
        self._lines: set[_Line] = set()

    def close(self) -> None:
        """Cut what is under way, and wait for nothing."""
        _cut(list(self._lines))
        for pool in (self._sides, self._asking):
            pool.shutdown(wait=False)

    async def offer(self, expert: str) -> Offer:
        """Return how the server names an expert and its base."""
        if not self.url:
            return Offer(
                problem="This console knows no server to ask: CONNITO_CONSOLE_SERVE_URL names it a `connito serve`."
            )
        models = await self._known()
        if models.problem:
            return Offer(problem=models.problem)
        name = next((name for name in models.names if name.endswith(f"+{expert}")), "")
        if not name:
            return Offer(
                problem=f"The server at {self.url} has no such expert: it serves another base, or its terms leave it out."
            )
        return Offer({"base": name.removesuffix(f"+{expert}"), "expert": name})

    async def pieces(self, offer: Offer, asked: Asked) -> AsyncGenerator[Piece]:
        """Give both answers as they come. Leaving early ends them at the server, too. Raises `Retry` where too many ask."""
        self._take_place()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def put(piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the console has ended
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        lines = {side: _Line() for side in SIDES}
        works = [
            loop.run_in_executor(self._sides, self._side, side, offer.models[side], asked, line, put)
            for side, line in lines.items()
        ]
        late = loop.call_later(ANSWER_SECONDS, _cut, lines.values())
        # Also where the reader has left: threads that still wait for a name or an address to answer are not free.
        asyncio.gather(*works, return_exceptions=True).add_done_callback(self._free)
        try:
            left = len(works)
            while left:
                if (piece := await queue.get()) is None:
                    left -= 1
                else:
                    yield piece
        finally:
            late.cancel()
            _cut(lines.values())

    async def losses(self, models: Sequence[str], text: str) -> dict[str, float | str]:
        """Return the loss of a text by each model, in nats per token, or the sentence that says why that one has none. Raises
        `Retry` where nobody answers, `Invalid` where what answers is no such server.
        """
        self._take_place()
        loop, lines = asyncio.get_running_loop(), {model: _Line() for model in models}
        work = loop.run_in_executor(self._sides, self._losses, lines, text)
        work.add_done_callback(self._free)
        late = loop.call_later(ANSWER_SECONDS, _cut, lines.values())
        try:
            return await asyncio.shield(work)
        finally:
            late.cancel()
            _cut(lines.values())

    def _losses(self, lines: Mapping[str, _Line], text: str) -> dict[str, float | str]:
        self._lines.update(lines.values())
        try:
            return {
                model: self._late() if line.over else self._loss(model, line, text) for model, line in lines.items()
            }
        finally:
            self._lines.difference_update(lines.values())
            for line in lines.values():
                line.close()

    def _loss(self, model: str, line: _Line, text: str) -> float | str:
        body = {"model": model, "prompt": text, "echo": True, "logprobs": 0, "max_tokens": 0}
        try:
            document = json.loads(self._open(line, "POST", "/completions", body, 2 * ANSWER_SECONDS).read(MAX_LINE))
            scores = document["choices"][0]["logprobs"]["token_logprobs"][1:]
            return -sum(map(float, scores)) / len(scores)
        except Exception as error:
            if line.over:
                return self._late()
            if isinstance(error, Invalid):
                return str(error)
            if isinstance(error, (OSError, HTTPException)):
                raise self._away(error) from error
            if isinstance(error, (*UNREADABLE, IndexError, ZeroDivisionError)):
                raise self._other(error) from error
            raise

    def _take_place(self) -> None:
        if self._running >= AT_ONCE:
            raise Retry("Others are trying experts at this moment; try again in a minute.")
        self._running += 1

    def _free(self, _: object) -> None:
        self._running -= 1

    async def answers(self, offer: Offer, asked: Asked) -> dict[str, Piece]:
        """Return both answers in whole."""
        found = {side: Piece(side) for side in SIDES}
        async with aclosing(self.pieces(offer, asked)) as pieces:
            async for piece in pieces:
                found[piece.side] = Piece(piece.side, found[piece.side].text + piece.text, piece.problem)
        return found

    async def _known(self) -> _Models:
        """Return what the server has, asked a moment ago: one question for all who wait, and none for longer than that."""
        if self._models is not None and time.monotonic() - self._models.at <= FRESH_SECONDS:
            return self._models
        if self._question is None or self._question[1].done():
            line = _Line()
            self._question = line, asyncio.get_running_loop().run_in_executor(self._asking, self._ask, line)
        line, answer = self._question
        await asyncio.wait((answer,), timeout=ASK_SECONDS)
        line.cut()
        self._models = answer.result() if answer.done() else _Models(problem=str(self._away(TimeoutError())))
        return self._models

    def _ask(self, line: _Line) -> _Models:
        self._lines.add(line)
        try:
            document = json.loads(self._open(line, "GET", "/models", None, ASK_SECONDS).read(MAX_LINE))
            return _Models(tuple(str(entry["id"]) for entry in document["data"]))
        except (Invalid, Retry) as error:
            return _Models(problem=str(error))
        except (OSError, HTTPException) as error:
            return _Models(problem=str(self._away(error)))
        except UNREADABLE as error:
            return _Models(problem=str(self._away(TimeoutError()) if line.over else self._other(error)))
        finally:
            self._lines.discard(line)
            line.close()

    def _side(self, side: str, model: str, asked: Asked, line: _Line, put: Callable[[Piece | None], None]) -> None:
        """Put one side's pieces, then None; in a thread of its own."""
        self._lines.add(line)
        try:
            for text in self._texts(model, asked, line):
                put(Piece(side, text))
        except (Invalid, Retry) as error:
            # Nobody reads this but who has waited for as long as anybody may.
            put(Piece(side, problem=self._late() if line.over else str(error)))
        finally:
            self._lines.discard(line)
            line.close()
            put(None)

    def _texts(self, model: str, asked: Asked, line: _Line) -> Iterator[str]:
        body = {
            "model": model, "prompt": asked.text, "max_tokens": asked.tokens, "stream": True,
            **({"temperature": 0.8, "top_p": 0.95} if asked.drawn else {"temperature": 0}),
        }  # fmt: skip
        answer = self._open(line, "POST", "/completions", body, 2 * ANSWER_SECONDS)
        while said := self._line(answer):
            if said.startswith(b"data: [DONE]"):
                return
            if said.startswith(b"data: "):
                yield from self._read(said.removeprefix(b"data: "))
        raise self._away(ConnectionError("it stopped before the end"))

    def _line(self, answer: HTTPResponse) -> bytes:
        try:
            return answer.readline(MAX_LINE)
        except (OSError, HTTPException, ValueError) as error:
            raise self._away(error) from error

    def _read(self, data: bytes) -> list[str]:
        """Return the texts of one event. Raises `Invalid` for an error that it tells, and for what is no such event."""
        try:
            document = json.loads(data)
            if document.get("error"):
                raise Invalid(_told(document))
            return [str(choice.get("text") or "") for choice in document.get("choices", ())]
        except UNREADABLE as error:
            raise self._other(error) from error

    def _open(
        self, line: _Line, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> HTTPResponse:
        """Ask, and return the answer to be read. Raises `Retry` where nobody answers, `Invalid` with what a refusal says."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection = self._connect(line, seconds)
            connection.request(method, self._parts.path.rstrip("/") + path, data, headers)
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise self._away(error) from error
        except ValueError as error:
            # Its text may hold the key, and so may what led to it.
            raise Invalid(
                f"{self.url} cannot be asked ({type(error).__name__}); see CONNITO_CONSOLE_SERVE_URL and _KEY."
            ) from None
        if answer.status == 200:
            return answer
        try:
            said = _told(json.loads(answer.read(MAX_LINE)))
        except (OSError, HTTPException, *UNREADABLE):
            said = f"{answer.status} {answer.reason}"
        raise Invalid(f"The server at {self.url} refuses: {said}")

    def _connect(self, line: _Line, seconds: float) -> HTTPConnection:
        """Connect, with nothing to wait for that `line` could not cut, but the name's and the address's own answer."""
        host, port = self._parts.hostname or "", self._parts.port or (80 if self._tls is None else 443)
        reached = socket.create_connection((host, port), ASK_SECONDS)
        if self._tls is None:
            connection = HTTPConnection(host, port)
        else:
            connection = HTTPSConnection(host, port, context=self._tls)
            reached = self._tls.wrap_socket(reached, server_hostname=host, do_handshake_on_connect=False)
        connection.sock = reached
        line.hold(reached)
        if isinstance(reached, ssl.SSLSocket):
            reached.do_handshake()
        reached.settimeout(seconds)
        return connection

    def _late(self) -> str:
        return f"The server at {self.url} did not come to an end in {ANSWER_SECONDS:g} seconds."

    def _away(self, error: Exception) -> Retry:
        why = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
        return Retry(f"No server answers at {self.url} ({why}); `connito serve --base BASE` starts one.")

    def _other(self, error: Exception) -> Invalid:
        return Invalid(f"What answers at {self.url} is no `connito serve` ({type(error).__name__}).")
