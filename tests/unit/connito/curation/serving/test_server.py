"""Whose turn it is where prompts are scored, and that the model is one's own until one is done."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

from connito.curation.serving.generation import Generator
from connito.curation.serving.requests import Sampling
from connito.curation.serving.roster import Asked, Roster
from connito.curation.serving.scoring import Scores
from connito.curation.serving.server import Server, Usage, Work
from connito.library.governance import Viewer
from connito.runtime.tasks import end_tasks


class Model:
    """Scores one prompt after the other, and notes when; `answers` are in the making."""

    def __init__(self, answers: int = 0) -> None:
        self.answers, self.let_go, self.begun = answers, threading.Event(), threading.Event()
        self.spans: list[tuple[int, float, float]] = []

    def busy(self) -> int:
        return self.answers

    def score(self, ids: list[int], slot: int, count: int, ahead: bool) -> Scores:
        began = time.monotonic()
        self.begun.set()
        assert self.let_go.wait(10)
        time.sleep(0.02)
        self.spans.append((ids[0], began, time.monotonic()))
        return Scores(ids)


def server(model: Model) -> Server:
    words = SimpleNamespace(get_vocab=lambda: {"x": 0}, decode=lambda ids, **_: "x" * len(ids))
    roster = SimpleNamespace(use=lambda *_: None)
    return Server(cast(Generator, model), cast(Roster, roster), words, waiting=99, seconds=1.0)


async def read(server: Server, *prompts: int) -> None:
    asked = cast(Asked, SimpleNamespace(experts=(), key=()))
    work = Work(asked, Viewer(), [[prompt] for prompt in prompts], Sampling(0), [], Usage(), likeliest=0)
    async with aclosing(server.pieces(work)) as pieces:
        assert [piece.index async for piece in pieces] == list(range(len(prompts)))


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


async def test_who_asks_for_many_scores_does_not_keep_others_waiting_for_all_of_them() -> None:
    model = Model()
    serving = server(model)
    many = asyncio.create_task(read(serving, 1, 2, 3))
    await until(model.begun)
    one = asyncio.create_task(read(serving, 9))
    await asyncio.sleep(0)
    model.let_go.set()
    await asyncio.gather(many, one)
    assert [prompt for prompt, _, _ in model.spans] == [1, 9, 2, 3]
    assert serving._scoring == 0


async def test_answers_in_the_making_have_as_long_as_a_score_took() -> None:
    model = Model(answers=1)
    model.let_go.set()
    await read(server(model), 1, 2, 3)
    for (_, began, ended), (_, following, _) in zip(model.spans, model.spans[1:], strict=False):
        assert following - ended >= 0.9 * (ended - began)


async def test_a_client_that_leaves_leaves_the_model_when_its_score_is_done() -> None:
    """The thread went on, and whoever came next had the model beside it: other experts' rows under its tokens."""
    model = Model()
    serving = server(model)
    leaving = asyncio.create_task(read(serving, 1, 2))
    await until(model.begun)
    ending = asyncio.create_task(end_tasks([leaving]))
    staying: Any = asyncio.create_task(read(serving, 9))
    # Longer than a cancelled task is left in peace.
    await asyncio.sleep(0.6)
    model.let_go.set()
    await asyncio.gather(ending, staying)
    assert [prompt for prompt, _, _ in model.spans] == [1, 9]
    assert model.spans[1][1] >= model.spans[0][2]
    assert serving._scoring == 0
