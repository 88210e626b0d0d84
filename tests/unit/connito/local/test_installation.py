"""Opening a data folder while its servers come and go."""

from __future__ import annotations

import pytest
from connito.errors import Invalid, Retry
from connito.local import installation


async def test_a_server_that_ended_since_it_was_ready_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | str] = [Retry("the broker is away"), Retry("the broker is away"), "here"]
    asked = iter(answers)

    async def connect() -> str:
        answer = next(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(installation, "ASK_EVERY", 0.0)
    assert await installation._asking(connect) == "here"
    asked = iter([Invalid("the key is refused")])
    with pytest.raises(Invalid):
        await installation._asking(connect)
    monkeypatch.setattr(installation, "PATIENCE_SECONDS", -1.0)
    asked = iter([Retry("the broker is away for good")])
    with pytest.raises(Retry, match="for good"):
        await installation._asking(connect)
