"""One implementation, every family: parity, gradients and saving over tiny random models of the fused-experts families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.description import build_manifest
from connito.base.loading import load_full, load_resident, load_resident_local
from connito.base.tiny import tokenizer
from connito.data.manifest import FileEntry
from connito.errors import Invalid
from connito.moe.engine import Engine
from connito.moe.evaluate import Evaluator
from connito.moe.head import Head
from connito.moe.layout import require_moe_layers
from connito.moe.prepare import prepare
from connito.moe.residency import FOUR_BIT
from connito.moe.resident import compress, read_targets, target_parameters, write_targets
from connito.moe.routed import routed_tokens
from connito.moe.rows import assert_only_changed, fingerprint, write_rows
from connito.moe.selection import select_experts
from connito.moe.state import load_state, save_state
from connito.moe.statistics import collect
from connito.moe.training import train_local

from tests.support.families import FAMILIES, IDS, TABLES, logits, tiny_model
from tests.support.files import directory_reader
from tests.support.packed import dequantised

pytestmark = pytest.mark.slow

# Families whose layers also have experts that every token passes, by their own default.
SHARED_TOO = {
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "qwen2_moe",
    "qwen3_next",
    "granitemoeshared",
    "nemotron_h",
    "hunyuan_v1_moe",
}
# Modules of transformers with fused experts that no family above stands for, and why they are left out.
LEFT_OUT = {
    "deepseek_ocr2": "reads images: no causal language model by itself",
    "diffusion_gemma": "denoises text: no causal language model",
    "ernie4_5_vl_moe": "reads images: no causal language model by itself",
    "glm4v_moe": "reads images: no causal language model by itself",
    "glm5_next": "reads images: no causal language model by itself",
    "mistral4": "its causal language model is not registered with AutoModelForCausalLM",
    "mistral_large4": "reads images: no causal language model by itself",
    "muse_spark": "no causal language model by itself",
    "openai_privacy_filter": "labels tokens: no causal language model",
    "qwen3_omni_moe": "speaks and listens: no causal language model by itself",
    "qwen3_vl_moe": "reads images: no causal language model by itself",
    "unlimited_ocr": "reads images: no causal language model by itself",
}
# transformers sets a value of their routers' biases whenever it loads them.
SET_ON_LOAD = {"zaya"}
# Their layers hand more to the next one than hidden states: no entering midway, the whole model runs instead.
HAND_MORE_ON = {"glm_moe_dsa", "hy_v4", "zaya"}


def shared_experts(model: Any) -> list[str]:
    """Modules in the layers that every token passes beside its routed experts."""
    names = ("shared_expert", "shared_experts", "shared_mlp", "shared_moe")
    return [name for name, _ in model.named_modules() if ".layers." in name and name.rpartition(".")[2] in names]


def assert_same(made: Any, wanted: Any) -> None:
    """Every parameter and persistent buffer, bit for bit and in its type, and what the model makes of them."""
    ours, theirs = made.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(logits(made), logits(wanted))


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
@pytest.mark.parametrize("layout", ["theirs", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_loader_gives_what_transformers_gives(family: str, layout: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, folder = tiny_model(family, buffers=True), tmp_path / "saved"
    if layout == "theirs":
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        save_checkpoint(model, folder, tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    if family not in SET_ON_LOAD:
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-6)
    assert_same(load_full(folder), plain)

    # In part, from files and by ranges: what compression of theirs gives, and an absent expert's bytes are not read.
    layers = require_moe_layers(plain)
    top = max(layers)
    selection, helpers = {top: [0, 2]}, {top: [1]}
    absent = sum(getattr(layers[top].experts, name)[3].nbytes for name in layers[top].parameters)
    wanted = compress(plain, selection, helpers)
    assert_same(load_resident_local(folder, selection, helpers), wanted)
    manifest, disk, read = build_manifest(folder), directory_reader(folder), []

    def reader(entry: FileEntry, start: int, length: int) -> bytes:
        read.append(length if entry.name.endswith(".safetensors") else 0)
        return disk(entry, start, length)

    assert_same(load_resident(manifest, reader, selection, helpers), wanted)
    assert sum(read) <= manifest.size - absent
    # Nor are those of targets, where a state has them.
    state = {name: rows + 1 for name, rows in read_targets(wanted).items()}
    write_targets(wanted, state)
    read.clear()
    told: list[Any] = []
    assert_same(load_resident(manifest, reader, selection, helpers, state=state, ahead=told.extend), wanted)
    assert sum(read) <= manifest.size - 3 * absent
    # What will be read is said before, and nothing that will not be.
    assert sorted(length for _, _, length in told) == sorted(length for length in read if length)
    assert manifest.experts() == dict.fromkeys(layers, 4)
    assert manifest.expert_bytes()[top] == absent


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    layers = require_moe_layers(model)
    top, count = max(layers), layers[max(layers)].num_experts
    assert count == 4
    selection = {top: [0, 2]}
    reference = logits(model)
    assert torch.isfinite(reference).all()

    # Natural routing with every other expert beside the targets is the full model.
    worker = compress(copy.deepcopy(model), selection, {top: [e for e in range(count) if e not in (0, 2)]})
    torch.testing.assert_close(logits(worker), reference, rtol=1e-5, atol=1e-6)

    # With all others in four bits it is the full model that has them as they come back.
    packed = compress(copy.deepcopy(model), selection, residency=FOUR_BIT)
    torch.testing.assert_close(logits(packed), logits(dequantised(model, packed, selection)), rtol=1e-5, atol=1e-6)

    # One product for all experts of a bank is the loop, to rounding.
    together = prepare(copy.deepcopy(worker), Engine(experts="grouped"), torch.device("cpu"))
    torch.testing.assert_close(logits(together), reference, rtol=1e-4, atol=1e-5)

    # Only selected rows get gradients, the same ones when activations are computed twice.
    frugal = prepare(copy.deepcopy(worker), Engine(checkpointing=True), torch.device("cpu"))
    for learner in (frugal, worker):
        Head(learner).nll(IDS[:, :-1], IDS[:, 1:]).mean().backward()  # type: ignore[no-untyped-call]
    kept: Any = [p.grad for p in target_parameters(frugal).values()]
    found: Any = [p.grad for p in target_parameters(worker).values()]
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))
    moved = {id(p) for p in worker.parameters() if p.grad is not None}
    assert moved == {id(p) for p in target_parameters(worker).values()}

    # The other modes run without helpers.
    for mode in ("masked", "restricted", "natural") if family not in TABLES else ("natural",):
        assert torch.isfinite(logits(compress(copy.deepcopy(model), selection, {}, mode))).all()

    # A step of training, written and read, put back: nothing but the selected rows of the full model differs.
    trained, _ = train_local(worker, IDS.numpy()[None], learning_rate=0.05, weight_decay=0.1)
    save_state(trained, tmp_path / "state.safetensors")
    rows = load_state(tmp_path / "state.safetensors")
    judge = Evaluator(model, selection)
    assert (judge._shortcut is not None) == (family not in HAND_MORE_ON)
    sums, _ = judge.losses(rows, IDS.numpy())
    # Side by side, too: a forward pass of one thread must leave those of others alone.
    threads, judge._batch_tokens = torch.get_num_threads(), 8
    torch.set_num_threads(4)
    for _ in range(3):
        torch.testing.assert_close(judge.losses(None, np.tile(IDS.numpy(), (4, 1)))[0], np.tile(sums, 4))
        with judge.begun(IDS.numpy()):
            routed = routed_tokens(model, selection, IDS.numpy())
        assert routed == routed_tokens(model, selection, IDS.numpy())
    torch.set_num_threads(threads)
    judge.restore()
    before = fingerprint(model)
    write_rows(model, selection, rows)
    assert len(assert_only_changed(before, model, selection)) == 2 * len(layers[top].parameters)

    # States are judged as by a plain forward.
    plain = logits(model, IDS[:, :-1]).log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1).double().sum(dim=1)
    torch.testing.assert_close(torch.from_numpy(-sums), plain, rtol=1e-5, atol=1e-5)


def test_every_module_with_fused_experts_is_covered_or_left_out_for_a_reason() -> None:
    import transformers.models
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    marker, root = "use_experts_implementation", Path(transformers.models.__path__[0])
    fused = {path.parent.name for path in root.glob("*/modeling_*.py") if marker in path.read_text()}
    covered = {CONFIG_MAPPING[family].__module__.split(".")[-2] for family in FAMILIES}
    assert fused == (covered & fused) | set(LEFT_OUT)
    assert not covered & set(LEFT_OUT)
    assert len(FAMILIES) >= 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_experts_and_dense_layers_cannot_be_selected(family: str) -> None:
    model = tiny_model(family)
    layers, common = require_moe_layers(model), shared_experts(model)
    assert common or family not in SHARED_TOO
    statistics = collect(model, IDS.numpy().astype("int32"))
    chosen = select_experts(statistics, "esft-token", 1.0)
    assert set(statistics.layers) == set(layers)
    assert chosen.total == 4 * len(layers), "routed experts and nothing else are counted"
    inside = {f"{layer.experts_name}.{name}" for layer in layers.values() for name in layer.parameters}
    assert not [name for name in inside if any(name.startswith(other + ".") for other in common)]

    # Training every expert there is to select still leaves all the others as they were.
    worker = compress(copy.deepcopy(model), chosen)
    trainable = {name for name, p in worker.named_parameters() if p.requires_grad}
    assert trainable
    assert not [name for name in trainable if any(name.startswith(other + ".") for other in common)]
    kept = dict(worker.named_parameters())
    for name, _ in model.named_parameters():
        if name not in inside and name in kept:
            assert not kept[name].requires_grad


def test_a_layer_without_experts_is_not_there_to_select() -> None:
    FAMILIES["deepseek_v2"], before = {**FAMILIES["deepseek_v2"], "first_k_dense_replace": 1}, FAMILIES["deepseek_v2"]
    try:
        model = tiny_model("deepseek_v2")
    finally:
        FAMILIES["deepseek_v2"] = before
    assert list(collect(model, IDS.numpy().astype("int32")).layers) == [1]
    with pytest.raises(Invalid, match="the model's MoE layers are"):
        Evaluator(model, {0: [1]})


def test_a_map_for_another_base_is_refused_though_its_numbers_fit() -> None:
    first, second = tiny_model("olmoe"), tiny_model("olmoe")
    chosen = select_experts(collect(first, IDS.numpy().astype("int32")), "esft-token", 0.3)
    Evaluator(second, chosen)
    compress(copy.deepcopy(second), chosen)
    with torch.no_grad():
        next(require_moe_layers(second)[1].router.parameters()).mul_(2)
    for use in (Evaluator, compress):
        with pytest.raises(Invalid, match="made for another base model"):
            use(second, chosen)
