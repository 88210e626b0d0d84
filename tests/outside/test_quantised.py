"""Checkpoints as DeepSeek-V3 (FP8 in blocks) and gpt-oss (MXFP4) are published: what transformers makes of them, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.checks import check_base
from connito.base.description import build_manifest
from connito.base.folders import left_alone
from connito.base.loading import load_full, load_resident, load_resident_local
from connito.base.tiny import tokenizer
from connito.data.manifest import FileEntry
from connito.errors import Invalid
from connito.moe.footprint import Workload
from connito.moe.layout import require_moe_layers
from connito.moe.residency import ALL, FOUR_BIT, HELPERS
from connito.moe.resident import compress, read_targets, target_parameters, write_targets
from connito.moe.training import train_local
from connito.workloads.rehearsal import config_of, rehearse
from safetensors.torch import load_file, save_file

from tests.support.files import directory_reader
from tests.support.packed import dequantised

pytestmark = pytest.mark.slow

RESIDENCIES = (ALL, FOUR_BIT, HELPERS)
IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(1))
SELECTION: dict[int, list[int]] = {1: [0, 5], 2: [3]}
Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def random_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point() and "norm" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.05)
    return model


def publish(model: Any, folder: Path, how: dict[str, Any], edit: Edit) -> Path:
    """Write a model with `edit` applied to its config.json and its stored tensors."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config["quantization_config"] = how
    edit(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fp8(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in FP8 by the publisher's recipe: the largest of each block, cut at the edges, becomes 448."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block].float()
            scales[i, j] = part.abs().max() / 448
            values[i * block : (i + 1) * block, j * block : (j + 1) * block] = (part / scales[i, j]).to(values.dtype)
    return values, scales


def deepseek(folder: Path, edit: Edit = lambda *_: None, **changes: Any) -> Path:
    """A tiny DeepSeek-V3 whose projections are FP8 in blocks; embeddings, routers and norms are not, as published."""
    from transformers import DeepseekV3Config

    values: dict[str, Any] = {
        "vocab_size": 258, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 128, "kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "eos_token_id": 256, "dtype": "bfloat16",
    }  # fmt: skip

    def quantise(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name, t in tensors.items() if "proj" in name and t.dim() == 2]:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensors[name])
        edit(config, tensors)

    how = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    return publish(random_model(DeepseekV3Config(**values | changes)), folder, how, quantise)


def gpt_oss(folder: Path, edit: Edit = lambda *_: None, **changes: Any) -> Path:
    """A tiny gpt-oss whose experts are MXFP4, as published: random blocks and scales."""
    from transformers import GptOssConfig

    values: dict[str, Any] = {
        "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "eos_token_id": 256,
        "dtype": "bfloat16",
    }  # fmt: skip

    def quantise(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        draw = torch.Generator().manual_seed(3)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            shape = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(119, 124, shape, generator=draw, dtype=torch.uint8)
        edit(config, tensors)

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    how = {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}
    return publish(random_model(GptOssConfig(**values | changes)), folder, how, quantise)


KINDS = {"fp8": deepseek, "mxfp4": gpt_oss}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = KINDS[request.param](tmp_path_factory.mktemp(request.param) / "model")
    return made


def reference(folder: Path) -> Any:
    """The library's own dequantisation of the folder."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    how = json.loads((folder / "config.json").read_text())["quantization_config"]
    kind: Any = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[how["quant_method"]]
    wanted = kind(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=wanted, experts_implementation="eager"
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def same(one: Any, other: Any) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def ranged(folder: Path, **how: Any) -> Any:
    """What ranges give; what is read was said before, and nothing else was."""
    disk = directory_reader(folder)
    read: set[tuple[FileEntry, int, int]] = set()
    told: set[tuple[FileEntry, int, int]] = set()

    def reader(entry: FileEntry, start: int, length: int) -> bytes:
        if entry.name != "config.json":
            read.add((entry, start, length))
        return disk(entry, start, length)

    model = load_resident(build_manifest(folder), reader, SELECTION, ahead=told.update, **how)
    assert read == told
    return model


def test_the_whole_model_is_what_the_library_dequantises(base: Path) -> None:
    ours, theirs = load_full(base), reference(base)
    same(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_miner_trains_the_model_that_is_judged(base: Path, residency: str) -> None:
    helpers = {1: [1], 2: [0, 7]}
    expected = compress(reference(base), SELECTION, helpers, residency=residency)
    for model in (
        ranged(base, helpers=helpers, residency=residency),
        load_resident_local(base, SELECTION, helpers, residency=residency),
    ):
        same(model, expected)
        if residency != FOUR_BIT or json.loads((base / "config.json").read_text())["model_type"] != "gpt_oss":
            assert torch.equal(logits(model), logits(expected))
    state = {name: rows + 1 for name, rows in read_targets(expected).items()}
    write_targets(expected, state)
    same(ranged(base, helpers=helpers, residency=residency, state=state), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_what_fp8_leaves_as_numbers_keeps_its_type(tmp_path: Path, stored: torch.dtype) -> None:
    """Routers are published in float32 beside bfloat16: rounded, they would choose other experts."""

    def wider(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("mlp.gate.weight", "q_a_layernorm.weight"))]:
            tensors[name] = (tensors[name].float() * 1.0001).to(stored)

    folder = deepseek(tmp_path / "model", wider)
    assert reference(folder).model.layers[1].mlp.gate.weight.dtype == stored
    same(load_full(folder), reference(folder))
    expected = compress(reference(folder), SELECTION)
    same(load_resident_local(folder, SELECTION), expected)
    same(ranged(folder), expected)


def test_experts_that_fp8_leaves_as_numbers_keep_their_type(tmp_path: Path) -> None:
    def plain(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".mlp.experts." in n and n.endswith(".weight")]:
            tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale_inv").mean()

    folder = deepseek(tmp_path / "model", plain)
    same(load_full(folder), reference(folder))
    expected = compress(reference(folder), SELECTION)
    same(load_resident_local(folder, SELECTION), expected)
    same(ranged(folder), expected)


def test_mxfp4_stays_as_published_and_is_the_whole_model_to_the_bit(tmp_path: Path) -> None:
    folder = gpt_oss(tmp_path / "model")
    for model in (ranged(folder, residency=FOUR_BIT), load_resident_local(folder, SELECTION, residency=FOUR_BIT)):
        assert torch.equal(logits(model), logits(reference(folder)))
        model(input_ids=IDS, labels=IDS).loss.backward()
        plain: Any = compress(reference(folder), SELECTION, residency=ALL)
        plain(input_ids=IDS, labels=IDS).loss.backward()
        others = target_parameters(plain)
        for name, parameter in target_parameters(model).items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, others[name].grad)
        held: Any = model.get_submodule("model.layers.1.mlp.experts").helper_down_proj
        assert sum(buffer.nbytes for buffer in held.buffers()) * 8 == 4.25 * 6 * held.shape.numel()


def test_four_bits_on_top_are_the_dequantised_experts_packed(base: Path) -> None:
    packed = ranged(base, residency=FOUR_BIT)
    torch.testing.assert_close(logits(packed), logits(dequantised(reference(base), packed, SELECTION)), rtol=0, atol=0)


def test_only_the_bytes_of_experts_that_stay_are_read(base: Path) -> None:
    manifest, disk, read = build_manifest(base), directory_reader(base), []

    def reader(entry: Any, start: int, length: int) -> bytes:
        read.append((start, length))
        return disk(entry, start, length)

    load_resident(manifest, reader, SELECTION, {1: [1]})
    absent = {r.start for e in (2, 3, 4, 6, 7) for r in manifest.expert_rows(1, e)}
    assert absent
    assert not absent & {start for start, _ in read}
    there = {(r.start, r.length) for e in (0, 1, 5) for r in manifest.expert_rows(1, e)}
    assert there <= set(read), "values and scales of the experts that stay"


def test_targets_train_in_the_model_s_type_and_the_rest_stays(base: Path) -> None:
    model = ranged(base, residency=ALL)
    state, stats = train_local(model, IDS.numpy()[None].repeat(2, axis=0), learning_rate=1e-2)
    assert stats.last_loss < stats.first_loss
    assert {rows.dtype for rows in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_predicted_weights_are_what_is_held(base: Path, residency: str) -> None:
    model = load_resident_local(base, SELECTION, {1: [1]}, residency=residency)
    need = rehearse(config_of(base), SELECTION, {1: [1]}, Workload(2, 16, residency=residency))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    # A router's correction bias is kept in float32, where a model made of its configuration alone has it in its own type.
    assert 0 <= held - (need.weights + need.buffers) <= 2 * 8 * 2


def test_the_base_is_shown_as_it_is_loaded_and_says_what_it_was(base: Path) -> None:
    layout, manifest, plain = check_base(base), build_manifest(base), reference(base)
    assert layout.expert_bytes == manifest.expert_bytes()
    experts = plain.get_submodule("model.layers.1.mlp.experts")
    assert layout.expert_bytes[1] == sum(bank[0].nbytes for bank in experts.parameters(recurse=False))
    assert manifest.extra["quantised"] in ("FP8 in blocks of 128 × 128", "MXFP4")
    assert left_alone(base, manifest) == ([], [])


def test_budgets_count_what_is_loaded(base: Path) -> None:
    from connito.moe.helper_experts import frozen_and_trained
    from connito.v1.run_pb2 import RunSpec, SelectionPolicy
    from connito.workloads.selecting import _budget

    manifest, plain = build_manifest(base), reference(base)
    whole = sum(t.nbytes for t in plain.state_dict().values())
    experts = {
        index: sum(bank.nbytes for bank in layer.experts.parameters(recurse=False))
        for index, layer in require_moe_layers(plain).items()
    }
    assert frozen_and_trained(manifest, {index: [0] for index in experts})[0] == whole - sum(experts.values())
    asked = RunSpec(selection=SelectionPolicy(helpers_per_layer=1))
    assert _budget(asked, manifest).resident == whole - sum(size * 7 // 8 for size in experts.values())


def test_a_matrix_that_ends_inside_a_block_is_dequantised_as_its_publisher_does(tmp_path: Path) -> None:
    """Attention of DeepSeek-V3 has 576 rows, four blocks and a half; there the library refuses, or spreads scales evenly."""
    folder = deepseek(tmp_path / "model", kv_lora_rank=112)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    values, scales = stored[name], stored[f"{name}_scale_inv"]
    assert values.shape[0] == 144
    expected = torch.empty(values.shape)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            expected[row, column] = values[row, column].float() * scales[row // 128, column // 128]
    assert torch.equal(load_full(folder).state_dict()[name], expected.bfloat16())


def test_one_scale_a_matrix_and_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    def whole(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["quantization_config"]["weight_block_size"] = None
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].max()

    def powers(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = (tensors[name].log2().ceil() + 127).to(torch.uint8)

    for name, edit in (("whole", whole), ("powers", powers)):
        folder = deepseek(tmp_path / name, edit)
        stored, state = load_file(folder / "model.safetensors"), load_full(folder).state_dict()
        weight = "model.layers.0.mlp.down_proj.weight"
        scales = stored[f"{weight}_scale_inv"]
        factor = scales if name == "whole" else (scales.float() - 127).exp2().repeat_interleave(128, 0)
        factor = factor if name == "whole" else factor.repeat_interleave(128, 1)
        assert torch.equal(state[weight], (stored[weight].float() * factor).bfloat16()), name


def test_rewritten_it_is_an_ordinary_checkpoint(base: Path, tmp_path: Path) -> None:
    from connito.base.folders import rewrite
    from transformers import AutoModelForCausalLM

    rewrite(base, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), reference(base))
    assert "quantised" not in build_manifest(tmp_path / "plain").extra


def lose(ending: str) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in sorted(tensors) if "experts" in name and name.endswith(ending))]

    return edit


def cut(ending: str) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if "experts" in name and name.endswith(ending))
        tensors[name] = tensors[name][..., :-1].contiguous()

    return edit


def block_size(value: Any) -> Edit:
    def edit(config: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        config["quantization_config"]["weight_block_size"] = value

    return edit


@pytest.mark.parametrize(
    ("kind", "edit", "says"),
    [
        ("fp8", lose("weight_scale_inv"), "its scales are missing"),
        ("fp8", lose("down_proj.weight"), "missing"),
        ("fp8", cut("weight_scale_inv"), "not one for each block of 128 × 128"),
        ("fp8", block_size([64, 64]), "not one for each block of 64 × 64"),
        ("fp8", block_size([0, 128]), "weight_block_size"),
        ("fp8", block_size("128"), "weight_block_size"),
        ("mxfp4", lose("_scales"), "its scales are missing"),
        ("mxfp4", lose("_blocks"), "missing"),
        ("mxfp4", cut("_scales"), "not one for each block"),
        ("mxfp4", cut("_blocks"), "not one for each block"),
    ],
)  # fmt: skip
def test_half_a_weight_is_refused_in_one_sentence(kind: str, edit: Edit, says: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "model", edit)
    for use in (load_full, build_manifest, check_base):
        with pytest.raises(Invalid, match=says) as caught:
            use(folder)
        assert "fetch" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_selecting_judging_and_exporting_take_it_and_the_export_says_what_it_was(base: Path, tmp_path: Path) -> None:
    from connito.base.loading import load_tokenizer
    from connito.experts.export import ModelSource, export_model, verify_export
    from connito.library.derived import base_of
    from connito.moe.evaluate import Evaluator
    from connito.moe.rows import read_rows, write_rows
    from connito.moe.selection import select_experts
    from connito.moe.statistics import collect
    from transformers import AutoModelForCausalLM

    model, manifest = load_full(base), build_manifest(base)
    chosen = select_experts(collect(model, IDS.numpy().astype("int32")), "esft-token", 0.5)
    assert chosen.total
    state, _ = train_local(ranged(base), IDS.numpy()[None], learning_rate=1e-2)
    judge = Evaluator(model, SELECTION)
    before, _ = judge.losses(None, IDS.numpy().astype("int32"))
    after, _ = judge.losses(state, IDS.numpy().astype("int32"))
    assert (before != after).any()
    write_rows(model, SELECTION, state)

    keep: dict[int, list[int]] = {index: list(range(8)) for index in (0, 1, 2) if index in manifest.experts()}
    source = ModelSource("export", base_of(manifest), keep=keep, settings={"tuned": True}, license="MIT")
    record = export_model(model, tmp_path / "out", load_tokenizer(base), source)
    assert record == verify_export(tmp_path / "out")
    assert (record["precision"], record["base"]["quantised"]) == ("bfloat16", manifest.extra["quantised"])
    assert f"stored as {manifest.extra['quantised']}" in (tmp_path / "out" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    same(again, model)
    rows = read_rows(again, SELECTION)
    assert all(torch.equal(rows[name], state[name]) for name in state)


def qwen3(folder: Path) -> Path:
    """As Qwen3's FP8 checkpoints are: scales in bfloat16, several shards, a list of modules left alone."""
    from transformers import Qwen3MoeConfig

    def quantise(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.layers.0.mlp.gate"]
        for name in [name for name, t in tensors.items() if "_proj" in name and t.dim() == 2]:
            tensors[name], scales = fp8(tensors[name])
            tensors[f"{name}_scale_inv"] = scales.bfloat16()

    config = Qwen3MoeConfig(
        vocab_size=258, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
        decoder_sparse_step=1, eos_token_id=256, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    how = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    return sharded(publish(random_model(config), folder, how, quantise))


def sharded(folder: Path) -> Path:
    """Values and scales apart: every second tensor lies in another file."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    named = {name: files[place % 2] for place, name in enumerate(sorted(whole))}
    for file in files:
        part = {name: whole[name] for name, place in named.items() if place == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in whole.values())}, "weight_map": named}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def fused(folder: Path) -> Path:
    """Banks of experts in FP8, [experts, rows, columns] with scales [experts, …]."""

    def quantise(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.0.gate_proj" in name]:
            head = name.partition(".experts.")[0]
            for part, sources in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                rows = [
                    torch.cat([tensors.pop(f"{head}.experts.{expert}.{source}.weight") for source in sources])
                    for expert in range(8)
                ]
                packed = [fp8(row) for row in rows]
                tensors[f"{head}.experts.{part}"] = torch.stack([values for values, _ in packed])
                tensors[f"{head}.experts.{part}_scale_inv"] = torch.stack([scales for _, scales in packed])

    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=258, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
        eos_token_id=256, dtype="bfloat16",
    )  # fmt: skip
    how = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    return publish(random_model(config), folder, how, quantise)


def without_dtype(folder: Path) -> Path:
    def edit(config: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        config.pop("dtype", None)
        config.pop("torch_dtype", None)

    return gpt_oss(folder, edit)


def with_prediction_layer(folder: Path) -> Path:
    """DeepSeek-V3's multi-token prediction lies beyond the last layer, quantised like the others."""

    def edit(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace("model.layers.2.", "model.layers.3.")] = tensors[name].clone()
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(256, 512, dtype=torch.bfloat16)

    return deepseek(folder, edit)


@pytest.mark.parametrize("made", [qwen3, without_dtype, with_prediction_layer])
def test_checkpoints_of_other_publishers_and_tools(made: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    theirs = reference(folder)
    same(load_full(folder), theirs)
    for residency in (FOUR_BIT, ALL):
        expected = compress(reference(folder), SELECTION, residency=residency)
        same(ranged(folder, residency=residency), expected)
        same(load_resident_local(folder, SELECTION, residency=residency), expected)
    manifest = build_manifest(folder)
    assert check_base(folder).expert_bytes == manifest.expert_bytes()
    assert sum(map(manifest.loaded_bytes, manifest.tensors)) == sum(t.nbytes for t in theirs.state_dict().values())


def test_fused_banks_with_scales_are_dequantised_where_the_library_leaves_the_scales_out(tmp_path: Path) -> None:
    folder = fused(tmp_path / "model")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stored = load_file(folder / "model.safetensors")
    values, scales = stored[name], stored[f"{name}_scale_inv"]
    grown = scales.repeat_interleave(128, dim=1).repeat_interleave(128, dim=2)
    expected = (values.float() * grown).bfloat16()
    assert torch.equal(load_full(folder).state_dict()[name], expected)
    rows = ranged(folder).get_submodule("model.layers.1.mlp.experts").target_gate_up_proj
    assert torch.equal(rows, expected[SELECTION[1]])
