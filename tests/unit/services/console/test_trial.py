"""Trying an expert: what goes to the server, what comes back, and what is said where none answers or another does."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from connito.errors import Fatal, Invalid, Retry

from services.console.settings import ConsoleSettings
from services.console.trial import AT_ONCE, MAX_TEXT, SIDES, Asked, Offer, Piece, Trial
from tests.support.waiting import PATIENCE

Answer = Callable[[str, dict[str, object], asyncio.StreamWriter], Awaitable[None]]
OFFER = Offer({"base": "tiny", "expert": "tiny+law-1"})


def document(status: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@asynccontextmanager
async def server(answer: Answer, left: asyncio.Semaphore | None = None) -> AsyncIterator[str]:
    """A socket that answers as a test says; its address. With `left` it then waits until it is left, and says so."""

    served: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(cast("asyncio.Task[Any]", asyncio.current_task()))
        try:
            # Whoever leaves before the question is asked gets no answer.
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                await serve_one(reader, writer)
        finally:
            writer.close()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next((int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length")), 0)
        body = json.loads(await reader.readexactly(length)) if length else {}
        await answer(head, body, writer)
        if left is not None:
            with suppress(ConnectionError):
                await writer.drain()
                await reader.read()
            left.release()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    for task in served:
        task.cancel()
    await asyncio.gather(*served, return_exceptions=True)
    # What was closed is let go of in the loop's next round.
    await asyncio.sleep(0)


async def test_both_models_get_the_same_question_and_the_key() -> None:
    asked: list[dict[str, object]] = []

    async def answer(head: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        assert "authorization: bearer a-key" in head
        asked.append(body)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for text in ("one ", str(body["model"])):
            writer.write(f"data: {json.dumps({'choices': [{'text': text}]})}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")

    async with server(answer) as address:
        found = await Trial(address, "a-key").answers(OFFER, Asked("By law", 32))
    assert {side: piece.text for side, piece in found.items()} == {"base": "one tiny", "expert": "one tiny+law-1"}
    one, other = ({**body, "model": ""} for body in asked)
    assert one == other
    assert (one["prompt"], one["max_tokens"], one["temperature"]) == ("By law", 32, 0)


async def test_a_reader_who_leaves_ends_the_answers() -> None:
    left = asyncio.Semaphore(0)

    async def answer(_: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b'data: {"choices": [{"text": "more"}]}\n\n')

    reading = threading.Semaphore(0)

    class Watched(Trial):
        def _line(self, answer: Any) -> bytes:
            reading.release()
            return super()._line(answer)

    async with server(answer, left) as address, asyncio.timeout(20):
        trial = Watched(address)
        async with aclosing(trial.pieces(OFFER, Asked("By law"))) as pieces:
            assert [(await anext(pieces)).text for _ in SIDES] == ["more", "more"]
            # Nothing more comes, and a thread a side waits for it behind the first line and an empty one.
            for _ in range(6):
                await asyncio.to_thread(reading.acquire)
        await left.acquire()
        await left.acquire()
        await idle(trial)


async def idle(trial: Trial) -> None:
    while trial._running:  # noqa: ASYNC110 - it says nothing when it changes
        await asyncio.sleep(0.01)


async def drip(writer: asyncio.StreamWriter, drop: bytes) -> None:
    """Answer a little at a time, for as long as somebody listens."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    with suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(0.05)


async def silent(_: str, __: dict[str, object], ___: asyncio.StreamWriter) -> None:
    """Take a question and say nothing."""


async def test_a_reader_who_leaves_ends_what_has_not_begun_to_answer() -> None:
    left, asking = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def answer(_: str, __: dict[str, object], ___: asyncio.StreamWriter) -> None:
        asking.release()

    async with server(answer, left) as address, asyncio.timeout(20):
        trial = Trial(address)
        for _ in range(2):
            reader = asyncio.create_task(trial.answers(OFFER, Asked("By law")))
            for _ in SIDES:
                await asking.acquire()
            reader.cancel()
            for _ in SIDES:
                await left.acquire()
            await idle(trial)


