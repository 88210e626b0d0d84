"""How long the doctor looks at a platform that does not answer."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from connito.local import doctor_platform
from connito.local.doctor_platform import Check, look
from connito.wire.tls import PLAIN


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
