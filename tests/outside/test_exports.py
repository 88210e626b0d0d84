"""Exported models, read by what people run: stock transformers by the published names, llama.cpp and gguf's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.gguf_file import save_gguf
from connito.base.hub_layout import copy_companions, save_hub
from connito.base.loading import load_full, load_tokenizer
from connito.base.tiny import tokenizer
from connito.errors import Invalid
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.families import tiny_model
from tests.support.llama import next_token
from tests.support.models import one_thread, save_random, tiny

__all__ = ["one_thread", "tiny"]

# One expert's tensor as the family's first checkpoints on the hub name it, and a field their config.json has.
PUBLISHED = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "num_local_experts"),
    "qwen2_moe": ("model.layers.0.mlp.experts.3.gate_proj.weight", "num_experts"),
    "qwen3_moe": ("model.layers.0.mlp.experts.3.down_proj.weight", "num_experts"),
    "olmoe": ("model.layers.0.mlp.experts.3.up_proj.weight", "num_experts"),
    "deepseek_v2": ("model.layers.0.mlp.experts.3.up_proj.weight", "n_routed_experts"),
    "glm4_moe": ("model.layers.0.mlp.experts.3.up_proj.weight", "n_routed_experts"),
    "granitemoe": ("model.layers.0.block_sparse_moe.input_linear.weight", "num_local_experts"),
    "phimoe": ("model.layers.0.block_sparse_moe.experts.3.w3.weight", "num_local_experts"),
    "gpt_oss": ("model.layers.0.mlp.experts.gate_up_proj", "num_local_experts"),
}
TEXT = "turnip with leek"


@pytest.mark.slow
@pytest.mark.parametrize("family", PUBLISHED)
def test_the_hub_layout_has_the_published_names_and_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    made = tiny_model(family, buffers=True)
    save_checkpoint(made, tmp_path / "fused", tokenizer())
    hub = save_hub(load_full(tmp_path / "fused"), tmp_path / "hub", tokenizer())
    name, field = PUBLISHED[family]
    with safe_open(hub / "model.safetensors", "pt") as file:
        assert name in set(file.keys())
    config = json.loads((hub / "config.json").read_text())
    # What transformers 4 asks for by names that 5 does not write.
    assert config[field] == 4
    assert config["rope_theta"] > 0
    assert config["torch_dtype"] == "float32"
    assert json.loads((hub / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    back = AutoModelForCausalLM.from_pretrained(hub, dtype="auto").state_dict()
    for key, tensor in made.state_dict().items():
        assert torch.equal(back[key], tensor), key
    assert AutoTokenizer.from_pretrained(hub)(TEXT)["input_ids"] == list(TEXT.encode())


def _compare(model: Any, words: Any, file: Path) -> None:
    ids = words(TEXT)["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
    tokens, found = next_token(file, TEXT)
    assert tokens == len(ids)
    assert len(found) == len(wanted)
    # llama.cpp rounds its activation functions through tables of half precision.
    assert max(abs(value - float(wanted[token])) for token, value in found.items()) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": None}),
        ("qwen2_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("olmoe", {"num_key_value_heads": 4}),
    ],
)
def test_llama_cpp_computes_what_the_model_does(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family, vocab_size=258, **changes)
    _compare(model, tokenizer(), save_gguf(model, tmp_path, tokenizer()))


@pytest.mark.slow
def test_llama_cpp_computes_what_an_upcycled_base_does(tiny: Path, tmp_path: Path) -> None:
    model, words = load_full(tiny), load_tokenizer(tiny)
    _compare(model, words, save_gguf(model, tmp_path, words))


def test_every_number_of_a_bf16_model_is_in_the_file(tmp_path: Path) -> None:
    from gguf import GGUFReader, quants

    base = save_random(tmp_path / "base", norm_topk_prob=False, mlp_only_layers=[])
    model = load_full(base).to(torch.bfloat16)
    read = GGUFReader(save_gguf(model, tmp_path / "out", load_tokenizer(base)))
    found = {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in read.tensors}
    bank = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].float()
    assert torch.equal(torch.tensor(found["blk.1.ffn_gate_exps.weight"]), bank[:, :16])
    assert torch.equal(torch.tensor(found["blk.1.ffn_up_exps.weight"]), bank[:, 16:])
    assert read.fields["qwen2moe.expert_count"].contents() == 8
    assert len(found) == len(model.state_dict()) + 3  # gate and up of three layers are apart


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"norm_topk_prob": True, "mlp_only_layers": []}, "renormalises its gates"),
        ({"norm_topk_prob": False}, "dense layers beside sparse ones"),
        ({"norm_topk_prob": False, "mlp_only_layers": [], "hidden_act": "gelu"}, "another activation"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_and_leaves_nothing(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    base = save_random(tmp_path / "base", **changes)
    with pytest.raises(Invalid, match=why):
        save_gguf(load_full(base), tmp_path / "out", load_tokenizer(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_family_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="is not one of"):
        save_gguf(tiny_model("jamba"), tmp_path / "out", tokenizer())


def test_what_belongs_to_a_model_goes_along(tmp_path: Path) -> None:
    source, out = tmp_path / "base", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in (
        "LICENSE",
        "NOTICE.txt",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "run.py",
    ):
        (source / name).write_text(name)
    copy_companions(source, out)
    assert {path.name for path in out.iterdir()} == {
        "LICENSE", "NOTICE.txt", "generation_config.json", "chat_template.jinja"
    }  # fmt: skip
