"""Answers to requests: from what was asked, by whom, to text, in whole or as a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from connito.curation.serving.errors import RefusedError
from connito.curation.serving.generation import Generator
from connito.curation.serving.requests import ChatRequest, CompletionRequest, Sampling, sequences
from connito.curation.serving.roster import BASE_ALONE, Asked, Loaded, Roster, refused
from connito.curation.serving.scoring import document
from connito.curation.serving.text import Writer
from connito.errors import Retry
from connito.library.governance import Viewer
from connito.render import formats
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks

log = get_logger(__name__)

T = TypeVar("T")


@dataclass
class Usage:
    """Tokens of one request."""

    prompt: int = 0
    completion: int = 0

    def document(self) -> dict[str, int]:
        """Return the counts as the interface names them."""
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion,
                "total_tokens": self.prompt + self.completion}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Text of answer `index`; with the last one comes why it ended."""

    index: int
    text: str
    logprobs: dict[str, list[Any]] | None = None
    finish: str | None = None


@dataclass
class Work:
    """One request that will be answered: prompts as ids, each `n` times. `likeliest`: prompts are scored, beside so many."""

    asked: Asked
    viewer: Viewer
    prompts: list[list[int]]
    how: Sampling
    stops: list[str]
    usage: Usage
    n: int = 1
    likeliest: int | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


