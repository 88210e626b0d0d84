"""`tiny` the folder of a small random MoE base with the byte tokenizer; `call` a verb in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.models import one_thread, random_base

__all__ = ["one_thread", "random_base"]


class Done(NamedTuple):
    """How a verb ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    from connito.cli import main

    def run(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["connito", *map(str, arguments)])
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return Done(int(code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def tiny(random_base: Path) -> Path:
    return random_base
