"""Small models out of large ones, as checkpoints that the ordinary library loads."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.description import build_manifest
from connito.base.loading import load_tokenizer
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.dense import to_dense
from connito.experts.export import ModelSource, export_model, verify_export
from connito.experts.extraction import extract_domain, ranking
from connito.experts.measure import loss
from connito.experts.prune import masked, progressive, prune
from connito.moe.statistics import collect
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import Sequences

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def tiny(distinct_tiny: Path) -> Path:
    """Experts that differ, so that it matters which are left out."""
    return distinct_tiny


KEEP = {2: [0, 3, 5], 3: [1, 2, 6]}


def test_the_smallest_subset_within_the_margin_is_found(full: Any, sequences: Sequences) -> None:
    probe, held = sequences("recipes", 4, 60), sequences("recipes", 4, 61)
    found = extract_domain(full, probe, held, margin=0.3)
    sizes = [size for size, _ in found.tried]
    assert sizes == list(range(1, len(sizes) + 1))
    full_loss = loss(full, probe)
    assert found.tried[-1][1] <= full_loss + 0.3 < min([inf, *(tried for _, tried in found.tried[:-1])])
    assert found.cost <= 0.3
    assert found.kept == 2 * sizes[-1]
    assert found.total == 16
    order = ranking(collect(full, probe[:, :-1]))
    assert found.keep == {index: sorted(experts[: sizes[-1]]) for index, experts in order.items()}


def test_all_experts_cost_nothing(full: Any, sequences: Sequences) -> None:
    probe, held = sequences("recipes", 2, 60), sequences("recipes", 2, 61)
    found = extract_domain(full, probe, held, margin=0.0, per_layer=8)
    assert found.cost == 0
    assert found.kept == found.total


def test_a_subset_that_hurts_must_be_accepted(full: Any, sequences: Sequences) -> None:
    probe, held = sequences("recipes", 3, 60), sequences("recipes", 3, 61)
    with pytest.raises(Invalid, match="--accept-loss") as caught:
        extract_domain(full, probe, held, margin=-1.0, per_layer=2)
    taken = extract_domain(full, probe, held, margin=-1.0, per_layer=2, accept_loss=True)
    assert f"{taken.cost:+.4f}" in str(caught.value)
    assert taken.kept == 4


@pytest.fixture
def exported(full: Any, tiny: Path, tmp_path: Path, logits: Any) -> Any:
    with masked(full, KEEP):
        seen = logits(full)
    out = tmp_path / "small"
    source = ModelSource(
        "prune", {"name": "tiny", "manifest": build_manifest(tiny, "tiny").digest},
        keep=KEEP, settings={"method": "naee"}, measured={"full": 1.0, "pruned": 1.1}, license="CC0-1.0",
    )  # fmt: skip
    export_model(prune(full, KEEP), out, load_tokenizer(tiny), source)
    return out, seen


def test_an_export_loads_in_stock_transformers_and_computes_the_same(exported: Any, logits: Any) -> None:
    out, seen = exported
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.num_experts == 3
    torch.testing.assert_close(logits(model), seen, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out)("leek").input_ids == list(b"leek")


def test_an_export_is_verified_offline_alone_and_against_its_base(exported: Any, tiny: Path) -> None:
    out, _ = exported
    record = verify_export(out)
    assert record["experts"] == {"2": [0, 3, 5], "3": [1, 2, 6]}
    assert verify_export(out, tiny) == record


def test_changed_missing_and_added_files_are_noticed(exported: Any) -> None:
    out, _ = exported
    (out / "extra.bin").write_bytes(b"x")
    with pytest.raises(VerificationFailed, match=r"extra\.bin"):
        verify_export(out)
    (out / "extra.bin").unlink()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationFailed, match="not the file that was exported"):
        verify_export(out)
    (out / "record.json").unlink()
    with pytest.raises(NotFound):
        verify_export(out)


def test_a_record_that_names_other_experts_than_are_inside_is_noticed(exported: Any, tiny: Path) -> None:
    out, _ = exported
    record = json.loads((out / "record.json").read_text())
    record["experts"]["2"] = [0, 3, 6]
    (out / "record.json").write_text(json.dumps(record))
    verify_export(out)
    with pytest.raises(VerificationFailed, match="is not the base's own"):
        verify_export(out, tiny)


def test_uneven_layers_and_full_folders_are_refused(full: Any, tiny: Path, tmp_path: Path) -> None:
    uneven = {2: [0], 3: [0, 1]}
    with pytest.raises(Invalid, match="equally many"):
        export_model(
            prune(full, uneven),
            tmp_path / "out",
            load_tokenizer(tiny),
            ModelSource("prune", {"name": "tiny", "manifest": ""}, uneven),
        )
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(Invalid, match="not empty"):
        export_model(
            full, tmp_path / "out", load_tokenizer(tiny), ModelSource("prune", {"name": "tiny", "manifest": ""})
        )


def test_one_expert_a_layer_becomes_a_dense_llama_of_the_same_function(
    full: Any, tiny: Path, tmp_path: Path, sequences: Sequences, logits: Any
) -> None:
    progressive(full, sequences("recipes", 2, 60))
    seen = logits(full)
    dense = to_dense(full)
    torch.testing.assert_close(logits(dense), seen, rtol=1e-4, atol=1e-4)
    out = tmp_path / "dense"
    source = ModelSource("prune", {"name": "tiny", "manifest": "m"}, settings={"dense": True})
    export_model(dense, out, load_tokenizer(tiny), source)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.model_type == "llama"
    torch.testing.assert_close(logits(model), seen, rtol=1e-4, atol=1e-4)


def test_a_model_with_experts_has_no_dense_form(full: Any) -> None:
    with pytest.raises(Invalid, match="prune it to one first"):
        to_dense(full)
