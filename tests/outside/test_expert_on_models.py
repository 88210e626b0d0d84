"""An expert goes into the base as people load it: by transformers, placed, compiled, in the type the base says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import connito
import pytest
import torch
from connito.base.loading import load_full
from connito.errors import Invalid
from connito.library.artifact import ExpertHeader, write_expert
from connito.moe.rows import base_digests, fingerprint, read_rows
from connito.moe.state import save_state

from tests.support.checkpoints import edit, published, theirs
from tests.support.families import logits

LAYERS = {1: [0, 2]}


@pytest.fixture(scope="module", params=["plain", "float32 under bfloat16", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "tied"
    folder = published(tmp_path_factory.mktemp("base"), "deepseek_v3", tie_word_embeddings=tied)
    if request.param == "float32 under bfloat16":
        edit(folder, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def expert(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert for the base as a run holds it."""
    folder, model = tmp_path_factory.mktemp("expert"), load_full(base)
    digests = base_digests(model, LAYERS)
    save_state({name: rows + 0.25 for name, rows in read_rows(model, LAYERS).items()}, folder / "state.safetensors")
    header = ExpertHeader("medical", "ours", "b" * 64, LAYERS, "run-1", 1, digests.rest, digests.rows)
    write_expert(folder / "state.safetensors", folder / "expert.safetensors", header)
    return folder / "expert.safetensors"


def saved_again(folder: Path) -> Any:
    theirs(folder).save_pretrained(folder / "again")
    return theirs(folder / "again")


MODELS: dict[str, Callable[[Path], Any]] = {
    "ours": load_full,
    "theirs": theirs,
    "placed": lambda folder: theirs(folder, device_map="auto"),
    "placed on one": lambda folder: theirs(folder, device_map={"": "cpu"}),
    "compiled": lambda folder: torch.compile(theirs(folder), backend="eager"),
    "compiled in place": lambda folder: (model := theirs(folder)).compile(backend="eager") or model,
    "saved again": saved_again,
    "in one type by name": lambda folder: theirs(folder, dtype=load_full(folder).dtype),
}


@pytest.mark.parametrize("how", MODELS)
def test_an_expert_goes_in_and_out(base: Path, expert: Path, how: str) -> None:
    model = MODELS[how](base)
    reference = load_full(base)
    connito.load_expert(reference, expert)
    plain = logits(model)
    loaded = connito.load_expert(model, expert)
    assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), plain)
    loaded.remove()
    assert torch.equal(logits(model), plain)


def test_another_model_is_told_apart(base: Path, expert: Path) -> None:
    model = theirs(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    before = fingerprint(model)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(Invalid, match="is not ours, the base of the expert"):
        connito.load_expert(compiled, expert)
    assert fingerprint(model) == before


def test_a_model_that_is_partly_on_disk(base: Path, expert: Path) -> None:
    model = theirs(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
    with pytest.raises(Invalid, match="are on disk"):
        connito.load_expert(model, expert)
