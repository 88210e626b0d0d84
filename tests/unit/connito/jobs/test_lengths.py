"""The lengths that a job leaves open follow from its text, its base and its budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from connito.jobs.check import Checked, check
from connito.jobs.spec import parse_job

from tests.unit.connito.jobs.conftest import write

FEW = {
    "scoring": {"target_sequences": 4, "general_sequences": 2},
    "merging": {
        "gate_target_sequences": 4, "gate_general_sequences": 2, "report_target_sequences": 4, "report_general_sequences": 2,
    },
}  # fmt: skip


def run(folder: Path, **fields: Any) -> Checked:
    job = {
        "domain": "code", "base": "base", "data": [{"path": "code.jsonl"}], "license": "PSF-2.0", "policies": FEW,
        "general": [{"domain": "prose", "path": "prose.jsonl"}], "data_statement": "Python.", **fields,
    }  # fmt: skip
    return check(parse_job(job), folder, folder / "no-platform")


def lengths(checked: Checked) -> tuple[int, int, str]:
    (found,) = [row for row in checked.findings if row.check == "length" and row.detail.startswith("sequences of")]
    policy = checked.spec.training
    assert found.numbers["sequence_length"] == policy.sequence_length
    return policy.sequence_length, policy.batch_sequences, found.detail


def test_most_documents_fit_whole(customer: Path) -> None:
    checked = run(customer)
    length, batch, detail = lengths(checked)
    assert checked.corpora is not None
    sizes = checked.corpora.train.offsets[1:] - checked.corpora.train.offsets[:-1]
    shorter = (sizes <= length - 127).mean()
    assert length % 128 == 0
    assert (sizes <= length + 1).mean() >= 0.95 > shorter or "no longer because" in detail
    assert 1 <= batch * length <= 4096 or batch == 1


def test_short_documents_take_short_sequences(customer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(customer, tmp_path / "copy")
    words = [f"w{n} x{n * 7} y{n * 13} z{n * 29} and more of {n * 31}" for n in range(1700)]
    write(folder / "code.jsonl", words)
    assert lengths(run(folder))[:2] == (128, 32)


def test_the_bases_positions_bound_them(customer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(customer, tmp_path / "copy")
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    length, _, detail = lengths(run(folder))
    assert length == 256
    assert "the base has 300 positions" in detail


def test_what_is_held_out_bounds_them(customer: Path) -> None:
    free = lengths(run(customer))[0]
    length, _, detail = lengths(run(customer, policies={}))
    assert length < free
    assert "of how much text is held out" in detail


def test_the_budget_bounds_them(customer: Path) -> None:
    from connito.moe.footprint import Workload
    from connito.workloads.rehearsal import rehearse

    checked = run(customer)
    free = lengths(checked)[0]
    targets = {layer: [0] for layer in checked.context.manifest.expert_bytes()}
    least = rehearse(checked.context.config(), targets, {}, Workload(1, 128, packed=True)).total
    length, _, detail = lengths(run(customer, budget={"memory": least + 1000}))
    assert (length, free > 128) == (128, True)
    assert "of budget.memory" in detail


@pytest.mark.parametrize("name", ["sequence_length", "sequenceLength"])
def test_what_the_job_says_stands(customer: Path, name: str) -> None:
    checked = run(customer, policies={**FEW, "training": {name: 64, "batch_sequences": 3}})
    assert lengths(checked)[:2] == (64, 3)
    assert run(customer, profile="tiny", policies=FEW).spec.training.sequence_length == 64
