"""`job check` and `job quote` say each problem once: where it is listed, and not in the error again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from connito.cli.job import app
from connito.errors import Invalid
from connito.jobs.findings import Finding, listed
from typer.testing import CliRunner

FOUND = [
    Finding("licence", "error", "'Apache 2.0' is not a licence identifier", "did you mean Apache-2.0?"),
    Finding("size", "error", "the probe has no text", "add text"),
    Finding("data", "ok", "5 rows"),
]


class Told(SimpleNamespace):
    """What was checked or priced, as an interpreter shows it."""

    def __repr__(self) -> str:
        return listed(self.findings)


def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[str, str]:
    checked = Told(findings=FOUND, to_json=lambda: {"findings": [found.to_json() for found in FOUND]})
    monkeypatch.setattr("connito.jobs.check.check_file", lambda *_, **__: checked)
    monkeypatch.setattr("connito.jobs.quote.quote", lambda given, **_: given)
    done = CliRunner().invoke(app, [*arguments[:1], str(tmp_path / "job.yaml"), *arguments[1:]])
    assert isinstance(done.exception, Invalid)
    return done.output, str(done.exception)


@pytest.mark.parametrize("verb", ["check", "quote"])
def test_each_problem_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str) -> None:
    shown, refused = said(monkeypatch, tmp_path, verb)
    for problem in FOUND[:2]:
        assert (shown + refused).count(problem.detail) == 1
        assert (shown + refused).count(problem.remedy) == 1
    assert refused == f"{tmp_path / 'job.yaml'} has 2 problems: licence, size"


@pytest.mark.parametrize("verb", ["check", "quote"])
def test_who_reads_json_is_told_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str) -> None:
    shown, refused = said(monkeypatch, tmp_path, verb, "--json")
    assert [found["check"] for found in json.loads(shown)["findings"]] == ["licence", "size", "data"]
    assert all(problem.detail in refused for problem in FOUND[:2])
