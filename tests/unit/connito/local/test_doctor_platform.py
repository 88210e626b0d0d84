"""How long the doctor looks at a platform that does not answer, and how much it reads of one that does."""

from __future__ import annotations

import asyncio
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from connito.local import doctor_platform
from connito.local.doctor_platform import Check, look
from connito.wire.tls import PLAIN

from tests.support.run import Run, even


async def test_what_does_not_answer_is_waited_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = asyncio.Barrier(3)

    def waits(name: str) -> Any:
        async def check(_: object) -> list[Check]:
            async with asyncio.timeout(5):
                await together.wait()
            return [Check(name, True, "")]

        return check

    for name in ("_broker", "_expiries", "_store"):
        monkeypatch.setattr(doctor_platform, name, waits(name))
    session: Any = None
    assert [check.name for check in await look(session, with_store=True)] == ["_broker", "_expiries", "_store"]


async def test_a_server_that_accepts_and_says_nothing_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_platform, "_TLS_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("CONNITO_S3_ENDPOINT", f"https://{here}")
        session: Any = SimpleNamespace(platform=None, nats_url=f"tls://{here}", tls=PLAIN)
        found = await doctor_platform._expiries(session)
    assert [(check.name, check.ok) for check in found] == [(f"certificate of {here}", False)] * 2
    assert all("nobody answers there within" in check.found and check.remedy for check in found)


async def test_who_has_trained_is_read_of_runs_past_their_deadline_alone_and_a_few_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = int(time.time() * 1000)

    def run(name: str, deadline: int) -> Run:
        return Run(name=name, now=now - 7_200_000).created().selected().opened("train", deadline_unix_ms=deadline)

    going = [run(f"goes-{number}", now + 3_600_000) for number in range(12)]
    stands = run("stands", now - 3_600_000).closed("train").opened("merge", deadline_unix_ms=now - 3_500_000)
    runs = [*going, run("waits", now - 60_000), stands]
    heard: list[str] = []

    async def read(*_: object) -> Any:
        return SimpleNamespace(runs={each.name: each.facts for each in runs})

    async def hear(bus: object, log: object, name: str) -> None:
        heard.append(name)

    monkeypatch.setattr("connito.platform.log.read_runs", read)
    monkeypatch.setattr("connito.platform.log.hear_trained", hear)
    session: Any = SimpleNamespace(roster=SimpleNamespace(stake=even))
    check = await doctor_platform._resume(session, session)
    assert heard == ["waits", "stands"], "who asks reads no log of miners that decides nothing"
    assert not check.ok
    assert check.found.startswith("stands: "), "what stands still comes first"
    assert check.found.count(": cycle 1 of ") == 10
    assert check.found.endswith("; and 4 more")
