"""What is predicted from a configuration is what torch's allocator gives out, and advice that is followed works."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.pretrained import parse_config
from connito.errors import Invalid, NotFound
from connito.moe.footprint import SWITCHES, Workload, fit, lean
from connito.workloads.predicting import predictor
from connito.workloads.rehearsal import config_of, rehearse, rehearse_all, same_everywhere

from bench.memory import SHAPES, Shape, compare, experts_of, measure, work_of
from bench.memory import config_of as shape_config
from tests.support.families import FAMILIES, tiny_model

BY_NAME = {shape.name: shape for shape in SHAPES}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[::2], ids=lambda shape: shape.name)
def test_prediction_is_within_a_tenth_of_what_is_measured(shape: Shape) -> None:
    row = compare(shape)
    assert 0.9 <= row["ratio"] <= 1.1
    exact = ("weights", "buffers", "masters")
    assert [row["predicted"][part] for part in exact] == [row["measured"][part] for part in exact]


def test_parts_are_named(random_base: Path) -> None:
    need = rehearse(config_of(random_base), {1: [0], 2: [3]}, {1: [1], 2: [2]}, Workload(2, 32, micro_batch=1))
    assert all(value > 0 for name, value in need.to_json().items() if name != "masters"), need
    # Rows in float32 need no completion, and AdamW's moments are two bytes for each number of theirs, with their scales.
    assert need.masters == 0
    assert 0.5 <= need.moments / need.gradients < 0.55


@pytest.mark.parametrize(
    "broken",
    [
        {"num_key_value_heads": 3},
        {"num_experts_per_tok": 99},
        {"hidden_act": "nobody-knows"},
        {"rope_parameters": {"rope_type": "nobody-knows"}},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_computed_is_one_sentence(random_base: Path, broken: dict[str, Any]) -> None:
    document = json.loads((random_base / "config.json").read_text())
    data = json.dumps({**document, **broken}).encode()
    with pytest.raises(Invalid, match=r"config") as raised:
        rehearse(parse_config(data), {1: [0]}, {1: [1]}, Workload(1, 16))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_rehearsed(family: str) -> None:
    config = tiny_model(family).config
    first = min(same_everywhere(config, 1))
    need = rehearse(config, {first: [0]}, {first: [1]}, Workload(1, 8))
    assert need.weights > need.moments
    # Linear attention without its kernel takes most in a pass before the first step: there are no moments yet.
    assert need.moments > 0 or need.workspace > need.weights


def test_nothing_of_a_rehearsal_stays_behind(random_base: Path) -> None:
    from connito.base.loading import load_full

    before = load_full(random_base)(input_ids=torch.arange(8)[None], use_cache=False).logits
    for residency in ("all", "four-bit"):
        rehearse(config_of(random_base), {1: [0]}, {1: [1]}, Workload(2, 32, residency=residency, packed=True))
    after = load_full(random_base)(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert type(after) is torch.Tensor
    assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.setting)
def test_every_setting_that_is_advised_lowers_what_is_measured(switch: Any) -> None:
    shape = replace(BY_NAME["GQA, top 4 of 16"], config={"num_experts": 32, "moe_intermediate_size": 256})
    config = shape_config(shape)
    targets, helpers = experts_of(shape, config)
    work = Workload(4, 128, residency="all")
    predict = predictor(config, targets, helpers)
    better = switch.turn(work)
    limit = (predict(work).total + predict(better).total) // 2
    with pytest.raises(Invalid, match=r"here has .* free; set " + switch.setting + ", with which it needs"):
        _fit_by(switch, predict, work, limit)
    before, _ = measure(config, targets, helpers, work)
    after, _ = measure(config, targets, helpers, better)
    assert after <= limit < before


def _fit_by(switch: Any, predict: Any, work: Workload, limit: int) -> None:
    """Ask for advice where only one setting can help."""
    fit(
        lambda w: predict(w if w in (work, switch.turn(work)) else work),
        work,
        limit,
        "here",
    )


@pytest.mark.slow
def test_advice_of_several_settings_holds_when_all_are_followed() -> None:
    shape = BY_NAME["GQA, top 4 of 16"]
    config = shape_config(shape)
    targets, helpers = experts_of(shape, config)
    predict, work = predictor(config, targets, helpers), Workload(4, 128, residency="all")
    leanest, turned = lean(predict, work, 1)
    assert len(turned) > 1
    limit = predict(leanest).total
    chosen, turned = lean(predict, work, limit)
    total, _ = measure(config, targets, helpers, chosen)
    assert total <= 1.02 * limit < measure(config, targets, helpers, work)[0]


def test_a_folder_without_configuration_and_a_wrong_number_are_refused(tmp_path: Path, random_base: Path) -> None:
    with pytest.raises(NotFound, match=r"has no config\.json"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text((random_base / "config.json").read_text())
    assert same_everywhere(config_of(tmp_path), 2) == {1: [0, 1], 2: [0, 1]}
    with pytest.raises(Invalid, match="this model has 8; give --experts 1 to 8"):
        same_everywhere(config_of(tmp_path), 9)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    with pytest.raises(Invalid, match="nobody-knows"):
        config_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GQA, top 4 of 16", "checkpointing, four bits, MLA"])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_few_layers_stand_for_many(name: str, micro_batch: int) -> None:
    shape = replace(BY_NAME[name], config={**BY_NAME[name].config, "num_hidden_layers": 6})
    config, work = shape_config(shape), replace(work_of(shape), sequences=2, length=64, micro_batch=micro_batch)
    targets, helpers = experts_of(shape, config)
    # Not every layer has as many.
    targets[4] = targets[4][:1]
    quick, whole = (use(config, targets, helpers, work) for use in (rehearse, rehearse_all))
    assert abs(quick.total / whole.total - 1) < 0.03
    exact = ("weights", "buffers", "masters")
    assert [getattr(quick, part) for part in exact] == [getattr(whole, part) for part in exact]
