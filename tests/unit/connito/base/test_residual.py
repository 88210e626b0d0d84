"""Residual experts: the dense function at the start, DeepSpeed's layer by its formula, and experts that can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.recipes import Recipe, build_base
from connito.base.residual import as_residual
from connito.base.tiny import tokenizer
from connito.base.upcycle import upcycle
from connito.errors import Invalid
from connito.moe.layout import require_moe_layers
from connito.runtime.progress import silent
from torch.nn import functional as F

from tests.unit.connito.base.test_upcycle import HELD, dense, texts


def upcycled(kind: str = "llama", top_k: int = 1) -> Any:
    return upcycle(dense(kind), texts(), HELD, moe_layers=2, experts=4, top_k=top_k).model


@pytest.mark.parametrize(("kind", "top_k"), [("llama", 1), ("qwen2", 4)])
def test_it_starts_as_the_dense_model_and_transformers_reads_it_so(kind: str, top_k: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made: Any = as_residual(upcycled(kind, top_k))
    with torch.no_grad():
        want, ours = dense(kind)(input_ids=HELD).logits, made(input_ids=HELD).logits
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)
    save_checkpoint(made, tmp_path / "base", tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", experts_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=HELD).logits, ours)


def test_a_layer_is_the_dense_mlp_and_the_scored_correction() -> None:
    """MLP(x) + p·E(x): written out token by token, on experts that say something."""
    model: Any = as_residual(upcycled())
    layer: Any = require_moe_layers(model)[2]
    draw = torch.Generator().manual_seed(3)
    bank = layer.experts.down_proj
    bank.data = torch.randn(bank.shape, generator=draw)
    source: Any = dense().model.layers[2].mlp
    x = torch.randn(6, 32, generator=draw)
    with torch.no_grad():
        found = layer.block(x[None])
        found = (found[0] if isinstance(found, tuple) else found).reshape(6, 32)
        scores = (x @ layer.router.weight.T).softmax(-1)
        for row, score, out in zip(x, scores, found, strict=True):
            expert = int(score.argmax())
            gate, up = (layer.experts.gate_up_proj[expert] @ row).chunk(2)
            want = source(row[None])[0] + score[expert] * (bank[expert] @ (F.silu(gate) * up))
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_corrections_learn_though_they_start_without_output() -> None:
    model: Any = as_residual(upcycled())
    experts: list[Any] = [layer.experts for layer in require_moe_layers(model).values()]
    banks = [each.down_proj.requires_grad_(True) for each in experts]
    before = model(input_ids=HELD, labels=HELD).loss
    before.backward()
    assert all(float(bank.grad.abs().max()) > 0 for bank in banks)
    with torch.no_grad():
        for bank in banks:
            bank -= 0.5 * bank.grad
        assert model(input_ids=HELD, labels=HELD).loss < before


def test_experts_that_differ_are_no_copies_of_one_mlp() -> None:
    model: Any = upcycled()
    experts: Any = require_moe_layers(model)[1].experts
    experts.down_proj.data[0] += 1
    with pytest.raises(Invalid, match="layer 1 differ"):
        as_residual(model)


@pytest.mark.parametrize("recipe", [Recipe("tiny", residual=True), Recipe("x", branches=(("a", "b"),), residual=True)])
def test_only_a_dense_model_is_given_corrections(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="--residual is for a dense model"):
        build_base(recipe, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
