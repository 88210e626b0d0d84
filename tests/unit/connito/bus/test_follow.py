"""Following a stream: by hints while it rests, by the batch while it does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from connito.bus import follow as following
from connito.bus.follow import CaughtUp, follow
from connito.runtime.tasks import end_tasks
from connito.wire.fact import Record

from tests.sim.clockwork import VirtualLoop

Callback = Callable[[Any], Awaitable[None]]


class Client:
    """A broker with one stream, and the connection to it."""

    is_closed = stranger = False

    def __init__(self) -> None:
        self.stored: list[bytes] = []
        self.listening: dict[str, Callback] = {}
        self.hints = self.looks = self.answers = self.inboxes = 0
        self.nc, self.on_reconnect = self, list[Callable[[], None]]()

    def stored_in(self, stream: str) -> str:
        return f"$JS.API.DIRECT.GET.{stream}"

    def require(self) -> None:
        """Stand."""

    @contextmanager
    def failure_of(self, _subject: str) -> Iterator[asyncio.Future[Exception]]:
        yield asyncio.get_running_loop().create_future()

    def new_inbox(self) -> str:
        self.inboxes += 1
        return f"inbox{self.inboxes}"

    async def subscribe(self, subject: str, cb: Callback) -> Any:
        self.listening[subject] = cb

        async def unsubscribe() -> None:
            del self.listening[subject]

        return SimpleNamespace(unsubscribe=unsubscribe)

    async def publish(self, _subject: str, data: bytes, reply: str) -> None:
        self.looks += 1
        body = json.loads(data)
        asked = range(body["seq"], len(self.stored) + 1)[: body.get("batch", 1)]
        for number in asked:
            headers = {
                "Nats-Sequence": str(number),
                "Nats-Subject": "connito.v1.r.run.0.created",
                "Nats-Time-Stamp": "2026-11-26T13:16:43.779441275Z",
            }
            self.answers += 1
            await self.listening[reply](SimpleNamespace(headers=headers, data=self.stored[number - 1]))
        if "batch" in body or not asked:
            self.answers += 1
            await self.listening[reply](SimpleNamespace(headers={"Status": "404"}, data=b""))

    async def store(self, data: bytes) -> None:
        self.stored.append(data)
        await self.hint(len(self.stored))

    async def hint(self, sequence: int) -> None:
        for subject, hear in list(self.listening.items()):
            if subject.startswith("live."):
                self.hints += 1
                await hear(SimpleNamespace(headers={"Nats-Sequence": str(sequence)}))


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=loop.time, time=loop.time))
    yield loop
    loop.close()


def test_a_flood_is_read_without_hints_and_a_stream_at_rest_by_them(loop: VirtualLoop) -> None:
    async def follow_it() -> None:
        client = Client()
        items = follow(client, ["RUNS"], "", {})  # type: ignore[arg-type]
        assert isinstance(await anext(items), CaughtUp)
        said = [str(number).encode() for number in range(1500)]

        async def speak() -> None:
            for data in said:
                await client.store(data)
                await asyncio.sleep(0.002)

        speaking = asyncio.create_task(speak())
        heard = [await anext(items) for _ in said]
        await speaking
        assert [record.data for record in heard if isinstance(record, Record)] == said
        assert client.hints < len(said) / 5, "of each message nobody needs to hear"
        assert client.looks < 3 * following.LOOKS_PER_SECOND + 2 * following.FREE_LOOKS
        # At rest nobody looks more than now and then, and what comes is read at once.
        await asyncio.sleep(10)
        looks, hints, now = client.looks, client.hints, loop.time()
        await client.store(b"later")
        found = await anext(items)
        assert isinstance(found, Record)
        assert (found.data, client.hints, loop.time()) == (b"later", hints + 1, now)
        await asyncio.sleep(10)
        assert client.looks < looks + 10
        await items.aclose()

    loop.run_until_complete(follow_it())


def test_a_stream_of_a_few_messages_a_second_is_read_by_hints(loop: VirtualLoop) -> None:
    async def follow_it() -> None:
        client = Client()
        items = follow(client, ["RUNS"], "", {})  # type: ignore[arg-type]
        assert isinstance(await anext(items), CaughtUp)
        # After a flood, too.
        for number in range(900):
            await client.store(b"")
            await anext(items)
            await asyncio.sleep(0.002 if number < 700 else 0.2)
        looks = client.looks
        for _ in range(100):
            await client.store(b"")
            await anext(items)
            await asyncio.sleep(0.2)
        assert client.looks - looks < 150, "no more than one for each message, and now and then one"
        await items.aclose()

    loop.run_until_complete(follow_it())


def test_one_message_that_is_hinted_at_is_one_answer_and_a_lost_hint_loses_none(loop: VirtualLoop) -> None:
    async def follow_it() -> None:
        client = Client()
        items = follow(client, ["RUNS"], "", {})  # type: ignore[arg-type]
        assert isinstance(await anext(items), CaughtUp)
        for number in range(10):
            await asyncio.sleep(0.2)
            answers, now = client.answers, loop.time()
            client.stored.append(b"without a hint") if number % 2 else None
            await client.store(b"hinted at")
            came = [await anext(items) for _ in range(1 + number % 2)]
            assert [one.sequence for one in came if isinstance(one, Record)][-1] == len(client.stored)
            assert loop.time() == now
            assert client.answers - answers == (3 if number % 2 else 1), "one, or a batch behind it"
        await items.aclose()

    loop.run_until_complete(follow_it())


def test_hints_at_nothing_do_not_make_a_reader_busy(loop: VirtualLoop) -> None:
    async def follow_it() -> None:
        client = Client()
        items = follow(client, ["RUNS"], "", {})  # type: ignore[arg-type]
        assert isinstance(await anext(items), CaughtUp)
        for _ in range(4000):
            await client.hint(0)
            await asyncio.sleep(0.0005)
        assert client.looks < 2 * following.LOOKS_PER_SECOND + 2 * following.FREE_LOOKS
        await items.aclose()

    loop.run_until_complete(follow_it())


class Several(Client):
    """The same with a log for each stream."""

    def __init__(self, *streams: str) -> None:
        super().__init__()
        self.logs = {stream: list[bytes]() for stream in streams}

    async def publish(self, subject: str, data: bytes, reply: str) -> None:
        self.stored = self.logs[subject.rpartition(".")[2]]
        await super().publish(subject, data, reply)


@pytest.mark.parametrize("stranger", [False, True])
def test_a_lost_hint_costs_a_moment_where_something_else_was_heard(loop: VirtualLoop, stranger: bool) -> None:
    """What a service waits for comes in another stream than what it heard before, and often at once behind it."""
    client = Several("TRAIN", "COMMIT")
    client.stranger = stranger
    came: dict[bytes, float] = {}

    async def read() -> None:
        async with aclosing(follow(client, ["TRAIN", "COMMIT"], "", {})) as items:  # type: ignore[arg-type]
            async for item in items:
                if isinstance(item, Record):
                    came[item.data] = loop.time()

    async def scenario() -> None:
        reading = asyncio.create_task(read())
        await asyncio.sleep(7.0)
        client.logs["TRAIN"].append(b"heard")
        for subject, hear in list(client.listening.items()):
            if subject.startswith("live.TRAIN."):
                await hear(SimpleNamespace(headers={"Nats-Sequence": "1"}))
        await asyncio.sleep(0.2)
        for stream in client.logs:
            client.logs[stream].append(stream.encode())
        lost = loop.time()
        await asyncio.sleep(10.0)
        assert set(came) == {b"heard", b"TRAIN", b"COMMIT"}
        late = [came[stream.encode()] - lost for stream in client.logs]
        assert (max(late) < 1.0) != stranger
        looks = client.looks
        await asyncio.sleep(100.0)
        assert client.looks - looks <= 2 * 21, "at rest a stream is looked at every five seconds"
        await end_tasks([reading])

    loop.run_until_complete(scenario())
