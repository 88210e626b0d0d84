"""Many experts in one table: every token computes what its own merged model would."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.loading import load_full
from connito.errors import Invalid, NotFound
from connito.experts.arrow import arrow, variants
from connito.experts.compose import Part, Recipe, base_rows, layers_of, merge, state_of
from connito.experts.table import ExpertTable
from connito.moe.rows import write_rows

from tests.support.families import IDS, tiny_model
from tests.support.models import Sequences

pytestmark = pytest.mark.slow


def merged(tiny: Path, rows: Any) -> Any:
    model = load_full(tiny)
    write_rows(model, layers_of(rows), state_of(rows))
    return model


def said(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def test_a_mixed_batch_is_what_each_merged_model_says(
    tiny: Path, full: Any, parts: dict[str, Part], base: Any, sequences: Sequences
) -> None:
    both = merge([parts["recipes"], parts["logs"]], base, Recipe())
    table = ExpertTable(full)
    slots = [0, *(table.add(name, part.rows) for name, part in parts.items()), table.add("both", both)]
    ids = torch.from_numpy(sequences("recipes", 5, 61)[:, :-1].astype("int64"))
    table.token_slots = torch.tensor(slots).repeat_interleave(ids.shape[1])
    mixed = said(full, ids)
    alone = [load_full(tiny), *(merged(tiny, part.rows) for part in parts.values()), merged(tiny, both)]
    for row, model in enumerate(alone):
        torch.testing.assert_close(mixed[row], said(model, ids)[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(mixed[row].argmax(-1), said(model, ids)[row].argmax(-1))
    assert not torch.equal(mixed[1].argmax(-1), said(alone[0], ids)[1].argmax(-1))


def test_a_removed_expert_is_gone_and_its_slot_serves_another(full: Any, parts: dict[str, Part]) -> None:
    table = ExpertTable(full)
    slot = table.add("recipes", parts["recipes"].rows)
    table.add("logs", parts["logs"].rows)
    size = table.row_bytes()
    # What the rows themselves take, and nothing beside it.
    assert size == sum(row.nbytes for name in ("recipes", "logs") for row in parts[name].rows.values())
    layer = next(layer for layer in table._layers.values() if slot in layer.own)
    tensor = weakref.ref(layer.rows[layer.own[slot][min(layer.own[slot])]][1]["down_proj"])
    table.remove("recipes")
    gc.collect()
    assert tensor() is None
    assert table.row_bytes() == sum(row.nbytes for row in parts["logs"].rows.values())
    assert table.add("poems", parts["poems"].rows) == slot
    with pytest.raises(NotFound, match="is not loaded"):
        table.remove("recipes")
    with pytest.raises(Invalid, match="loaded already"):
        table.add("poems", parts["poems"].rows)


def test_tokens_choose_as_arrow_does(
    tiny: Path, full: Any, parts: dict[str, Part], base: Any, sequences: Sequences
) -> None:
    chosen = list(parts.values())
    table = ExpertTable(full)
    slot = table.add_choice("routed", chosen)
    ids = torch.from_numpy(sequences("logs", 2, 62)[:, :-1].astype("int64"))
    table.token_slots = torch.full((ids.numel(),), slot)
    origin = base_rows(load_full(tiny), chosen)
    with variants(load_full(tiny), chosen, origin, arrow(chosen, origin, top_k=1)) as routed:
        torch.testing.assert_close(said(full, ids), said(routed, ids), rtol=1e-5, atol=1e-5)
    table.remove("routed")
    assert table.row_bytes() == 0
    table.token_slots = None
    assert torch.equal(said(full, ids), said(load_full(tiny), ids))


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v2", "nemotron_h", "gemma4_text"])
def test_other_families_compute_the_same_in_a_table(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    table = ExpertTable(model)
    torch.testing.assert_close(said(model, IDS), said(plain, IDS), rtol=1e-5, atol=1e-5)
    index, layer = next(iter(table._layers.items()))
    rows = {
        (index, expert, name): torch.randn_like(getattr(layer.layer.experts, name)[expert]) * 0.3
        for expert in (0, 2)
        for name in layer.layer.parameters
    }
    table.token_slots = torch.tensor([0, table.add("expert", rows)]).repeat_interleave(IDS.shape[1])
    write_rows(plain, layers_of(rows), state_of(rows))
    mixed = said(model, IDS)
    torch.testing.assert_close(mixed[0], said(tiny_model(family), IDS)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], said(plain, IDS)[1], rtol=1e-4, atol=1e-4)