async def test_what_ends_while_it_connects_is_cut_and_keeps_its_place_until_then() -> None:
    connecting, may = threading.Semaphore(0), threading.Event()

    class Slow(Trial):
        def _connect(self, line: Any, seconds: float) -> Any:
            connecting.release()
            may.wait(20)
            return super()._connect(line, seconds)

    left = asyncio.Semaphore(0)
    async with server(silent, left) as address, asyncio.timeout(20):
        trial = Slow(address)
        reader = asyncio.create_task(trial.answers(OFFER, Asked("By law")))
        for _ in SIDES:
            await asyncio.to_thread(connecting.acquire)
        reader.cancel()
        await asyncio.wait((reader,))
        assert trial._running == 1
        may.set()
        await idle(trial)


async def test_readers_who_wait_hold_up_nothing_else() -> None:
    asking = asyncio.Semaphore(0)

    async def answer(_: str, body: dict[str, object], __: asyncio.StreamWriter) -> None:
        asking.release()

    left = asyncio.Semaphore(0)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with server(answer, left) as address, asyncio.timeout(20):
        trial = Trial(address)
        readers = [asyncio.create_task(trial.answers(OFFER, Asked("By law"))) for _ in range(AT_ONCE)]
        for _ in range(AT_ONCE * len(SIDES)):
            await asking.acquire()
        assert await asyncio.to_thread(lambda: "done") == "done"
        # Closing waits for nothing, and ends them all.
        trial.close()
        for _ in range(AT_ONCE * len(SIDES)):
            await left.acquire()
        for found in await asyncio.gather(*readers):
            assert all(piece.problem for piece in found.values())


async def test_more_readers_than_the_server_is_asked_for_are_told_so() -> None:
    trial = Trial("http://127.0.0.1:9/v1")
    trial._running = AT_ONCE
    with pytest.raises(Retry, match="Others are trying"):
        await trial.answers(OFFER, Asked("By law"))


async def test_a_refusal_is_told_in_the_servers_words() -> None:
    async def answer(_: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(document("403 Forbidden", {"error": {"message": "law-1 is CC-BY-NC-4.0: no commercial use"}}))

    async with server(answer) as address:
        found = await Trial(address).answers(OFFER, Asked("By law"))
    assert "refuses: law-1 is CC-BY-NC-4.0: no commercial use" in found["expert"].problem


async def test_an_error_within_a_stream_is_told() -> None:
    async def answer(_: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        writer.write(b'data: {"choices": [{"text": "so"}]}\n\ndata: {"error": {"message": "law-1 is yanked"}}\n\n')

    async with server(answer) as address:
        found = await Trial(address).answers(OFFER, Asked("By law"))
    assert found["expert"] == Piece("expert", "so", "law-1 is yanked")


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"data": 1}', b'{"data": [{}]}', b"[" * 99_999])
async def test_what_is_no_server_of_experts_is_named(body: bytes) -> None:
    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

    async with server(answer) as address:
        assert "is no `connito serve`" in (await Trial(address).offer("law-1")).problem


async def test_an_offer_names_the_expert_and_the_base_as_the_server_does() -> None:
    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        names = ("my base", "my base+law-1", "my base+other-law-1")
        writer.write(document("200 OK", {"data": [{"id": name} for name in names]}))

    async with server(answer) as address:
        trial = Trial(address)
        assert (await trial.offer("law-1")).models == {"base": "my base", "expert": "my base+law-1"}
        assert "no such expert" in (await trial.offer("law-2")).problem


async def test_nobody_there_and_nobody_named_are_sentences() -> None:
    assert "CONNITO_CONSOLE_SERVE_URL" in (await Trial().offer("law-1")).problem
    said = (await Trial("http://127.0.0.1:9/v1").offer("law-1")).problem
    assert said.startswith("No server answers at http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"text": " ", "tokens": "32"},
        {"text": "x" * (MAX_TEXT + 1), "tokens": "32"},
        {"text": "x", "tokens": "9999"},
    ],
)
def test_a_form_that_the_page_cannot_send_is_refused(form: dict[str, str]) -> None:
    with pytest.raises(Invalid):
        Asked.read(form)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://a:b", "http://a:0", "http://a..b/v1"]
)
def test_an_address_that_is_none_ends_the_console(url: str) -> None:
    with pytest.raises(Fatal, match="CONNITO_CONSOLE_SERVE_URL"):
        ConsoleSettings.model_validate({"key_file": Path("key"), "console_serve_url": url}).serve()


