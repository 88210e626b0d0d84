"""What the library's verbs write from bases of odd shapes: transformers reads it as we do, and the record says what is so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.loading import load_full, load_tokenizer
from connito.base.tiny import tiny_texts, tokenizer
from connito.curation import growing, shrinking
from connito.curation.texts import cut_sequences, halves
from connito.experts.measure import loss
from connito.moe.layout import require_moe_layers

from tests.outside.test_routing_laws import COUNTS, PER_TOKEN
from tests.support.families import logits, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Shape = tuple[str, int, int, torch.dtype, dict[str, Any]]
SHAPES: dict[str, Shape] = {
    "one layer, every expert for every token": ("mixtral", 5, 5, torch.float32, {"num_hidden_layers": 1}),
    "bfloat16, tied, one expert a token": ("qwen3_moe", 5, 1, torch.bfloat16, {"tie_word_embeddings": True}),
    "seven experts and two shared": ("deepseek_v2", 7, 3, torch.float32, {"n_shared_experts": 2}),
    "biases in experts and routers": ("gpt_oss", 3, 2, torch.bfloat16, {}),
}


@pytest.fixture(scope="module", params=SHAPES)
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, experts, top_k, dtype, changes = SHAPES[request.param]
    sizes = dict.fromkeys(COUNTS, experts) | dict.fromkeys(PER_TOKEN, top_k)
    words = tokenizer()
    model = tiny_model(family, buffers=True, vocab_size=len(words), max_position_embeddings=256, **sizes, **changes)
    return save_checkpoint(model.to(dtype), tmp_path_factory.mktemp("base") / "base", words)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for domain in ("logs", "recipes"):
        (folder / f"{domain}.txt").write_text("\n\n".join(tiny_texts(domain, 1, 12)))
    return {domain: folder / f"{domain}.txt" for domain in ("logs", "recipes")}


def same_in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    assert torch.equal(logits(model), logits(load_full(folder)))
    return model


def shrunk(base: Path, texts: dict[str, Path], verb: Callable[..., Any], out: Path, options: Any) -> tuple[Any, Any]:
    return verb(shrinking.ShrinkSource(base, (texts["logs"],)), out, options), same_in_transformers(out)


def test_full_is_the_base_before_anything_is_trained(base: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    options = shrinking.PruneOptions("task", steps=5)
    record, small = shrunk(base, texts, shrinking.prune, tmp_path / "out", options)
    held = halves(cut_sequences(load_tokenizer(base), (texts["logs"],)))[1]
    assert record["measured"]["full"] == pytest.approx(loss(load_full(base), held), abs=1e-4)
    assert record["measured"]["pruned"] == pytest.approx(loss(load_full(tmp_path / "out"), held), abs=1e-3)
    assert {layer.num_experts for layer in require_moe_layers(small).values()} == {1}


def test_a_subset_is_extracted_and_a_budget_kept(base: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    layers = len(require_moe_layers(load_full(base)))
    record, _ = shrunk(base, texts, shrinking.extract, tmp_path / "some", shrinking.ExtractOptions(9.0, 2, True))
    assert sum(map(len, record["experts"].values())) == 2 * layers
    _, small = shrunk(base, texts, shrinking.prune, tmp_path / "few", shrinking.PruneOptions("naee", 2 * layers))
    assert sum(layer.num_experts for layer in require_moe_layers(small).values()) >= 2 * layers


def test_additions_join_and_routers_learn(base: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    files = []
    for name, path in texts.items():
        options = growing.GrowOptions((path,), (texts["logs"],), steps=2)
        growing.grow(name, base, tmp_path / f"{name}.safetensors", options)
        files.append(tmp_path / f"{name}.safetensors")
    growing.join(files, base, tmp_path / "joined", texts=texts, router_steps=2)
    own = next(iter(require_moe_layers(load_full(base)).values())).num_experts
    joined = require_moe_layers(same_in_transformers(tmp_path / "joined"))
    assert {layer.num_experts for layer in joined.values()} == {own + 2}
