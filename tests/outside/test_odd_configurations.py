"""Configurations and layouts as publishers and tools write them: loaded, rewritten, trained, judged as transformers has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.folders import rewrite
from connito.base.loading import load_full
from connito.moe.evaluate import Evaluator
from connito.moe.layout import require_moe_layers
from connito.moe.resident import compress
from connito.moe.rows import write_rows
from connito.moe.training import train_local

from tests.support.checkpoints import Tensors, assert_as_transformers, assert_same, change, edit, published, theirs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEXT = np.random.default_rng(0).integers(3, 60, (4, 13)).astype("int32")
BF16, F16 = torch.bfloat16, torch.float16
SIXTEEN: dict[str, Any] = {"n_routed_experts": 16, "num_local_experts": 16, "num_experts": 16}


def fuse_the_last_layer(found: Tensors) -> Tensors:
    """One layer as transformers 5 fuses it, the other expert by expert."""
    stem = "model.layers.1.mlp.experts."
    up = [torch.cat([found.pop(f"{stem}{e}.{part}_proj.weight") for part in ("gate", "up")]) for e in range(4)]
    down = [found.pop(f"{stem}{e}.down_proj.weight") for e in range(4)]
    return {**found, f"{stem}gate_up_proj": torch.stack(up), f"{stem}down_proj": torch.stack(down)}


def with_old_buffers(found: Tensors) -> Tensors:
    """What early programs stored beside the weights."""
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)}
    return {**found, **frequencies, "model.embed_tokens.position_ids": torch.arange(8)[None]}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


MADE: dict[str, Callable[[Path], Path]] = {
    "twelve experts, whose numbers sort as words": lambda f: published(f, num_experts=12, shard="20KB"),
    "a tensor a shard": lambda f: published(f, "mixtral", shard="1KB"),
    "two of four groups, no renormalising, a scale": lambda f: published(
        f, "deepseek_v3", **SIXTEEN, n_group=4, topk_group=2, num_experts_per_tok=4, routed_scaling_factor=2.5,
        norm_topk_prob=False,
    ),
    "groups by their best expert": lambda f: published(
        f, "deepseek_v2", **SIXTEEN, n_group=4, topk_group=2, topk_method="group_limited_greedy", num_experts_per_tok=3
    ),
    "no shared experts": lambda f: published(f, "deepseek_v3", n_shared_experts=0),
    "a shared expert of no width": lambda f: published(f, "qwen2_moe", shared_expert_intermediate_size=0),
    "queries without a low rank": lambda f: published(f, "deepseek_v3", q_lora_rank=None, rope_interleave=False),
    "every expert for every token": lambda f: published(f, "mixtral", num_experts_per_tok=4),
    "widths that no kernel likes": lambda f: published(
        f, moe_intermediate_size=7, hidden_size=36, num_attention_heads=3, num_key_value_heads=3
    ),
    "one key head, wider than the model": lambda f: published(f, head_dim=16, num_key_value_heads=1, attention_bias=True),
    "experts in every second layer": lambda f: published(f, num_hidden_layers=4, decoder_sparse_step=2),
    "yarn": lambda f: published(
        f, "gpt_oss", **rope("yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                             original_max_position_embeddings=16),
    ),
    "longrope": lambda f: published(
        f, "phimoe", **rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, short_mscale=1.1, long_mscale=1.2,
                            original_max_position_embeddings=8, factor=8.0),
    ),
    "clipped projections": lambda f: published(f, "olmoe", clip_qkv=0.5),
    "multipliers": lambda f: published(
        f, "granitemoe", embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6.0, attention_multiplier=0.1
    ),
}  # fmt: skip


def _scaled(folder: Path) -> Path:
    base = published(folder)
    edit(base, without="rope_parameters", rope_theta=50000.0, rope_scaling={"type": "linear", "factor": 2.0})
    return base


def _changed(how: Callable[[Tensors], Tensors], **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base = published(folder, **options)
        change(base, how)
        return base

    return make


def _edited(without: str = "", made: dict[str, Any] | None = None, **values: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base = published(folder, **(made or {}))
        edit(base, without=without, **values)
        return base

    return make


MADE |= {
    "positions as they were written before": _scaled,
    "a fused layer beside one that is not": _changed(fuse_the_last_layer),
    "names without the model's prefix": _changed(lambda found: {n.removeprefix("model."): t for n, t in found.items()}),
    "buffers of early programs": _changed(with_old_buffers),
    "a router in float32": _changed(
        lambda found: {n: t.float() if "gate.weight" in n else t for n, t in found.items()}, dtype=BF16
    ),
    "an expert of another type": _changed(
        lambda found: {n: t.to(F16) if "experts.2." in n else t for n, t in found.items()}, dtype=BF16
    ),
    "everything in float64": _edited(made={"dtype": torch.float64}, dtype="float64"),
    "more layers than are asked for": _edited(made={"num_hidden_layers": 3}, num_hidden_layers=2),
    "no architectures": _edited(without="architectures"),
    "the architecture without a head": _edited(architectures=["Qwen3MoeModel"]),
}


@pytest.mark.parametrize("name", MADE)
def test_it_is_loaded_rewritten_trained_and_judged_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    base = MADE[name](tmp_path / "base")
    assert_as_transformers(base)
    plain = theirs(base)
    rewrite(base, tmp_path / "out")
    assert_same(theirs(tmp_path / "out"), plain)
    layers = require_moe_layers(plain)
    targets = {index: [0, layer.num_experts - 1] for index, layer in layers.items()}
    others = {index: list(range(1, layer.num_experts - 1)) for index, layer in layers.items()}
    state, _ = train_local(compress(load_full(base), targets, others), TEXT[None], learning_rate=1e-2)
    sums, _ = Evaluator(load_full(base), targets).losses(state, TEXT)
    changed = copy.deepcopy(plain)
    write_rows(changed, targets, state)
    assert any(not torch.equal(one, other) for one, other in zip(changed.parameters(), plain.parameters(), strict=True))
    ids = torch.from_numpy(TEXT.astype("int64"))
    with torch.no_grad():
        said = changed(input_ids=ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    wanted = -said.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))
    close = 1e-5 if plain.dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(sums, wanted.numpy(), rtol=close)
