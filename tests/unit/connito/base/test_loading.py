"""Loading whole and in part, from every way a checkpoint may be stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.description import build_manifest
from connito.base.loading import build_empty, load_full, load_resident, load_resident_local
from connito.base.tiny import tokenizer
from connito.data.manifest import FileEntry
from connito.errors import Invalid, NotFound
from connito.moe.layout import require_moe_layers, router_digest
from connito.moe.residency import ALL, FOUR_BIT
from connito.moe.residency import HELPERS as HELPED
from connito.moe.resident import compress, read_targets, write_targets
from connito.moe.rows import write_rows
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from tests.support.families import tiny_model
from tests.support.files import directory_reader

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SELECTION, HELPERS = {1: [3, 0]}, {1: [2]}


def model_of(tied: bool) -> Any:
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["fused", "single", "sharded"])
def test_full_and_ranged_loading_agree_with_transformers(tmp_path: Path, layout: str, tied: bool) -> None:
    """`fused` is how this project saves; transformers itself stores a Qwen2-MoE's experts singly."""
    model = model_of(tied)
    if layout == "fused":
        save_checkpoint(model, tmp_path, tokenizer())
    else:
        model.save_pretrained(tmp_path, max_shard_size="8KB" if layout == "sharded" else "5GB")
    reference = logits(AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval())
    full = load_full(tmp_path)
    assert torch.equal(logits(full), reference)
    assert not any(parameter.requires_grad for parameter in full.parameters())
    manifest = build_manifest(tmp_path)
    assert manifest.experts() == {0: 4, 1: 4}
    ranged = load_resident(manifest, directory_reader(tmp_path), SELECTION, HELPERS)
    whole = compress(load_full(tmp_path), SELECTION, HELPERS)
    assert all(torch.equal(value, read_targets(whole)[name]) for name, value in read_targets(ranged).items())
    if layout == "fused":
        assert torch.equal(logits(ranged), logits(whole))


@pytest.mark.parametrize("residency", [ALL, FOUR_BIT, HELPED])
@pytest.mark.parametrize("layout", ["fused", "single"])
def test_rows_that_a_state_replaces_are_never_asked_for(tmp_path: Path, layout: str, residency: str) -> None:
    model = model_of(False)
    save_checkpoint(model, tmp_path, tokenizer()) if layout == "fused" else model.save_pretrained(tmp_path)
    expected = load_resident_local(tmp_path, SELECTION, HELPERS, residency=residency)
    state = {name: rows + 1 for name, rows in read_targets(expected).items()}
    write_targets(expected, state)
    manifest, disk, asked = build_manifest(tmp_path), directory_reader(tmp_path), []

    def reader(entry: FileEntry, start: int, length: int) -> bytes:
        asked.append((entry.name, start, length))
        return disk(entry, start, length)

    made = load_resident(manifest, reader, SELECTION, HELPERS, residency=residency, state=state)
    own, theirs = ({**each.state_dict(), **read_targets(each)} for each in (made, expected))
    assert own.keys() == theirs.keys()
    assert all(own[name].dtype == rows.dtype and torch.equal(own[name], rows) for name, rows in theirs.items())
    assert torch.equal(logits(made), logits(expected))
    rows = {(r.file, r.start, r.length) for expert in SELECTION[1] for r in manifest.expert_rows(1, expert)}
    assert rows
    assert not rows & set(asked)
    beside = {(r.file, r.start, r.length) for r in manifest.expert_rows(1, 2)}
    assert beside <= set(asked)
    short = {name: rows[:1] for name, rows in state.items()}
    for wrong, why in (({}, "not in both"), (short, "has shape")):
        with pytest.raises(Invalid, match=why):
            load_resident(manifest, disk, SELECTION, HELPERS, residency=residency, state=wrong)


@pytest.mark.parametrize("family", ["minimax_m2", "deepseek_v3", "qwen3_moe"])
def test_a_model_that_routes_otherwise_is_not_trained(tmp_path: Path, family: str) -> None:
    """The correction biases of these families lie in the block, in the router, and nowhere."""
    model = tiny_model(family, buffers=True)
    model.save_pretrained(tmp_path)
    routers = router_digest(require_moe_layers(load_full(tmp_path)))
    manifest, read = build_manifest(tmp_path), directory_reader(tmp_path)
    load_resident(manifest, read, SELECTION, HELPERS, routers=routers)
    load_resident_local(tmp_path, SELECTION, HELPERS, routers=routers)
    routing = {
        name: value for name, value in model.state_dict().items() if ".gate.weight" in name or "correction" in name
    }
    for name, value in routing.items():
        with torch.no_grad():
            value.add_(0.01)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            value.sub_(0.01)
        with pytest.raises(Invalid, match="routers"):
            load_resident_local(tmp_path / name, SELECTION, HELPERS, routers=routers)
    assert len(routing) == (2 if family == "qwen3_moe" else 4)


def test_writing_rows_into_a_mapped_model_leaves_the_file_alone(tmp_path: Path) -> None:
    save_checkpoint(model_of(True), tmp_path, tokenizer())
    before = (tmp_path / "model.safetensors").read_bytes()
    full = load_full(tmp_path)
    write_rows(
        full,
        SELECTION,
        {name: rows + 1 for name, rows in read_targets(compress(load_full(tmp_path), SELECTION)).items()},
    )
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not torch.equal(logits(full), logits(load_full(tmp_path)))


def test_a_mixtral_checkpoint_is_converted_on_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    ).eval()
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_full(tmp_path)), logits(model))


def test_a_model_of_tensors_lacks_none() -> None:
    model = model_of(False)
    tensors = dict(model.state_dict())
    assert torch.equal(logits(build_empty(model.config, tensors)), logits(model))
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(Invalid, match=r"k_proj\.weight is missing"):
        build_empty(model.config, tensors)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        load_full(tmp_path)
    save_checkpoint(model_of(True), tmp_path, tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(Invalid, match="unheard_of"):
        load_full(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 32}))
    with pytest.raises(Invalid, match="does not fit"):
        load_full(tmp_path)
