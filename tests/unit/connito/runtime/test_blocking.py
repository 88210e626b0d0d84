"""Waiting for a coroutine from code that is not asynchronous, also where a loop runs already."""

from __future__ import annotations

import pytest
from connito.runtime.tasks import blocking


async def answer(value: int) -> int:
    if value < 0:
        raise ValueError("negative")
    return value


def test_without_a_loop() -> None:
    assert blocking(answer(3)) == 3


async def test_inside_a_running_loop_as_every_cell_of_a_notebook_is() -> None:
    assert blocking(answer(4)) == 4
    with pytest.raises(ValueError, match="negative"):
        blocking(answer(-1))
