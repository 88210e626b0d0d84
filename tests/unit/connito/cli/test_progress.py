"""What a verb is at: a line each where nobody looks on, in place on a terminal, and nothing beside JSON."""

from __future__ import annotations

import sys

import pytest
from connito.cli.output import emit, told
from connito.runtime.progress import tell


@told
def verb(*, as_json: bool = False) -> None:
    for what in ("loading", "loading", "measuring"):
        tell(what)
    emit(as_json, {"done": True}, lambda: "done")


def test_elsewhere_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    verb()
    assert capsys.readouterr() == ("done\n", "loading\nmeasuring\n")


def test_beside_json_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    verb(as_json=True)
    assert capsys.readouterr() == ('{\n  "done": true\n}\n', "")


def test_on_a_terminal_the_line_is_gone_before_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    verb()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("\r\033[Kdone\n")
    assert "measuring" in said


def test_outside_a_verb_nobody_hears() -> None:
    tell("loading")
