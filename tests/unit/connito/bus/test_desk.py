"""What strangers may ask, and how often."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from connito.bus.desk import BURST, OF_BATCH, PER_SECOND, WAITING, Desk, checked
from connito.bus.guard import TOLERATED, TOO_MUCH, Loud
from connito.bus.offences import collect
from connito.bus.permissions import ANSWERED, ASKED
from connito.errors import Invalid
from connito.runtime.limits import RateLimit
from connito.wire.identity import Identity
from connito.wire.tls import PLAIN

KEY, OTHER = (Identity.generate(bytes([n]) * 32).public for n in (1, 2))
RUN = "r" * 80


@pytest.mark.parametrize(
    ("stream", "asked"),
    [
        ("RUNS", {"seq": 1}),
        ("RUNS", {"seq": 7, "batch": 256, "max_bytes": 1 << 18}),
        ("INGRESS", {"seq": 1, "batch": 9, "max_bytes": 5, "next_by_subj": f"connito.v1.{RUN}.ingress.*.*"}),
        ("COMMIT", {"seq": 1, "batch": 9, "max_bytes": 5, "next_by_subj": "connito.v1.*.commit.*.*"}),
        ("COMMIT", {"seq": 1, "batch": 9, "max_bytes": 5, "next_by_subj": f"connito.v1.{RUN}.commit.>"}),
        ("INGRESS", {"last_by_subj": "connito.v1.*.ingress.*.*"}),
        ("MERGE", {"last_by_subj": f"connito.v1.{RUN}.merge.1.scored.part.{'9' * 64}.7"}),
        ("DLQ", {"seq": 3, "batch": 1, "max_bytes": 1 << 18, "next_by_subj": "connito.dlq.v1.>"}),
    ],
)
def test_what_programs_ask_is_handed_on_as_it_is(stream: str, asked: dict[str, Any]) -> None:
    assert checked(stream, json.dumps(asked).encode()) == asked


def test_a_batch_is_never_larger_than_a_reader_of_ours_takes() -> None:
    found = checked("RUNS", b'{"seq":1,"batch":1000000,"max_bytes":100000000000,"no_hdr":true,"up_to_seq":9}')
    assert found == {"seq": 1, "batch": 256, "max_bytes": 1 << 18}
    assert checked("RUNS", b'{"seq":1,"batch":5}')["max_bytes"] == 1 << 18


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"1",
        b"null",
        b"\xff",
        b"{" * 400,
        b"[" * 400,
        b'{"seq":0}',
        b'{"seq":-1}',
        b'{"seq":true}',
        b'{"seq":1.5}',
        b'{"seq":1e400}',
        b'{"seq":"1"}',
        b'{"seq":99999999999999999999}',
        b'{"seq":1,"batch":0}',
        b'{"seq":1,"batch":[]}',
        b'{"seq":1,"batch":1,"max_bytes":-1}',
        b'{"multi_last":[">"]}',
        b'{"start_time":"2026-01-01T00:00:00Z","batch":1}',
        b'{"seq":1,"next_by_subj":">"}',
        b'{"seq":1,"next_by_subj":"*.*.*.run.>"}',
        b'{"seq":1,"next_by_subj":"connito.v1.*.*.>"}',
        b'{"seq":1,"next_by_subj":"connito.v1.>.run.>"}',
        b'{"seq":1,"next_by_subj":["connito.v1.*.run.>"]}',
        b'{"seq":1,"next_by_subj":""}',
        b'{"last_by_subj":"connito.v1.>"}',
        b'{"last_by_subj":"connito.v1.r.run.*.created"}',
        b'{"last_by_subj":7}',
    ],
)
def test_anything_else_is_no_question(data: bytes) -> None:
    with pytest.raises((Invalid, ValueError, LookupError, TypeError, RecursionError)):
        checked("RUNS", data)


class Client:
    """Notes what the broker is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str]] = []
        self.slow = False

    async def publish(self, subject: str, data: bytes, reply: str) -> None:
        if self.slow:
            await asyncio.sleep(0)
        self.asked.append((subject, json.loads(data), reply))