class Server:
    """One model, its experts, and whoever asks for them."""

    def __init__(self, generator: Generator, roster: Roster, tokenizer: Any, *, waiting: int, seconds: float) -> None:
        """Answer at most `waiting` requests at once; look every `seconds` whether experts may still be used."""
        self.generator, self.roster, self._tokenizer = generator, roster, tokenizer
        self._waiting, self._seconds = waiting, seconds
        # Characters of the longest token.
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._changing, self._thread_bound = asyncio.Lock(), asyncio.Lock()
        # Whose prompt is scored next, and how many are to be.
        self._turn, self._scoring = asyncio.Lock(), 0

    async def prepare(self, request: ChatRequest | CompletionRequest, viewer: Viewer) -> Work:
        """Read a request as far as it can be without the model. Raises `RefusedError`."""
        scored = isinstance(request, CompletionRequest) and request.scores()
        likeliest = request.logprobs if isinstance(request, CompletionRequest) and scored else None
        asked = self.roster.read(request.model)
        async with self._thread_bound:
            await asyncio.to_thread(self.roster.permit, asked, viewer, self._seconds)
        given = request.prompt if isinstance(request, CompletionRequest) else [request]
        wanted = sequences(request, given)
        if self.generator.busy() + self._scoring + wanted > self._waiting:
            raise RefusedError(429, "too many requests wait already; try again", code="rate_limit_exceeded")
        prompts = [await asyncio.to_thread(self._ids, prompt) for prompt in given]
        how = self._sampling(request, max(map(len, prompts)), answers=likeliest is None)
        usage = Usage(sum(map(len, prompts)))
        return Work(asked, viewer, prompts, how, request.stop, usage, request.n or 1, likeliest)

    async def pieces(self, work: Work) -> AsyncGenerator[Piece]:
        """Give the answers' text as it comes, those of one request interleaved. Leaving early cancels them."""
        async with self._loaded(work) as loaded:
            self.roster.use(work.asked, work.viewer)
            queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
            wanted = [ids for ids in work.prompts for _ in range(work.n)]
            if work.likeliest is None:
                jobs = [asyncio.create_task(self._one(*each, loaded, work, queue)) for each in enumerate(wanted)]
            else:
                jobs = [asyncio.create_task(self._score(loaded, work, queue))]
            left = len(wanted)
            try:
                while left:
                    piece = await queue.get()
                    if isinstance(piece, Exception):
                        raise piece
                    left -= piece.finish is not None
                    yield piece
            finally:
                await end_tasks(jobs)

    async def keep_watch(self) -> None:
        """Write uses down, and take experts out that may no longer be used, until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self.look()
            except Retry as error:
                log.warning("the library does not answer", error=str(error))

    async def look(self) -> None:
        """Write uses down, and take experts out that may no longer be used."""
        await asyncio.to_thread(self.roster.write_uses)
        async with self._changing:
            gone = await _to_its_end(self._change, self.roster.unload_refused)
        for loaded in gone:
            log.info("taken out", experts=list(loaded.experts), why=loaded.gone)

    def _change(self, what: Any, *arguments: Any) -> Any:
        with self.generator.paused():
            made = what(*arguments)
        metrics.SERVE_LOADED.set(len(self.roster.loaded))
        metrics.SERVE_ROW_BYTES.set(self.generator.table.row_bytes())
        return made

    @asynccontextmanager
    async def _loaded(self, work: Work) -> AsyncIterator[Loaded]:
        if not work.asked.experts:
            yield BASE_ALONE
            return
        async with self._changing:
            there = work.asked.key in self.roster.loaded
            load: Callable[[Asked], Loaded] = self.roster.load
            loaded = load(work.asked) if there else await _to_its_end(self._change, load, work.asked)
            loaded.busy += 1
        try:
            yield loaded
        finally:
            loaded.busy -= 1

    async def _one(
        self, index: int, ids: list[int], loaded: Loaded, work: Work, queue: asyncio.Queue[Piece | Exception]
    ) -> None:
        """Write one answer's pieces into the queue, or what went wrong."""
        writer, finish, begun = Writer(self._tokenizer, work.stops), "length", time.monotonic()
        # Answers of one request differ, each by its place.
        how = replace(work.how, seed=f"{work.how.seed}/{index}") if work.how.seed else work.how
        try:
            async with aclosing(self.generator.answer(ids, loaded.slot, how)) as steps:
                async for new in steps:
                    if loaded.gone:
                        raise refused(loaded.gone)
                    if begun:
                        metrics.SERVE_FIRST_TOKEN.observe(time.monotonic() - begun)
                        begun = 0.0
                    work.usage.completion += len(new)
                    metrics.SERVE_TOKENS.labels("completion").inc(len(new))
                    ended = new[-1] in self.generator.ends
                    if text := writer.add(new[:-1] if ended else new):
                        queue.put_nowait(Piece(index, text))
                    if ended or writer.stopped:
                        finish = "stop"
                        break
            queue.put_nowait(Piece(index, writer.rest(), finish=finish))
        except RefusedError as error:
            queue.put_nowait(error)
        except Exception as error:
            log.exception("an answer failed")
            queue.put_nowait(RefusedError(500, f"the answer failed: {type(error).__name__}"))

    async def _score(self, loaded: Loaded, work: Work, queue: asyncio.Queue[Piece | Exception]) -> None:
        """Write prompts and their scores into the queue, or what went wrong. One after the other: requests take turns, and
        answers in the making have as long after each as it took."""
        left = len(work.prompts)
        self._scoring += left
        count, ahead = work.likeliest or 0, work.how.max_tokens > 0
        try:
            for index, ids in enumerate(work.prompts):
                async with self._turn:
                    began = time.monotonic()
                    async with self._changing:
                        if loaded.gone:
                            raise refused(loaded.gone)
                        found = await _to_its_end(self.generator.score, ids, loaded.slot, count, ahead)
                    if self.generator.busy():
                        await asyncio.sleep(time.monotonic() - began)
                work.usage.completion += ahead
                self._scoring, left = self._scoring - 1, left - 1
                text, logprobs = await asyncio.to_thread(document, self._tokenizer, found)
                queue.put_nowait(Piece(index, text, logprobs, finish="length"))
        except RefusedError as error:
            queue.put_nowait(error)
        except Exception as error:
            log.exception("a prompt could not be scored")
            queue.put_nowait(RefusedError(500, f"the prompt could not be scored: {type(error).__name__}"))
        finally:
            self._scoring -= left

    def _ids(self, prompt: str | list[int] | ChatRequest) -> list[int]:
        self._check_length(prompt)
        if isinstance(prompt, str):
            ids = list(self._tokenizer(prompt)["input_ids"])
        elif isinstance(prompt, list):
            ids = prompt
        else:
            ids = self._conversation(prompt)
        if any(token >= self.generator.vocabulary for token in ids):
            raise RefusedError(400, f"token ids go up to {self.generator.vocabulary - 1}", param="prompt")
        if not ids:
            raise RefusedError(400, "the prompt is empty", param="prompt")
        metrics.SERVE_TOKENS.labels("prompt").inc(len(ids))
        return ids

    def _check_length(self, prompt: str | list[int] | ChatRequest) -> None:
        """Refuse text that cannot fit, whatever its tokens are, before it is made into them."""
        if isinstance(prompt, list):
            return
        texts = [prompt] if isinstance(prompt, str) else [message.plain()["content"] for message in prompt.messages]
        characters, most = sum(map(len, texts)), self.generator.context * self._longest
        if characters > most:
            raise RefusedError(
                400, f"the model's context is {self.generator.context} tokens, and this request has "
                f"{formats.count(characters, 'character')}: "
                "shorten it", code="context_length_exceeded", param="prompt" if isinstance(prompt, str) else "messages",
            )  # fmt: skip

    def _conversation(self, request: ChatRequest) -> list[int]:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise RefusedError(400, "this base has no chat template: use /v1/completions", param="messages")
        messages = [message.plain() for message in request.messages]
        try:
            made = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RefusedError(
                400, f"the chat template does not take these messages: {error}", param="messages"
            ) from error
        return list(made["input_ids"])

    def _sampling(self, request: ChatRequest | CompletionRequest, prompt: int, *, answers: bool) -> Sampling:
        room, wanted = self.generator.context - prompt, request.limit()
        if room < (max(1, wanted or 1) if answers else 0):
            asked = f"{formats.count(prompt, 'token')} of prompt" + (f" and {wanted} of answer" if wanted else "")
            raise RefusedError(
                400, f"the model's context is {self.generator.context} tokens, and this request has {asked}: shorten one",
                code="context_length_exceeded", param="messages" if isinstance(request, ChatRequest) else "prompt",
            )  # fmt: skip
        most = room if wanted is None else wanted
        given: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        if request.seed is not None:
            given["seed"] = str(request.seed)
        return Sampling(most, **{name: value for name, value in given.items() if value is not None})


async def _to_its_end(what: Callable[..., T], *arguments: Any) -> T:
    """Return what a function gives in a thread, which has the model to itself until it ends: also where who waits has left."""
    work = asyncio.ensure_future(asyncio.to_thread(what, *arguments))
    try:
        return await asyncio.shield(work)
    finally:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((work,))
