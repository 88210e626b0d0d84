"""What a training model makes of rows below its first adapted layer: kept from counting them, and not computed again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.loading import load_full, load_resident_local
from connito.moe.batches import mixed, separates
from connito.moe.engine import Engine
from connito.moe.prefix import Beginnings
from connito.moe.prepare import decoder_halves, prepare
from connito.moe.resident import compress
from connito.moe.routed import routed_tokens
from connito.moe.training import train_local

from tests.support.models import save_random

SELECTION = {2: [1, 6], 3: [4]}
CPU = torch.device("cpu")


LENGTH = 64


class Calls:
    """Rows of the text that went through each layer below the first adapted one; nobody else's passes are that long."""

    def __init__(self, model: Any) -> None:
        self.rows = [0 for _ in decoder_halves(model)[0]]
        layer: Any
        for place, layer in enumerate(decoder_halves(model)[0]):
            layer.self_attn.register_forward_hook(partial(self._count, place))

    def _count(self, place: int, _m: Any, _a: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.rows[place] += hidden.shape[0] if hidden.shape[1] == LENGTH else 0


def trained(
    model: Any, batches: Any, beginnings: Beginnings | None, *, bf16: bool = False, micro_batch: int = 0
) -> Any:
    if beginnings is not None:
        rows = batches.reshape(-1, batches.shape[-1])
        with mixed(CPU, bf16=bf16), beginnings.keep(rows):
            routed_tokens(model, SELECTION, rows)
    return train_local(model, batches, learning_rate=1e-3, bf16=bf16, micro_batch=micro_batch, beginnings=beginnings)[0]


@pytest.mark.parametrize("engine", [Engine(), Engine(checkpointing=True), Engine(offload_prefix=True)], ids=str)
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_training_ends_in_the_same_numbers_and_runs_the_layers_below_once(
    engine: Engine, micro_batch: int, tiny: Path, sequences: Any
) -> None:
    batches = sequences("logs", 6, 1).reshape(3, 2, -1)
    models = [prepare(compress(load_full(tiny), SELECTION, {2: [0]}), engine, CPU) for _ in range(2)]
    whole = trained(models[0], batches, None, micro_batch=micro_batch)
    beginnings = Beginnings(models[1], bf16=False)
    calls = Calls(models[1])
    again = trained(models[1], batches, beginnings, micro_batch=micro_batch)
    assert calls.rows == [6, 6], "each row once"
    for name, rows in whole.items():
        torch.testing.assert_close(again[name], rows, rtol=1e-4, atol=1e-6)
    # What is kept is of these rows: others, and these among others, run through everything.
    other = sequences("poems", 6, 2).reshape(3, 2, -1)
    other[0, 0] = batches[0, 0]
    states = [
        train_local(model, other, learning_rate=1e-3, beginnings=kept)[0]
        for model, kept in zip(models, (None, beginnings), strict=True)
    ]
    for name, rows in states[0].items():
        torch.testing.assert_close(states[1][name], rows, rtol=1e-3, atol=1e-5)
    assert calls.rows == [12, 12]


def test_weights_of_half_the_bits_too(tiny: Path, sequences: Any) -> None:
    files, batches = {path.name: path for path in tiny.iterdir()}, sequences("logs", 4, 1).reshape(2, 2, -1)
    states = []
    for keeps in (False, True):
        model = prepare(load_resident_local(files, SELECTION, {2: [0]}, half=True), Engine(), CPU)
        beginnings = Beginnings(model, bf16=True) if keeps else None
        states.append(trained(model, batches, beginnings, bf16=True))
    for name, rows in states[0].items():
        torch.testing.assert_close(states[1][name].float(), rows.float(), rtol=2e-2, atol=2e-3)


def test_layers_below_that_are_compiled_stay_so(tiny: Path, sequences: Any) -> None:
    model = compress(load_full(tiny), SELECTION)
    below = decoder_halves(model)[0]
    before = [layer.forward for layer in below]
    for layer, forward in zip(below, before, strict=True):
        layer.forward = forward
    trained(model, sequences("logs", 2, 1).reshape(1, 2, -1), Beginnings(model, bf16=False))
    assert [layer.__dict__.get("forward") for layer in below] == before


def test_a_model_in_which_the_shortcut_changes_something_is_trained_whole(tiny: Path, sequences: Any) -> None:
    """A layer above that hears what a layer below did, as in families that share keys."""
    model = compress(load_full(tiny), SELECTION)
    below, above = decoder_halves(model)
    heard: list[int] = []
    first: Any = below[0]
    first.self_attn.register_forward_hook(lambda *_: heard.append(1))

    def louder(_m: Any, _a: Any, out: Any) -> Any:
        gain = 2.0 if heard else 1.0
        heard.clear()
        return out * gain if isinstance(out, torch.Tensor) else (out[0] * gain, *out[1:])

    above[0].register_forward_hook(louder)
    beginnings, calls, rows = Beginnings(model, bf16=False), Calls(model), sequences("logs", 2, 1)
    trained(model, rows[None], beginnings)
    assert calls.rows == [4, 4], "counted, and trained on"


def test_nothing_lies_below_a_first_layer(tmp_path: Path, sequences: Any) -> None:
    model = compress(load_full(save_random(tmp_path / "base", mlp_only_layers=[])), {0: [1]})
    beginnings = Beginnings(model, bf16=False)
    batches = sequences("logs", 2, 1).reshape(1, 2, -1)
    with beginnings.keep(batches[0]):
        routed_tokens(model, {0: [1]}, batches[0])
    assert train_local(model, batches, learning_rate=1e-3, beginnings=beginnings)[1].steps == 1


def test_what_is_kept_does_not_hear_how_documents_are_told_apart(tiny: Path, sequences: Any) -> None:
    """Rows of one document each come first: the model is asked about more than one when they are counted."""
    kept, rows = compress(load_full(tiny), SELECTION), sequences("logs", 3, 1)
    beginnings = Beginnings(kept, bf16=False)
    with beginnings.keep(rows):
        routed_tokens(kept, SELECTION, rows)
    assert separates(kept)
    assert separates(compress(load_full(tiny), SELECTION)), "without anybody listening"
