"""Experts with router rows of their own: opted in and out, in any order, without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.loading import load_full, load_tokenizer
from connito.errors import Invalid, NotFound
from connito.experts.flex import Addition, opt_in, opt_out
from connito.moe.layout import find_moe_layers
from connito.moe.rows import fingerprint
from transformers import AutoModelForCausalLM

from tests.support.models import Sequences


@pytest.fixture
def additions(full: Any) -> list[Addition]:
    def make(seed: int) -> Addition:
        generator = torch.Generator().manual_seed(seed)
        rows = {}
        layer: Any
        for index, layer in find_moe_layers(full).items():
            rows[index] = {
                name: 0.1 * torch.randn(getattr(layer.experts, name).shape[1:], generator=generator)
                for name in layer.parameters
            } | {"router.weight": layer.router.weight[seed] + 0.1 * torch.randn(64, generator=generator)}
        return Addition(f"owner-{seed}", rows)

    return [make(seed) for seed in range(3)]


def logits(model: Any, sequences: Callable[..., Any]) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.from_numpy(sequences("logs", 2, 60)[:, :-1].astype("int64"))
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def test_no_addition_is_the_anchor(full: Any) -> None:
    before = fingerprint(full)
    assert opt_in(full, []) == {}
    assert fingerprint(full) == before


def test_the_order_of_opting_in_makes_no_difference(
    full: Any, tiny: Path, additions: list[Addition], sequences: Sequences
) -> None:
    other = load_full(tiny)
    ids, same = opt_in(full, additions), opt_in(other, additions[::-1])
    assert ids == same
    assert fingerprint(full) == fingerprint(other)
    assert full.config.num_experts == 11
    assert torch.equal(logits(full, sequences), logits(other, sequences))


def test_opting_everyone_out_is_the_anchor_bit_for_bit(
    full: Any, additions: list[Addition], sequences: Sequences
) -> None:
    before, plain = fingerprint(full), logits(full, sequences)
    ids = opt_in(full, additions)
    assert not torch.equal(logits(full, sequences), plain)
    opt_out(full, ids, [addition.name for addition in additions])
    assert fingerprint(full) == before
    assert torch.equal(logits(full, sequences), plain)
    assert full.config.num_experts == 8


def test_opting_one_out_is_as_if_it_had_never_come(full: Any, tiny: Path, additions: list[Addition]) -> None:
    ids = opt_in(full, additions)
    opt_out(full, ids, [additions[1].name])
    other = load_full(tiny)
    opt_in(other, [additions[0], additions[2]])
    assert fingerprint(full) == fingerprint(other)


def test_the_anchors_own_experts_stay_as_they_are(full: Any, additions: list[Addition]) -> None:
    before = fingerprint(full)
    opt_in(full, additions)
    after = fingerprint(full)
    assert all(after[name] == digest for name, digest in before.items() if name.endswith("]"))
    assert sorted(name for name in before if after.get(name) != before[name]) == sorted(
        f"{layer.router_name}.weight" for layer in find_moe_layers(full).values()
    )


def test_the_joined_model_loads_in_stock_transformers(
    full: Any, tiny: Path, additions: list[Addition], tmp_path: Path, sequences: Sequences
) -> None:
    from connito.base.checkpoint import save_checkpoint

    opt_in(full, additions)
    save_checkpoint(full, tmp_path / "joined", load_tokenizer(tiny))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "joined").eval()
    torch.testing.assert_close(logits(model, sequences), logits(full, sequences), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_before_any_change(full: Any, additions: list[Addition]) -> None:
    before = fingerprint(full)
    short = Addition("short", {2: additions[0].rows[2]})
    bare = Addition(
        "bare",
        {i: {k: v for k, v in rows.items() if not k.startswith("router")} for i, rows in additions[0].rows.items()},
    )
    for bad in ([short], [bare], [additions[0], additions[0]]):
        with pytest.raises(Invalid):
            opt_in(full, bad)
    with pytest.raises(NotFound):
        opt_out(full, {}, ["nobody"])
    assert fingerprint(full) == before
