"""What the gate measures of a state: each domain's own losses, from as few forwards as there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.base.loading import load_full
from connito.moe.evaluate import Evaluator
from connito.moe.state import save_state
from connito.workloads.gating import GateEvaluator

from tests.support.models import random_base

__all__ = ["random_base"]

TARGETS = {1: [0, 2]}


def test_domains_are_measured_together_and_told_apart(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    tables = {
        name: rng.integers(1, 200, (count, 17), np.int32) for name, count in (("law", 3), ("code", 0), ("news", 2))
    }
    judge = Evaluator(load_full(random_base), TARGETS)
    alone = {name: judge.losses(judge.base, table)[0] for name, table in tables.items()}
    save_state(judge.base, tmp_path / "state")
    forwards, batch = list[int](), judge._batch

    def counted(part: Any) -> Any:
        forwards.append(len(part))
        return batch(part)

    monkeypatch.setattr(judge, "_batch", counted)
    gate = GateEvaluator(judge, {"gate": tables, "report": {}})
    found: Any = gate.measure("gate", "digest", tmp_path / "state")
    assert forwards == [5]
    assert list(found.sums) == ["law", "news"]
    for name, (sums, counts) in found.rows.items():
        np.testing.assert_allclose(sums, alone[name], rtol=1e-5)
        assert counts == (16,) * len(tables[name])
        assert found.sums[name] == (pytest.approx(alone[name].sum(), rel=1e-5), 16 * len(tables[name]))
