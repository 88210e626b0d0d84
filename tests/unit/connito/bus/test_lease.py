"""A standby that asks for the lease while the broker comes and goes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.bus.lease import Lease, LeaseKeeper
from connito.runtime.host import HOST, Host
from connito.wire.identity import Identity
from nats.errors import ConnectionClosedError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError, ServiceUnavailableError

FAULTS = [
    NatsTimeoutError(), NoRespondersError(), ConnectionClosedError(), ServiceUnavailableError(code=503),
    TimeoutError(), ConnectionResetError(), OSError("no route"),
]  # fmt: skip


class Bucket:
    """A bucket that answers each question with what is next; an exception is raised."""

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers

    def _next(self, verb: str) -> Any:
        answer = self.answers[verb].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def create(self, name: str, value: bytes) -> int:
        return int(self._next("create"))

    async def get(self, name: str) -> Any:
        return self._next("get")

    async def update(self, name: str, value: bytes, last: int) -> int:
        self.updated = last
        return int(self._next("update"))


def standby(bucket: Bucket | Exception, monkeypatch: pytest.MonkeyPatch) -> Lease:
    async def key_value(name: str) -> Bucket:
        if isinstance(bucket, Exception):
            raise bucket
        return bucket

    async def at_once(seconds: float) -> None: ...

    monkeypatch.setattr("connito.bus.lease.asyncio.sleep", at_once)
    bus = SimpleNamespace(identity=Identity.generate(), host=HOST, js=SimpleNamespace(key_value=key_value))
    return Lease(cast(Bus, bus), "coordinator")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
async def test_it_stands_by_whenever_the_broker_goes_away(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it asks, while it asks, and between being told that somebody has it and asking who."""
    taken = KeyWrongLastSequenceError(description="wrong last sequence: 7")
    assert not await standby(fault, monkeypatch)._try_acquire()
    assert not await standby(Bucket(create=[fault]), monkeypatch)._try_acquire()
    assert not await standby(Bucket(create=[taken], get=[fault]), monkeypatch)._try_acquire()


async def test_it_knows_its_own_entry_and_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = KeyWrongLastSequenceError(description="wrong last sequence: 7")
    lease = standby(Bucket(create=[taken] * 3, get=[KeyNotFoundError()]), monkeypatch)
    assert not await lease._try_acquire()
    lease = standby(bucket := Bucket(create=[taken] * 3, get=[], update=[12, taken]), monkeypatch)
    bucket.answers["get"] = [
        SimpleNamespace(value=b"another", revision=7),
        SimpleNamespace(value=lease._token, revision=9),
        SimpleNamespace(value=lease._token, revision=13),
    ]
    assert not await lease._try_acquire()
    # Renewed: it may be an old one that is about to expire.
    assert await lease._try_acquire()
    assert (bucket.updated, lease._last) == (9, 12)
    # Expired, and somebody else's, between the question and the answer.
    assert not await lease._try_acquire()


async def test_it_takes_over_what_nobody_renews(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the broker thinks of its age: its clock may have been set back. What is renewed stays another's."""
    taken, now = KeyWrongLastSequenceError(description="wrong last sequence: 7"), [100.0]
    entries = [SimpleNamespace(value=b"another", revision=revision) for revision in (7, 7, 8, 8, 8)]
    lease = standby(bucket := Bucket(create=[taken] * 5, get=entries, update=[9]), monkeypatch)
    lease._bus.host = Host(monotonic=lambda: now[0])
    for passed, acquired in (
        (0.0, False),
        (lease.ttl, False),
        (lease.ttl, False),
        (lease.ttl, False),
        (lease.ttl, True),
    ):
        now[0] += passed
        assert await lease._try_acquire() == acquired
    assert (bucket.updated, lease._last) == (8, 9)


async def test_a_keeper_takes_over_its_own_entry_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that elects loses it the lease, and the entry stands there for as long as nobody counts its age."""
    taken, gave_back = KeyWrongLastSequenceError(description="wrong last sequence: 7"), asyncio.CancelledError
    bucket = Bucket(create=[3, taken], get=[], update=[8])
    keeper, terms = LeaseKeeper(standby(bucket, monkeypatch)._bus, "coordinator", 0.0), list[int]()
    bucket.answers["get"] = [SimpleNamespace(value=keeper._token, revision=7)]

    async def begin() -> None:
        assert keeper._lease is not None
        terms.append(keeper._lease.revision)
        if len(terms) == 2:
            raise gave_back
        keeper._lease._lose("the broker elects")

    with pytest.raises(gave_back):
        await keeper.keep(begin)
    assert terms == [3, 8]
