"""A published figure that is run again: the same, or where it differs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import reproduce
from bench.evidence import COPIES
from bench.harness import Options, Result, machine


def document(figures: dict[str, Any]) -> dict[str, Any]:
    return {"name": "cost", "figures": figures, "machine": machine(), "settings": {"quick": False, "seeds": 2}}


def test_numbers_are_compared_within_what_is_asked_for() -> None:
    there = {"a": [1.0, 2.0], "b": {"c": 100, "d": "met"}, "e": None}
    assert list(reproduce.differences(there, json.loads(json.dumps(there)), 0.0)) == []
    near = {"a": [1.0, 2.01], "b": {"c": 101, "d": "met"}, "e": None}
    assert list(reproduce.differences(there, near, 0.02)) == []
    assert list(reproduce.differences(there, near, 1e-6)) == [
        "a[1]: published 2.0, here 2.01",
        "b.c: published 100, here 101",
    ]
    odd = {"a": [1.0], "b": {"c": 100, "d": "missed"}, "e": False, "f": 1}
    assert [line.split(":")[0] for line in reproduce.differences(there, odd, 0.5)] == ["a", "b.d", "e", "f"]


def test_the_verdict_is_in_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.report(document({"a": 1.0}), document({"a": 1.0}), 0.0) == 0
    assert reproduce.report(document({"a": 1.0}), document({"a": 1.5}), 0.1) == 6
    assert capsys.readouterr().out == "cost: same\na: published 1.0, here 1.5\ncost: 1 numbers differ\n"


def test_a_figure_is_run_with_its_own_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Options] = []

    def run(options: Options) -> Result:
        seen.append(options)
        return Result({}, [], published["figures"])

    published = json.loads((COPIES / "decentralised.json").read_text())
    monkeypatch.setattr("bench.decentralised.run", run)
    monkeypatch.setattr(sys, "argv", ["reproduce", "decentralised", "--out", str(tmp_path / "new")])
    assert reproduce.main() == 0
    assert seen == [Options(False, published["settings"]["seeds"], tmp_path / "new", "")]
    assert capsys.readouterr().out == "decentralised: same\n"


def test_an_unknown_figure_is_not_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce", "nonsense"])
    assert reproduce.main() == 4
    assert "no figure is called nonsense; there are claim_lies" in capsys.readouterr().err
