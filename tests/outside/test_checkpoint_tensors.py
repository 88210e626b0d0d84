"""Checkpoints whose tensors are not what a tidy save leaves: types, ties, names, numbers. The judge is `from_pretrained`."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.description import build_manifest
from connito.base.folders import rewrite, show
from connito.base.loading import load_full, load_resident_local, load_tokenizer
from connito.errors import Invalid
from connito.moe.layout import require_moe_layers
from connito.workloads.rehearsal import config_of
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import Tensors, assert_as_transformers, assert_same, change, edit, published, theirs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def base(qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen, tmp_path / "base"))


def stored_as(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda found: {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}


@pytest.mark.parametrize(
    ("stored", "said"), [(F32, "bfloat16"), (BF16, "float32"), (F16, "bfloat16"), (F32, "float16")]
)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_configuration_says_the_type(tmp_path: Path, family: str, stored: torch.dtype, said: str) -> None:
    base = published(tmp_path / "base", family)
    change(base, stored_as(stored))
    edit(base, dtype=said)
    assert_as_transformers(base)
    assert build_manifest(base).expert_value_bytes() == getattr(torch, said).itemsize
    rewrite(base, tmp_path / "out")
    assert_same(load_full(tmp_path / "out"), theirs(base))
    assert_as_transformers(tmp_path / "out")


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("first", [BF16, F16, F32])
def test_without_a_type_the_first_tensor_says_it(tmp_path: Path, shard: str, first: torch.dtype) -> None:
    base = published(tmp_path / "base", shard=shard)
    edit(base, without="dtype")
    change(base, stored_as(first), sorted(base.glob("*.safetensors"))[0].name)
    assert_as_transformers(base)
    assert load_full(base).dtype == first


def test_the_older_name_of_the_type_and_an_index_that_says_it(tmp_path: Path) -> None:
    base = published(tmp_path / "base", shard="60KB")
    edit(base, without="dtype", torch_dtype="bfloat16")
    assert_as_transformers(base)
    assert load_full(base).dtype == BF16
    edit(base, without="torch_dtype")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    edit(base, "model.safetensors.index.json", metadata={**index["metadata"], "dtype": "float16"})
    assert_as_transformers(base)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "beam", "flint", "afmoe", "hy_v4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_family_keeps_in_float32(tmp_path: Path, family: str, dtype: str) -> None:
    base = published(tmp_path / "base", family)
    edit(base, dtype=dtype)
    assert_as_transformers(base)


def test_tensors_of_many_types(base: Path) -> None:
    kinds = (F32, BF16, F16, torch.float64)
    change(base, lambda found: {n: t.to(kinds[i % 4]) for i, (n, t) in enumerate(sorted(found.items()))})
    assert_as_transformers(base)


@pytest.mark.parametrize("layout", ["theirs", "fused"])
@pytest.mark.parametrize("head", ["own", "same", "none"])
def test_ties_are_those_of_transformers(tmp_path: Path, layout: str, head: str) -> None:
    base = published(tmp_path / "base", tie_word_embeddings=False)
    if layout == "fused":
        rewrite(base, tmp_path / "fused")
        base = tmp_path / "fused"
    edit(base, tie_word_embeddings=True)

    def put(found: Tensors) -> Tensors:
        if head == "same":
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        elif head == "none":
            del found["lm_head.weight"]
        return found

    change(base, put)
    assert_as_transformers(base)
    rewrite(base, tmp_path / "again")
    assert_same(load_full(tmp_path / "again"), theirs(base))


def test_a_tie_whose_source_is_missing(base: Path) -> None:
    edit(base, tie_word_embeddings=True)
    change(base, without("model.embed_tokens.weight"))
    assert_as_transformers(base)


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda found: {n: t for n, t in found.items() if not any(part in n for part in parts)}


def shift_an_expert(found: Tensors) -> Tensors:
    return {n.replace("layers.1.mlp.experts.2.", "layers.1.mlp.experts.4."): t for n, t in found.items()}


def narrow(found: Tensors) -> Tensors:
    return {n: t[:, :-1] if n.endswith("layers.1.self_attn.q_proj.weight") else t for n, t in found.items()}


def narrow_expert(found: Tensors) -> Tensors:
    return {n: t[:-1] if n.endswith("layers.1.mlp.experts.3.up_proj.weight") else t for n, t in found.items()}


LACKING: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "attention": (without("layers.1.self_attn.k_proj"), r"layers\.1\.self_attn\.k_proj\.weight is missing"),
    "norm": (without("model.norm"), r"model\.norm\.weight is missing"),
    "head": (without("lm_head"), r"lm_head\.weight is missing"),
    "router": (without("layers.0.mlp.gate."), r"layers\.0\.mlp\.gate\.weight is missing"),
    "a part of an expert": (without("layers.1.mlp.experts.2.up_proj"), r"layers\.1\.mlp\.experts"),
    "an expert": (without("layers.1.mlp.experts.3."), r"layers\.1\.mlp\.experts"),
    "an expert of another number": (shift_an_expert, r"expert 2 of model\.layers\.1\.mlp\.experts.* is missing"),
    "experts of a layer": (without("layers.1.mlp.experts."), r"layers\.1\.mlp\.experts\.\w+ is missing"),
    "a layer": (without("layers.1."), r"layers\.1\..* is missing"),
    "nearly all": (lambda found: {"model.norm.weight": found["model.norm.weight"]}, "is missing"),
    "a column": (narrow, r"q_proj\.weight has shape .* where config\.json describes"),
    "a row of an expert": (narrow_expert, r"layers\.1\.mlp\.experts"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_is_missing_is_named_and_never_made_up(base: Path, name: str, tmp_path: Path) -> None:
    how, says = LACKING[name]
    change(base, how)
    for use in (show, load_full, config_of, lambda f: rewrite(f, tmp_path / "out")):
        with pytest.raises(Invalid, match=says) as caught:
            use(base)
        assert "\n" not in str(caught.value)
    with pytest.raises(Invalid, match=says):
        load_resident_local(base, {1: [0]}, {1: [1]})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe", "hy_v3"])
def test_a_routing_bias_that_is_missing(tmp_path: Path, family: str) -> None:
    base = published(tmp_path / "base", family)
    change(base, without("correction_bias", "expert_bias"))
    with pytest.raises(Invalid, match=r"bias is missing"):
        show(base)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "mimo_v2_flash"])
def test_a_block_for_further_tokens_is_no_layer(tmp_path: Path, family: str) -> None:
    base = published(tmp_path / "base", family)
    plain = build_manifest(base)

    def behind(found: Tensors) -> Tensors:
        last = {n: t for n, t in found.items() if "layers.1." in n}
        found |= {n.replace("layers.1.", "layers.2."): t * 2 for n, t in last.items()}
        return found | {
            "model.layers.2.eh_proj.weight": torch.zeros(32, 64),
            "model.layers.2.enorm.weight": torch.ones(32),
        }

    change(base, behind)
    manifest = build_manifest(base)
    assert manifest.experts() == plain.experts()
    assert (manifest.size, set(manifest.tensors)) == (plain.size, set(plain.tensors))
    assert_as_transformers(base)
    with pytest.raises(Invalid, match="layer 2"):
        load_resident_local(base, {2: [0]})


def test_tensors_that_are_not_the_models_are_left_alone(base: Path) -> None:
    before = build_manifest(base)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "value_head.weight": torch.ones(1, 32)}
    change(base, lambda found: found | more)
    assert set(build_manifest(base).tensors) == set(before.tensors)
    assert_as_transformers(base)


def gptq(found: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in found.items():
        if ".experts." in name:
            part = name.removesuffix(".weight")
            out |= {
                f"{part}.qweight": torch.zeros(4, len(tensor), dtype=torch.int32),
                f"{part}.scales": torch.ones(1, len(tensor)),
            }
            out |= {
                f"{part}.qzeros": torch.zeros(1, 2, dtype=torch.int32),
                f"{part}.g_idx": torch.zeros(4, dtype=torch.int32),
            }
        else:
            out[name] = tensor
    return out


def packed(found: Tensors) -> Tensors:
    return {
        n.replace(".weight", ".weight_packed") if ".experts." in n else n: t.to(torch.int32) if ".experts." in n else t
        for n, t in found.items()
    }


def bits_and_bytes(found: Tensors) -> Tensors:
    small = {n: t.reshape(-1, 1).to(torch.uint8) if ".experts." in n else t for n, t in found.items()}
    return small | {f"{n}.absmax": torch.ones(2) for n in found if ".experts." in n}


def whole_numbers(found: Tensors) -> Tensors:
    return {n: t.to(torch.int8) if ".experts." in n else t for n, t in found.items()}


def awq(found: Tensors) -> Tensors:
    return {n: t for n, t in gptq(found).items() if not n.endswith("g_idx")}


QUANTISED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "gptq": (gptq, "GPTQ or AWQ"),
    "awq": (awq, "GPTQ or AWQ"),
    "compressed-tensors": (packed, "compressed-tensors"),
    "bitsandbytes": (bits_and_bytes, "bitsandbytes"),
    "int8": (whole_numbers, "I8"),
}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_refused_with_or_without_a_flag(
    base: Path, name: str, flag: bool, tmp_path: Path
) -> None:
    how, says = QUANTISED[name]
    change(base, how)
    if flag:
        edit(base, quantization_config={"quant_method": name, "bits": 4})
    else:
        (base / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    for use in (show, load_full, lambda f: rewrite(f, tmp_path / "out")):
        with pytest.raises(Invalid, match=rf"quantised.*|{says}") as caught:
            use(base)
        assert says in str(caught.value)
        assert "not quantised" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "compressed-tensors", "mxfp4", "unheard-of"])
def test_a_flag_that_the_tensors_belie_is_a_leftover(base: Path, method: str) -> None:
    wanted = theirs(base)
    edit(base, quantization_config={"quant_method": method, "fmt": "e4m3", "weight_block_size": [128, 128]})
    show(base)
    assert_same(load_full(base), wanted)
    assert not getattr(load_full(base).config, "quantization_config", None)


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_infinite_numbers_as_transformers_writes_them(tmp_path: Path, family: str) -> None:
    base = published(tmp_path / "base", family)
    assert "__float__" in (base / "config.json").read_text()
    assert_as_transformers(base)
    rewrite(base, tmp_path / "out")
    assert_as_transformers(tmp_path / "out")


def test_numbers_that_are_none_in_a_configuration(base: Path) -> None:
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"rms_norm_eps": ', '"rms_norm_eps": NaN, "was": '))
    with torch.no_grad():
        assert load_full(base)(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.isnan().all()


def test_values_that_are_not_numbers_are_kept(base: Path) -> None:
    def odd(found: Tensors) -> Tensors:
        found["model.norm.weight"][0], found["model.norm.weight"][1] = torch.inf, -0.0
        return found

    change(base, odd)
    ours, other = load_full(base).state_dict(), theirs(base).state_dict()
    assert all(torch.equal(ours[n].view(torch.int32), t.view(torch.int32)) for n, t in other.items())


def test_a_configuration_of_the_hubs_early_days_with_code_beside(tmp_path: Path) -> None:
    base = published(tmp_path / "base", "deepseek_v3")
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters", {})
    config.pop("dtype", None)
    config |= {
        "torch_dtype": "float32",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 64},
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
                     "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "transformers_version": "4.33.1",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (base / name).write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('yes')\n")
    wanted = theirs(base, trust_remote_code=False)
    assert_same(load_full(base), wanted)
    assert not (tmp_path / "ran").exists()


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "kimi_k9"}, "'kimi_k9' is not part of the installed transformers"),
    "family with code": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}},
        "code that comes with a checkpoint is never run",
    ),
    "no family": ({"model_type": None}, r"config\.json cannot be read"),
    "a family that makes no text": ({"model_type": "clip_vision_model"}, "no causal language model"),
    "sizes that cannot be": ({"hidden_size": "many"}, r"config\.json cannot be read"),
    "another size": ({"hidden_size": 48}, "does not fit its configuration"),
    "more layers": ({"num_hidden_layers": 3}, r"layers\.2\..*is missing"),
    "another number of experts": ({"num_experts": 6, "num_local_experts": 6}, r"mlp\.(gate|experts)"),
    "a type that is none": ({"dtype": "int8"}, "."),
    "a type unheard of": ({"dtype": "float12"}, "."),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_configuration_that_nothing_is_made_of(base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, says = UNKNOWN[name]
    (base / "own.py").write_text("raise SystemExit('ran')")
    edit(base, **values)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    for use in (show, load_full):
        with pytest.raises(Invalid, match=says) as caught:
            use(base)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", ["y\ny\ny\n", ""])
def test_code_of_a_tokenizer_is_neither_run_nor_asked_for(
    tmp_path: Path, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a family that has no tokenizer of its own in transformers, for which the library would ask."""
    base = published(tmp_path / "base", "deepseek_v3")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
    (base / "tiktoken.model").write_text("AA== 0\nAQ== 1\n")
    (base / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": own}))
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(Invalid, match=r"no tokenizer that can be loaded.*tokenizer\.json"):
        show(base)
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["OwnTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_with_code_and_a_file_that_says_all(base: Path, tmp_path: Path, kind: str) -> None:
    wanted = load_tokenizer(base)("some text, in bytes")["input_ids"]
    (base / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    edit(
        base,
        "tokenizer_config.json",
        tokenizer_class=kind,
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    show(base)
    assert load_tokenizer(base)("some text, in bytes")["input_ids"] == wanted
    assert load_tokenizer(base).eos_token_id is not None
    assert not (tmp_path / "ran").exists()


def test_a_model_inside_a_larger_one(tmp_path: Path) -> None:
    """The text part of a model that also sees, saved as the whole: names and configuration lie a level deeper."""
    base = published(tmp_path / "base", "qwen3_5_moe_text")
    text = json.loads((base / "config.json").read_text())
    edit(base, model_type="qwen3_5_moe", text_config=text, architectures=["Qwen3_5MoeForConditionalGeneration"])

    def deeper(found: Tensors) -> Tensors:
        named = {
            n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
            for n, t in found.items()
        }
        return named | {"model.visual.blocks.0.norm1.weight": torch.ones(4)}

    change(base, deeper)
    assert_as_transformers(base)
    assert list(build_manifest(base).experts()) == list(require_moe_layers(theirs(base)))


def test_weights_in_one_file_and_a_copy_of_them_in_two(base: Path) -> None:
    """Two shards of an index that both hold a tensor, with equal values: still not to be told which is stale."""
    found = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(found)
    save_file({n: found[n] for n in names[:40]}, base / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({n: found[n] for n in names[39:]}, base / "model-00002-of-00002.safetensors", {"format": "pt"})
    index = {n: f"model-0000{1 if i < 40 else 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(Invalid, match=f"{names[39]} is in both"):
        load_full(base)


def test_a_model_that_sees_and_hears_with_numbers_that_have_no_dimension(tmp_path: Path) -> None:
    """Gemma 4 as published: the bounds of clipped layers in its tower are single numbers, beside the text model's experts."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration
    from transformers.models.gemma4 import Gemma4TextConfig, Gemma4VisionConfig

    small = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"vocab_size": 300, "num_hidden_layers": 2, "head_dim": 8, "global_head_dim": 8, "pad_token_id": 0} | {
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }  # fmt: skip
    seen = {"num_hidden_layers": 1, "head_dim": 8, "patch_size": 4, "use_clipped_linears": True}
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**small, **text).to_dict(),
        vision_config=Gemma4VisionConfig(**small | {"num_key_value_heads": 4}, **seen).to_dict(),
    )
    Gemma4ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert any(tensor.dim() == 0 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert_as_transformers(tmp_path)


def test_a_type_that_no_weights_have_is_named(base: Path) -> None:
    change(base, lambda found: found | {"model.norm.weight": found["model.norm.weight"].to(torch.complex64)})
    with pytest.raises(Invalid, match=r"model\.norm\.weight is of type C64, in which no weights"):
        load_full(base)


def test_what_a_check_of_the_configuration_found_is_said(base: Path) -> None:
    edit(base, num_hidden_layers=3, layer_types=["full_attention"] * 2)
    with pytest.raises(Invalid, match=r"config\.json cannot be read: .*\(3\).*\(2\)|layer_types"):
        load_full(base)


def test_weights_of_an_old_program_are_rewritten(base: Path, tmp_path: Path) -> None:
    weights = base / "model.safetensors"
    torch.save(load_file(weights), base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights.unlink()
    rewrite(base, tmp_path / "out")
    assert_same(load_full(tmp_path / "out"), theirs(base))


def test_tensors_that_share_memory_without_a_tie_are_both_rewritten(base: Path, tmp_path: Path) -> None:
    weights = base / "model.safetensors"
    found = load_file(weights)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    found["model.norm.weight"] = found["model.embed_tokens.weight"][0]
    torch.save(found, base / "pytorch_model.bin")
    weights.unlink()
    rewrite(base, tmp_path / "out")
    assert_same(load_full(tmp_path / "out"), theirs(base))
    assert_as_transformers(tmp_path / "out")


@pytest.mark.parametrize(("content", "said"), [(b"", "it ends too early"), (None, "does not hold tensors by name")])
def test_weights_that_no_program_reads_as_numbers(base: Path, content: bytes | None, said: str) -> None:
    found = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({name: tensor.to_sparse() for name, tensor in found.items()}, base / "pytorch_model.bin")
    if content is not None:
        (base / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(Invalid, match=said):
        load_full(base)
