"""A standby that asks for the lease while the broker comes and goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.bus.lease import Lease
from connito.runtime.host import HOST
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
    lease = standby(bucket := Bucket(create=[taken] * 2, get=[]), monkeypatch)
    bucket.answers["get"] = [
        SimpleNamespace(value=b"another", revision=7),
        SimpleNamespace(value=lease._token, revision=9),
    ]
    assert not await lease._try_acquire()
    assert await lease._try_acquire()
    assert lease._last == 9
