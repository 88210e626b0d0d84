"""What is trained beside a run on a bfloat16 model: steps far below what bfloat16 tells apart add up as in float32."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.branches import train_routers
from connito.experts.flex import NewRows
from connito.experts.tuning import distil
from connito.moe.layout import require_moe_layers

from tests.support.families import IDS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

# Half of the distance between bfloat16 numbers about 0.5 is ten times as much.
RATE, STEPS = 1e-4, 24
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]
TEXT = torch.cat([IDS, IDS[:, :1]], dim=1).numpy().astype("int32")


def banks(model: Any) -> list[Any]:
    return [layer.experts for layer in require_moe_layers(model).values()]


def routers(model: Any) -> None:
    train_routers(model, {"one": IDS}, STEPS, learning_rate=RATE)


def rows(model: Any) -> None:
    new = NewRows(require_moe_layers(model))
    new.open()
    for step in range(STEPS):
        new.begin(step, STEPS)
        loss: Any = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        new.step(RATE)


def experts(model: Any) -> None:
    teacher = copy.deepcopy(model)
    for bank in banks(teacher):
        bank.down_proj.data *= 1.5
    distil(model, teacher, np.concatenate([TEXT, TEXT]), STEPS, rate=RATE)


def trained(model: Any, what: str) -> list[torch.Tensor]:
    routers: list[Any] = [layer.router for layer in require_moe_layers(model).values()]
    wanted = [bank.down_proj for bank in banks(model)] if what == "experts" else [router.weight for router in routers]
    return [tensor.detach().float() for tensor in wanted]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [routers, rows, experts], ids=lambda way: way.__name__)
def test_small_steps_add_up(way: Any, family: str) -> None:
    model = tiny_model(family, buffers=True).bfloat16()
    exact = copy.deepcopy(model).float()
    before = trained(copy.deepcopy(model), way.__name__)
    way(model)
    way(exact)
    moved, wanted = (
        torch.cat([(now - was).flatten() for now, was in zip(trained(each, way.__name__), before, strict=True)])
        for each in (model, exact)
    )
    large = torch.cat([was.flatten().abs() for was in before]) > 0.25
    learnt = large & (wanted.abs() > RATE * STEPS / 2)
    assert learnt.any(), "nothing learnt: the test shows nothing"
    assert (moved[learnt] != 0).float().mean() > 0.5
    assert float(torch.dot(moved[learnt], wanted[learnt]) / wanted[learnt].square().sum()) > 0.7
