"""One expert a layer as a dense model: transformers' own dense family says what its MoE family says, or one sentence refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from connito.errors import Invalid
from connito.experts.dense import check_dense, to_dense
from connito.experts.prune import prune
from connito.moe.layout import require_moe_layers

from tests.support.families import logits, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "mistral", {}),
    "window": ("mixtral", "mistral", {"sliding_window": 4}),
    "tied": ("mixtral", "mistral", {"tie_word_embeddings": True, "num_experts_per_tok": 1}),
    "not normalised": ("qwen3_moe", "qwen3", {"norm_topk_prob": False, "head_dim": 16}),
    "biases": ("qwen3_moe", "qwen3", {"attention_bias": True}),
    "wide dense layers": ("qwen3_moe", "qwen3", {"mlp_only_layers": [0]}),
    "wide experts": ("qwen3_moe", "qwen3", {"mlp_only_layers": [1], "moe_intermediate_size": 40}),
    "llama": ("qwen2_moe", "llama", {"qkv_bias": False, "norm_topk_prob": False}),
    "qwen2": ("qwen2_moe", "qwen2", {"mlp_only_layers": [1]}),
}


def lone(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = tiny_model(family, **changes).to(dtype)
    for layer in require_moe_layers(model).values():
        if hasattr(layer.block, "shared_expert"):
            layer.block.shared_expert.down_proj.weight.data.zero_()  # type: ignore[union-attr, operator]
    return prune(model, {index: [2] for index in require_moe_layers(model)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_dense_family_says_the_same(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, kind, changes = CASES[case]
    model = lone(family, dtype, **changes)
    to_dense(model).save_pretrained(tmp_path)  # type: ignore[operator]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (dense.config.model_type, dense.dtype) == (kind, dtype)
    near = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(dense), logits(model), rtol=near, atol=near)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gpt_oss", {}, "gpt_oss have no dense form"),
        ("deepseek_v3", {}, "deepseek_v3 have no dense form"),
        ("qwen2_moe", {}, "shared expert of layer 0 is not empty"),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 1}, "slides its window"),
    ],
)
def test_what_has_no_dense_form_is_refused_before_anything_is_computed(
    family: str, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(Invalid, match=f"{why}.*leave out --dense"):
        check_dense(tiny_model(family, **changes))
