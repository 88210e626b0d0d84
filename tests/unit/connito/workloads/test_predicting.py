"""A rehearsal takes seconds, and all miners of a machine need the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from connito.moe.footprint import Footprint, Workload
from connito.workloads import predicting
from connito.workloads.predicting import predictor
from transformers import Qwen2MoeConfig


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def rehearse(*given: Any) -> Footprint:
        calls.append(given)
        return Footprint(1, 2, 3, 4, 5, 6, len(calls))

    monkeypatch.setattr(predicting, "rehearse", rehearse)
    return calls


def test_another_process_takes_what_was_rehearsed(tmp_path: Path, rehearsed: list[Any]) -> None:
    work, folder = Workload(2, 16), tmp_path / "footprints"
    first = predictor(Qwen2MoeConfig(), {1: [0]}, {1: [2]}, folder)(work)
    assert predictor(Qwen2MoeConfig(), {1: [0]}, {1: [2]}, folder)(work) == first
    assert len(rehearsed) == 1


@pytest.mark.parametrize(
    ("config", "targets", "helpers", "work"),
    [
        ({"num_experts": 4}, {1: [0]}, {1: [2]}, Workload(2, 16)),
        ({}, {1: [1]}, {1: [2]}, Workload(2, 16)),
        ({}, {1: [0]}, {}, Workload(2, 16)),
        ({}, {1: [0]}, {1: [2]}, Workload(2, 16, half=True)),
        ({"dtype": "bfloat16"}, {1: [0]}, {1: [2]}, Workload(2, 16)),
    ],
)
def test_other_settings_are_rehearsed(
    tmp_path: Path, rehearsed: list[Any], config: Any, targets: Any, helpers: Any, work: Workload
) -> None:
    predictor(Qwen2MoeConfig(), {1: [0]}, {1: [2]}, tmp_path)(Workload(2, 16))
    predictor(Qwen2MoeConfig(**config), targets, helpers, tmp_path)(work)
    assert len(rehearsed) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"torn"])
def test_a_damaged_file_is_rehearsed_again(tmp_path: Path, rehearsed: list[Any], damage: bytes) -> None:
    predictor(Qwen2MoeConfig(), {1: [0]}, {}, tmp_path)(Workload(2, 16))
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    predictor(Qwen2MoeConfig(), {1: [0]}, {}, tmp_path)(Workload(2, 16))
    assert len(rehearsed) == 2


def test_without_a_place_for_it_each_process_rehearses(tmp_path: Path, rehearsed: list[Any]) -> None:
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file"):
        predict = predictor(Qwen2MoeConfig(), {1: [0]}, {}, folder)
        predict(Workload(2, 16))
        predict(Workload(2, 16))
    assert len(rehearsed) == 2
