"""What a run's spec that was written by hand names as a task."""

from __future__ import annotations

import json

import pytest
from connito.errors import Invalid
from connito.experts.tasks import CHOICE, Task

TASK = Task("mine", CHOICE, [{"given": "a", "choices": ["b", "c"], "answer": 0}], [{"metric": "acc"}], {})
STORED = json.loads(TASK.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"held-out text",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({**STORED, "further": 1}).encode(),
        json.dumps({**STORED, "kind": "loglikelihood_rolling"}).encode(),
        json.dumps({**STORED, "name": "../elsewhere"}).encode(),
        json.dumps({**STORED, "name": 7}).encode(),
    ],
)
def test_what_is_no_task_is_said_in_a_sentence(data: bytes) -> None:
    with pytest.raises(Invalid, match="names as a task is none"):
        Task.decode(data)


def test_a_stored_task_is_read() -> None:
    assert Task.decode(TASK.encode()) == TASK
