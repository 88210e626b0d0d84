"""The guard, where a broker has no strangers; that it closes connections is tried on a real one (`test_strangers.py`)."""

from __future__ import annotations

import asyncio

import pytest
from connito.bus.guard import Guard
from connito.bus.permissions import GUARDS, PLATFORM, SYSTEM, accounts_of, guarding
from connito.runtime.tasks import end_tasks
from connito.wire.identity import Identity
from connito.wire.tls import PLAIN


async def test_a_broker_without_accounts_has_nobody_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    watching = asyncio.create_task(Guard("nats://127.0.0.1:1", Identity.generate(), "committer", PLAIN).watch())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not watching.done()
    assert "not limited" not in "".join(capsys.readouterr())
    await end_tasks([watching])


def test_a_guard_may_close_connections_and_say_nothing_else() -> None:
    rights = guarding("K")
    assert {subject.rpartition(".")[2] for subject in rights.publish} == {"IDZ", "CONNZ", "KICK"}
    assert all("CLAIMS" not in subject and ">" not in subject for subject in rights.publish)
    for role in GUARDS:
        assert accounts_of(role) == (PLATFORM, SYSTEM)