@pytest.mark.parametrize("url", ["http://me:hush@127.0.0.1:8000/v1", "http://me:hush@127.0.0.1:port/v1"])
def test_an_address_with_a_users_name_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(Fatal, match="a user's name") as refused:
        ConsoleSettings.model_validate({"key_file": Path("key"), "console_serve_url": url}).serve()
    assert "hush" not in str(refused.value)


async def test_a_newline_behind_the_key_is_no_part_of_it() -> None:
    async def answer(head: str, _: dict[str, object], writer: asyncio.StreamWriter) -> None:
        assert "authorization: bearer a-key\r\n" in head
        writer.write(document("200 OK", {"data": [{"id": "tiny+law-1"}]}))

    async with server(answer) as address:
        assert (await Trial(address, "a-key\n").offer("law-1")).models == OFFER.models


@pytest.mark.parametrize("key", ["a\nsecret", "a-secret-€"])
async def test_a_key_that_cannot_be_sent_is_told_without_it(key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        trial = Trial(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", key)
        said = [(await trial.offer("law-1")).problem]
        said += [piece.problem for piece in (await trial.answers(OFFER, Asked("By law"))).values()]
    for problem in said:
        assert "CONNITO_CONSOLE_SERVE_URL and _KEY" in problem
        assert "secret" not in problem


async def test_a_name_that_is_none_is_told() -> None:
    assert "cannot be asked" in (await Trial("http://a..b/v1").offer("law-1")).problem


@pytest.mark.parametrize("begins", [False, True])
async def test_a_busy_server_is_told_as_away_and_one_question_is_for_all(
    begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes, or a head and then a drop at a time, for ever."""
    monkeypatch.setattr("services.console.trial.ASK_SECONDS", 1.0)
    questions, left = 0, asyncio.Semaphore(0)

    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        nonlocal questions
        questions += 1
        if begins:
            await drip(writer, b" ")

    async with server(answer, left) as address, asyncio.timeout(20):
        trial = Trial(address)
        started = time.monotonic()
        found = await asyncio.gather(*(trial.offer("law-1") for _ in range(3)))
        found += [await trial.offer("law-1") for _ in range(30)]
        assert time.monotonic() - started < 10
        await left.acquire()
    assert {offer.problem.startswith("No server answers") for offer in found} == {True}
    assert questions == 1


async def test_what_is_known_of_a_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.console.trial.FRESH_SECONDS", 0.05)
    replies = [document("503 Busy", {}), document("200 OK", {"data": [{"id": "tiny+law-1"}]})]

    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(replies.pop(0))

    async with server(answer) as address:
        trial = Trial(address)
        assert "refuses: 503 Busy" in (await trial.offer("law-1")).problem
        await asyncio.sleep(0.1)
        assert (await trial.offer("law-1")).models == OFFER.models


EVENT = b'data: {"choices": [{"text": "so"}]}\n\n'
UNEXPECTED = [
    b'data: {"error": "law-1 is yanked"}\n\n', b"<html>", b"data: [1]\n\n", b'data: {"choices": 1}\n\n',
    b'data: {"choices": ["a"]}\n\n', b"data: " + b"[" * 99_999 + b"\n\n", b"data: \xff\n\n", EVENT, b"",
]  # fmt: skip


@pytest.mark.parametrize("body", UNEXPECTED, ids=range(len(UNEXPECTED)))
async def test_no_answer_ends_without_its_end_or_a_problem(body: bytes) -> None:
    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

    async with server(answer) as address:
        found = await Trial(address).answers(OFFER, Asked("By law"))
    for side in SIDES:
        assert found[side].problem
    assert ("law-1 is yanked" in found["base"].problem) == (b"yanked" in body)


async def test_a_refusal_that_is_only_words_is_told() -> None:
    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(document("403 Forbidden", {"error": "no commercial use"}))

    async with server(answer) as address:
        assert "refuses: no commercial use" in (await Trial(address).offer("law-1")).problem


async def test_an_answer_that_drips_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.console.trial.ANSWER_SECONDS", 1.0)

    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await drip(writer, EVENT)

    left = asyncio.Semaphore(0)
    async with server(answer, left) as address, asyncio.timeout(20):
        trial = Trial(address)
        found = await trial.answers(OFFER, Asked("By law"))
        for side in SIDES:
            await left.acquire()
            assert found[side].text.startswith("so")
            assert "did not come to an end in 1 seconds" in found[side].problem
        await idle(trial)


def scores(*values: float | None) -> dict[str, object]:
    return {"choices": [{"logprobs": {"token_logprobs": list(values)}}]}


async def test_a_texts_loss_by_every_model_is_the_mean_of_what_the_server_says() -> None:
    asked: list[dict[str, object]] = []

    async def answer(_: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        asked.append(body)
        writer.write(document("200 OK", scores(None, -1.0, -4.0 if body["model"] == "tiny" else -2.0)))

    async with server(answer) as address:
        trial = Trial(address)
        assert await trial.losses(["tiny", "tiny+law-1"], "By law") == {"tiny": 2.5, "tiny+law-1": 1.5}
        await idle(trial)
    assert [(body["prompt"], body["echo"], body["max_tokens"]) for body in asked] == [("By law", True, 0)] * 2


@pytest.mark.parametrize("body", [scores(), scores(None), scores(None, None), {"choices": []}, {}, [1]])
async def test_scores_that_are_none_are_no_loss(body: object) -> None:
    async def answer(_: str, __: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(document("200 OK", body))

    async with server(answer) as address:
        trial = Trial(address)
        with pytest.raises(Invalid, match="is no `connito serve`"):
            await trial.losses(["tiny"], "By law")
        await idle(trial)


async def test_one_model_that_is_refused_spoils_no_other() -> None:
    async def answer(_: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        refused = document("403 Forbidden", {"error": {"message": "law-1 is yanked: asked by its owner"}})
        writer.write(refused if body["model"] == "tiny+law-1" else document("200 OK", scores(None, -1.5)))

    async with server(answer) as address:
        trial = Trial(address)
        found = await trial.losses(["tiny", "tiny+law-1", "tiny+code-1"], "By law")
        assert found == {
            "tiny": 1.5, "tiny+code-1": 1.5,
            "tiny+law-1": f"The server at {address} refuses: law-1 is yanked: asked by its owner",
        }  # fmt: skip
        await idle(trial)


@pytest.mark.parametrize("begun", [True, False])
async def test_what_is_measured_when_time_is_up_is_kept_and_the_rest_is_late(
    monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr("services.console.trial.ANSWER_SECONDS", 1.0)
    left = asyncio.Semaphore(0)

    async def answer(_: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        if body["model"] == "tiny":
            writer.write(document("200 OK", scores(None, -1.5)))
        elif begun:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")

    async with server(answer, left) as address, asyncio.timeout(PATIENCE):
        trial = Trial(address)
        found = await trial.losses(["tiny", "tiny+law-1", "tiny+code-1"], "By law")
        late = f"The server at {address} did not come to an end in 1 seconds."
        assert found == {"tiny": 1.5, "tiny+law-1": late, "tiny+code-1": late}
        await idle(trial)


async def test_a_reader_who_leaves_ends_a_measurement_and_one_too_many_is_told_so() -> None:
    left, asking = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def answer(_: str, __: dict[str, object], ___: asyncio.StreamWriter) -> None:
        asking.release()

    async with server(answer, left) as address, asyncio.timeout(20):
        trial = Trial(address)
        readers = [asyncio.create_task(trial.losses(["tiny", "tiny+law-1"], "By law")) for _ in range(AT_ONCE)]
        for _ in readers:
            await asking.acquire()
        with pytest.raises(Retry, match="Others are trying"):
            await trial.losses(["tiny"], "By law")
        for reader in readers:
            reader.cancel()
        for _ in readers:
            await left.acquire()
        await idle(trial)
