"""Loading experts into a real, if tiny, Hugging Face MoE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import connito
import pytest
import torch
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.library.artifact import ExpertHeader, write_expert
from connito.moe.rows import base_digests, fingerprint, read_rows, write_rows
from connito.moe.state import save_state
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

LAYERS = {0: [1, 3], 1: [2]}


def build(seed: int = 0) -> Qwen2MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, shared_expert_intermediate_size=8,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


@pytest.fixture
def model() -> Any:
    return build()


@pytest.fixture
def expert(model: Any, tmp_path: Path) -> Path:
    """A directory as an export leaves it, for `model` as it is."""
    base = base_digests(model, LAYERS)
    state = {name: rows + 0.25 for name, rows in read_rows(model, LAYERS).items()}
    save_state(state, tmp_path / "state.safetensors")
    header = ExpertHeader("medical", "tiny", "b" * 64, LAYERS, "run-1", 1, base.rest, base.rows)
    digest = write_expert(tmp_path / "state.safetensors", tmp_path / "expert.safetensors", header)
    (tmp_path / "record.json").write_text(json.dumps({"expert": {"digest": digest}}))
    return tmp_path


def test_only_the_experts_rows_change_and_removing_restores_the_base(model: Any, expert: Path) -> None:
    before = fingerprint(model)
    ids = torch.arange(12).view(1, 12)
    plain = model(ids).logits

    loaded = connito.load_expert(model, expert)

    assert len(loaded.changed) == sum(map(len, LAYERS.values())) * 2
    assert all("experts." in name and name.endswith("]") for name in loaded.changed)
    assert not torch.equal(model(ids).logits, plain)
    loaded.remove()
    assert fingerprint(model) == before
    assert torch.equal(model(ids).logits, plain)


def test_another_base_is_refused_before_anything_is_written(expert: Path) -> None:
    other = build(seed=1)
    before = fingerprint(other)

    with pytest.raises(Invalid, match="not tiny, the base of the expert"):
        connito.load_expert(other, expert)

    assert fingerprint(other) == before


def test_a_model_that_holds_another_expert_there_is_refused(model: Any, expert: Path) -> None:
    rows = read_rows(model, LAYERS)
    write_rows(model, LAYERS, {name: value + 1 for name, value in rows.items()})

    with pytest.raises(Invalid, match="remove it first"):
        connito.load_expert(model, expert)


def test_another_dtype_is_refused(model: Any, expert: Path) -> None:
    header_path = expert / "expert.safetensors"
    connito.load_expert(model, header_path).remove()

    with pytest.raises(Invalid, match="in its own dtype"):
        connito.load_expert(model.to(torch.bfloat16), expert)


def test_a_model_without_these_layers_is_refused(expert: Path) -> None:
    config = build().config
    config.num_hidden_layers = 1

    with pytest.raises(Invalid, match="layer 1"):
        connito.load_expert(Qwen2MoeForCausalLM(config), expert)


def test_a_file_that_is_not_what_its_record_says_is_refused(model: Any, expert: Path) -> None:
    path = expert / "expert.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = fingerprint(model)

    with pytest.raises(VerificationFailed, match="its record says"):
        connito.load_expert(model, expert)

    assert fingerprint(model) == before


def test_a_missing_expert_is_not_found(model: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="connito library export"):
        connito.load_expert(model, tmp_path / "nowhere")


def test_removing_notices_what_someone_else_changed(model: Any, expert: Path) -> None:
    loaded = connito.load_expert(model, expert)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1

    with pytest.raises(VerificationFailed, match=r"lm_head\.weight"):
        loaded.remove()


def test_a_stray_change_puts_the_base_rows_back(model: Any, expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever writes more than the expert's rows is caught, and what was written is undone."""
    import connito.moe.rows as insert

    plain, base = insert.write_rows, read_rows(model, LAYERS)

    def careless(target: Any, selection: dict[int, list[int]], state: dict[str, torch.Tensor]) -> None:
        plain(target, selection, state)
        with torch.no_grad():
            target.model.layers[0].mlp.experts.down_proj[0] += 1

    monkeypatch.setattr(insert, "write_rows", careless)

    with pytest.raises(VerificationFailed, match=r"down_proj\[0\]"):
        connito.load_expert(model, expert)

    assert all(torch.equal(rows, base[name]) for name, rows in read_rows(model, LAYERS).items())


@pytest.mark.parametrize("layers", [{99: [0]}, {0: [0, 999]}])
def test_rows_of_another_base_are_refused_in_a_sentence(model: Any, layers: dict[int, list[int]]) -> None:
    with pytest.raises(Invalid, match="another base"):
        base_digests(model, layers)