class Counter:
    """A desk without a broker, and a clock that stands."""

    def __init__(self) -> None:
        collect()
        self.client, self.out, self.now = Client(), list[str](), 0.0
        self.desk = Desk("nats://nowhere", Identity.generate(), "committer", PLAIN, self.out.append)
        self.desk._rate = RateLimit(PER_SECOND, BURST, lambda: self.now)
        self.desk._connection = SimpleNamespace(nc=self.client)  # type: ignore[assignment]

    async def ask(self, key: str = KEY, reply: str = "", **question: object) -> None:
        asked = json.dumps(question or {"seq": 1}).encode()
        message = SimpleNamespace(subject=f"{ASKED}.RUNS.{key}", reply=reply or f"{ANSWERED}.{key}.a.1", data=asked)
        await self.desk._on_question(message)


async def test_answers_go_to_whoever_asked_alone() -> None:
    counter = Counter()
    await counter.ask()
    assert counter.client.asked == [("$JS.API.DIRECT.GET.RUNS", {"seq": 1}, f"{ANSWERED}.{KEY}.a.1")]
    for reply in (f"{ANSWERED}.{OTHER}.a", "connito.v1.r.merge.1.scored", f"{ANSWERED}.{KEY}", "_R_.x", " "):
        await counter.ask(reply=reply)
    assert len(counter.client.asked) == 1
    assert [(one.kind, one.key) for one in collect()] == [("questions", KEY)]


async def test_a_key_has_its_rate_and_others_have_theirs() -> None:
    counter, burst = Counter(), int(BURST / OF_BATCH)
    for _ in range(burst + 1 + WAITING + TOO_MUCH + 5):
        await counter.ask(seq=1, batch=256)
    assert len(counter.client.asked) == burst
    assert counter.out == [KEY], "told once, of who does not stop"
    await counter.ask(OTHER)
    assert counter.client.asked[-1][2].startswith(f"{ANSWERED}.{OTHER}.")


async def test_what_is_said_without_end_is_told_of_too() -> None:
    counter = Counter()
    for number in range(TOO_MUCH):
        run = OTHER if number % 2 else "r"
        await counter.desk._on_said(6, SimpleNamespace(subject=f"connito.v1.{run}.run.{number}.cosigned.{KEY}"))
    assert counter.out == [KEY], "whatever it calls its runs"


async def test_who_is_ahead_of_its_rate_waits_for_its_turn() -> None:
    counter, burst = Counter(), int(BURST)
    for number in range(burst + 10):
        await counter.ask(reply=f"{ANSWERED}.{KEY}.{number}")
    assert len(counter.client.asked) == burst
    counter.now += 1.0
    async with asyncio.timeout(10):
        while len(counter.client.asked) < burst + 10:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
    assert [int(reply.rsplit(".")[-1]) for _, _, reply in counter.client.asked] == list(range(burst + 10))
    assert not counter.desk._waiting
    assert not collect()


def test_who_has_too_much_refused_is_told_of_however_slowly_it_is_counted() -> None:
    told: list[str] = []
    loud = Loud(told.append)
    for number in range(10 * TOO_MUCH):
        loud.note(KEY, 1_000_000 + number / TOLERATED)
    assert told == [], "no more than is borne, for long"
    for number in range(3 * TOO_MUCH):
        loud.note(OTHER if number % 3 else KEY, 2_000_000 + number / (3 * TOO_MUCH))
    assert told == [OTHER], "each is counted by itself"
    # A committer that is kept from its work by the flood counts so few a second.
    for number in range(3 * TOO_MUCH):
        loud.note(KEY, 3_000_000 + number / (2 * TOLERATED))
    assert told == [OTHER, KEY]


async def test_what_comes_while_others_are_handed_on_stands_behind_them() -> None:
    """Each of two that found nothing waiting had a turn of its own, and the second's ended in an error."""
    counter, burst = Counter(), int(BURST)
    counter.client.slow = True
    for number in range(burst + 10):
        await counter.ask(reply=f"{ANSWERED}.{KEY}.{number}")
    counter.now += 1.0
    turns = set(counter.desk._turns)
    async with asyncio.timeout(10):
        while len(counter.client.asked) < burst + 3:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0)
        for number in range(burst + 10, burst + 20):
            await counter.ask(reply=f"{ANSWERED}.{KEY}.{number}")
            turns |= counter.desk._turns
        while len(counter.client.asked) < burst + 20:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)
        await asyncio.gather(*turns)
    assert [int(reply.rsplit(".")[-1]) for _, _, reply in counter.client.asked] == list(range(burst + 20))
    assert not counter.desk._waiting
