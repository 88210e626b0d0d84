"""A published figure that is run again: the same, or where it differs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import reproduce
from bench.evidence import COPIES, published
from bench.harness import Options, Result, machine
from bench.reproduce import Near


def made(figures: dict[str, Any]) -> dict[str, Any]:
    return {"name": "cost", "figures": figures, "machine": machine(), "settings": {"quick": False, "seeds": 2}}


def test_numbers_are_compared_within_what_is_asked_for() -> None:
    there = {"a": [1.0, 2.0], "b": {"c": 100, "d": "met"}, "e": None}
    assert list(reproduce.differences(there, json.loads(json.dumps(there)), Near(0.0))) == []
    near = {"a": [1.0, 2.01], "b": {"c": 101, "d": "met"}, "e": None}
    assert list(reproduce.differences(there, near, Near(0.02))) == []
    assert list(reproduce.differences(there, near, Near())) == [
        "a[1]: published 2.0, here 2.01",
        "b.c: published 100, here 101",
    ]
    odd = {"a": [1.0], "b": {"c": 100, "d": "missed"}, "e": False, "f": 1}
    assert [line.split(":")[0] for line in reproduce.differences(there, odd, Near(0.5))] == ["a", "b.d", "e", "f"]


def test_times_are_the_same_up_to_a_factor() -> None:
    there, here = {"rebuild_seconds": 1.0, "hits": 1.0}, {"rebuild_seconds": 2.5, "hits": 2.5}
    clock = Near(times=3.0, timed=("seconds",))
    assert list(reproduce.differences(there, here, clock)) == ["hits: published 1.0, here 2.5"]
    assert len(list(reproduce.differences(there, here, Near(times=2.0, timed=("seconds",))))) == 2
    assert list(reproduce.differences({"first": "2 s"}, {"first": "3 s"}, Near(timed=("first",)))) == []


def test_the_verdict_is_in_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.report(made({"a": 1.0}), made({"a": 1.0}), Near(0.0)) == 0
    assert reproduce.report(made({"a": 1.0}), made({"a": 1.5}), Near(0.1)) == 6
    assert capsys.readouterr().out == "cost: same\na: published 1.0, here 1.5\ncost: 1 numbers differ\n"


def test_a_figure_is_run_with_its_own_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Options] = []

    def run(options: Options) -> Result:
        seen.append(options)
        return Result({}, [], document["figures"])

    document = json.loads((COPIES / "decentralised.json").read_text())
    monkeypatch.setattr("bench.decentralised.run", run)
    monkeypatch.setattr(sys, "argv", ["reproduce", "decentralised", "--out", str(tmp_path / "new")])
    assert reproduce.main() == 0
    assert seen == [
        Options(False, document["settings"]["seeds"], tmp_path / "new", document["settings"].get("only", ""))
    ]
    assert capsys.readouterr().out == "decentralised: same\n"


@pytest.mark.parametrize("name", sorted(published()))
def test_every_published_figure_but_six_can_be_run_again(name: str) -> None:
    module = importlib.import_module(f"bench.{name}")
    own = ("chaos", "control_plane", "gpu_check", "simulate", "soak", "work_rates")
    assert hasattr(module, "run") == (name not in own)


def test_an_unknown_figure_is_not_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce", "nonsense"])
    assert reproduce.main() == 4
    assert "no figure is called nonsense; there are chaos, claim_lies" in capsys.readouterr().err
