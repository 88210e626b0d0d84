"""The check for GPUs runs on the CPU with small shapes, by the same code, so that it works on the day there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check


def test_every_small_part_runs_and_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"training OLMoE-1B-7B": gpu_check.training, "transformers OLMoE-1B-7B": gpu_check.training}

    def here(part: str, device: str, seconds: int) -> dict[str, Any]:
        return {"rows": list(gpu_check.scoring(device) if part == "scoring" else parts[part](part, device))}

    monkeypatch.setattr(gpu_check, "run_part", here)
    monkeypatch.setattr(gpu_check, "PARTS", dict.fromkeys((*parts, "scoring"), 60))
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--device", "cpu", "--out", str(tmp_path)])
    assert gpu_check.main() == 0
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    small, plain = (written[part]["rows"][0] for part in parts)
    assert small["predicted_bytes"] > 0
    assert plain["loop"] == "transformers"
    for row in (small, plain):
        assert "failed" not in row, row
        assert row["tokens_per_second"] > 0
    assert {row["service"] for row in written["scoring"]["rows"]} == {"validator", "selector"}


@pytest.mark.slow
def test_parity_of_eight_families() -> None:
    rows = list(gpu_check.parity("cpu"))
    assert len(rows) == 8
    assert all(row["logits"] < 1e-5 and row["gradients"] < 1e-4 for row in rows), rows


@pytest.mark.parametrize(
    ("end", "seconds", "why"), [("time.sleep(60)", 3, "took more than 3 s"), ("sys.exit('full')", 60, "full")]
)
def test_a_part_that_fails_or_hangs_says_so_and_keeps_what_it_found(end: str, seconds: float, why: str) -> None:
    program = f"import sys, time; print('{{}}', flush=True); {end}"
    found = gpu_check.gathered([sys.executable, "-c", program], seconds)
    assert (found["rows"], found["failed"]) == ([{}], why)


def test_a_device_that_is_not_there_is_a_failure() -> None:
    assert "failed" in gpu_check.run_part("scoring", "no-such-device", 60)
