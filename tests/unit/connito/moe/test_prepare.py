"""What a machine chooses leaves what is learned as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full, load_resident_local
from connito.errors import Invalid
from connito.moe.engine import Engine
from connito.moe.head import Head
from connito.moe.personal import Personal, PersonalRouters
from connito.moe.prepare import decoder_halves, prepare, share
from connito.moe.residency import ALL, FOUR_BIT
from connito.moe.resident import compress, target_parameters
from connito.moe.resident_forward import _has_kernels
from connito.moe.training import train_local

from tests.support.second_device import second_device

SELECTION, HELPERS = {2: [1, 6], 3: [4]}, {2: [0, 3], 3: []}
CPU = torch.device("cpu")


@pytest.fixture
def ids(sequences: Any) -> torch.Tensor:
    return torch.from_numpy(sequences("logs", 3, 1)).long()


def made(tiny: Path, engine: Engine, **options: Any) -> Any:
    return prepare(compress(load_full(tiny), SELECTION, HELPERS, **options), engine, CPU)


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    nll = Head(model).nll(ids[:, :-1], ids[:, 1:])
    nll.mean().backward()  # type: ignore[no-untyped-call]
    return nll.detach(), {name: p.grad for name, p in target_parameters(model).items() if p.grad is not None}


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps until the backward pass, each storage once, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Head(model).nll(ids[:, :-1], ids[:, 1:])
    return sum(kept.values())


def test_checkpointing_gives_the_same_gradients_and_keeps_less(tiny: Path, ids: torch.Tensor) -> None:
    plain, frugal = made(tiny, Engine()), made(tiny, Engine(checkpointing=True))
    (losses, wanted), (same, found) = gradients(plain, ids), gradients(frugal, ids)
    assert torch.equal(losses, same)
    assert wanted.keys() == found.keys() == target_parameters(plain).keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert kept_bytes(frugal, ids) < 0.5 * kept_bytes(plain, ids)


@pytest.mark.parametrize("shadowed", [False, True])
def test_training_with_checkpointing_is_training_without(tiny: Path, sequences: Any, shadowed: bool) -> None:
    """Under autocast, in several parts a step, with routers that learn beside the shipped ones: each layer runs twice."""
    table = sequences("logs", 20, 1)[np.random.default_rng(0).integers(20, size=(4, 4))]
    results = []
    for checkpointing in (False, True):
        model = made(tiny, Engine(checkpointing=checkpointing))
        shadow = PersonalRouters(model, Personal(5.0, 1.0)) if shadowed else None
        state, _ = train_local(model, table, learning_rate=1e-3, bf16=True, micro_batch=2, beside=shadow)
        results.append(state)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("helpers", [HELPERS, {}])
def test_grouped_products_are_those_of_the_loop(
    tiny: Path, ids: torch.Tensor, helpers: dict[int, list[int]], background: bool
) -> None:
    def model(experts: str) -> Any:
        rows = None
        if background:
            full = load_full(tiny)
            rows = {
                f"layers.{i}.{name}": getattr(full.get_submodule(f"model.layers.{i}.mlp.experts"), name)[7:]
                for i in SELECTION
                for name in ("gate_up_proj", "down_proj")
            }
        compressed = compress(load_full(tiny), SELECTION, helpers, background=rows)
        return prepare(compressed, Engine(experts=experts), CPU)

    (losses, wanted), (same, found) = gradients(model("loop"), ids), gradients(model("grouped"), ids)
    torch.testing.assert_close(losses, same, rtol=1e-5, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("residency", [ALL, FOUR_BIT])
def test_grouped_products_of_every_frozen_expert_are_those_of_the_loop(
    tiny: Path, ids: torch.Tensor, residency: str
) -> None:
    models = [
        prepare(load_resident_local(tiny, SELECTION, residency=residency), Engine(experts=experts), CPU)
        for experts in ("loop", "grouped")
    ]
    (losses, wanted), (same, found) = (gradients(model, ids) for model in models)
    torch.testing.assert_close(losses, same, rtol=1e-5, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_gpu_groups_products_of_bfloat16_alone(tiny: Path) -> None:
    model = compress(load_full(tiny), SELECTION, HELPERS)
    experts: Any = model.get_submodule("model.layers.2.mlp.experts")
    x = torch.zeros(1, experts.target_gate_up_proj.shape[-1])
    assert not _has_kernels(experts, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _has_kernels(experts, x)
    assert _has_kernels(model.to(torch.bfloat16).get_submodule("model.layers.2.mlp.experts"), x)


def test_grouped_products_train_in_bfloat16(tiny: Path, sequences: Any) -> None:
    table = sequences("logs", 4, 1)[None].repeat(8, axis=0)
    results = {}
    for experts in ("loop", "grouped"):
        model = prepare(load_resident_local(tiny, SELECTION, HELPERS, half=True), Engine(experts=experts), CPU)
        results[experts] = train_local(model, table, learning_rate=1e-3, bf16=True)[1]
    assert results["grouped"].last_loss < results["grouped"].first_loss
    assert results["grouped"].last_loss == pytest.approx(results["loop"].last_loss, abs=2e-3)


def test_nothing_is_learned_where_no_token_meets_a_target(tiny: Path) -> None:
    model = made(tiny, Engine(experts="grouped"))
    experts: Any = model.get_submodule("model.layers.2.mlp.experts")
    x = torch.randn(5, model.config.hidden_size, requires_grad=True)
    absent = torch.full((5, 2), 7)
    out = experts(x, absent, torch.ones(5, 2))
    assert not out.any()
    assert out.shape == x.shape


def test_an_offloaded_prefix_changes_nothing_and_goes_home(tiny: Path, ids: torch.Tensor) -> None:
    plain, guest = made(tiny, Engine()), made(tiny, Engine(offload_prefix=True))
    below, above = decoder_halves(guest)
    assert (len(below), len(above)) == (2, 2)
    homes = {name: p.data_ptr() for layer in below for name, p in layer.named_parameters()}
    (losses, wanted), (same, found) = gradients(plain, ids), gradients(guest, ids)
    assert torch.equal(losses, same)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert homes == {name: p.data_ptr() for layer in below for name, p in layer.named_parameters()}


def test_an_offloaded_prefix_visits_the_device_only_to_run(tiny: Path) -> None:
    """The device without memory stands for a GPU: what lies there, and when, is the same."""
    full: Any = load_full(tiny)
    full.lm_head.weight = torch.nn.Parameter(full.lm_head.weight.detach().clone(), requires_grad=False)
    model = prepare(compress(full, SELECTION, HELPERS), Engine(offload_prefix=True), torch.device("meta"))
    below, above = decoder_halves(model)
    embedding: Any = model.get_submodule("model.embed_tokens")
    assert embedding.weight.device.type == "cpu"
    assert embedding(torch.zeros(1, 2, dtype=torch.long)).device.type == "meta"
    assert full.lm_head.weight.device.type == "meta"
    seen: list[str] = []
    guest: Any = below[0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(next(guest.parameters()).device.type)
        return x

    guest.forward = forward
    guest(torch.zeros(1, device="meta"))
    assert seen == ["meta"]
    assert {p.device.type for layer in below for p in layer.parameters()} == {"cpu"}
    assert {p.device.type for layer in above for p in layer.parameters()} == {"meta"}


def test_several_devices_share_the_layers(tiny: Path) -> None:
    assert share([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert share([6, 1, 1, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1, 1, 1]
    assert share([5, 5], 3) == [0, 2]
    model = prepare(compress(load_full(tiny), SELECTION, HELPERS), Engine(devices=("cpu", "meta")), CPU)
    below, above = decoder_halves(model)
    assert {p.device.type for layer in below for p in layer.parameters()} == {"cpu"}
    assert {p.device.type for layer in above for p in layer.parameters()} == {"meta"}
    embedding: Any = model.get_submodule("model.embed_tokens")
    assert embedding.weight.device.type == "cpu"


def test_one_device_named_twice_is_one_device(tiny: Path, ids: torch.Tensor) -> None:
    losses, wanted = gradients(made(tiny, Engine()), ids)
    same, found = gradients(made(tiny, Engine(devices=("cpu", "cpu"))), ids)
    assert torch.equal(losses, same)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(
    "engine",
    [
        Engine(experts="loop", offload_prefix=True),
        Engine(experts="grouped", checkpointing=True),
        Engine(experts="loop", devices=("cuda", "cpu")),
        Engine(experts="grouped", devices=("cpu", "cuda"), checkpointing=True),
        Engine(experts="loop", devices=("cpu", "cuda"), offload_prefix=True),
    ],
)
def test_training_where_tensors_of_two_devices_would_meet(
    tiny: Path, sequences: Any, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    """On a stand-in for a second device: what is not brought to where it is used raises, as on a real one."""
    table = sequences("logs", 8, 1)[np.random.default_rng(0).integers(8, size=(3, 2))]
    full: Any = load_full(tiny)
    full.lm_head.weight = torch.nn.Parameter(full.lm_head.weight.detach().clone(), requires_grad=False)
    wanted, _ = train_local(compress(copy.deepcopy(full), SELECTION, HELPERS), table, learning_rate=1e-3)
    with second_device(monkeypatch) as other:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        model = prepare(compress(full, SELECTION, HELPERS), engine, torch.device("cuda"))
        found, _ = train_local(model, table, learning_rate=1e-3)
        assert {tensor.device.type for tensor in found.values()} == {"cpu"}
        assert other.calls > 100
    for name, rows in wanted.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-5, atol=1e-6 if engine.experts == "loop" else 2e-4)


def test_attention_kernels_agree_and_an_absent_one_is_refused(tiny: Path, ids: torch.Tensor) -> None:
    usual, eager = made(tiny, Engine()), made(tiny, Engine(attention="eager"))
    assert usual.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    (losses, _), (same, _) = gradients(usual, ids), gradients(eager, ids)
    torch.testing.assert_close(losses, same, rtol=1e-5, atol=1e-5)
    with pytest.raises(Invalid, match="leave CONNITO_ATTENTION empty"):
        made(tiny, Engine(attention="flash_attention_2"))


def test_every_layer_is_compiled_inside_of_what_runs_it_again(
    tiny: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that only counts stands in: the real one takes minutes on a processor."""
    runs: list[Any] = []

    def compiled(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs.append(forward)
            return forward(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    losses, wanted = gradients(made(tiny, Engine()), ids)
    same, found = gradients(made(tiny, Engine(compile=True, checkpointing=True)), ids)
    assert torch.equal(losses, same)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert len(set(runs)) == 4
    # Measuring the head takes two passes over all four layers; the two upper ones then run once more for the backward pass.
    assert len(runs) == 2 * 4 + 4 + 2
