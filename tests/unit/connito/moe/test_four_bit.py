"""Experts in four bits: every row comes back as the format says, and the model is the full one with those rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.description import build_manifest
from connito.base.loading import load_full, load_resident, load_resident_local
from connito.errors import Invalid
from connito.moe.footprint import SWITCHES, Workload, fit
from connito.moe.four_bit import FourBit, frozen_linear
from connito.moe.residency import ALL, FOUR_BIT, HELPERS
from connito.moe.resident import adapted_layers, compress, target_parameters
from connito.moe.training import train_local
from connito.workloads.predicting import predictor
from connito.workloads.rehearsal import config_of, rehearse

from tests.support.files import directory_reader
from tests.support.models import save_random
from tests.support.packed import dequantised

# The sixteen values of the format (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
RESIDENCIES = (ALL, FOUR_BIT, HELPERS)
SELECTION, HELP = {1: [1, 6], 2: [4]}, {1: [0], 2: [0, 7]}


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (3, 24), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids(), use_cache=False).logits
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(32, 16), (48, 24), (3, 5), (1, 1), (65, 1), (7, 129), (128, 320)])
def test_a_row_comes_back_as_the_nearest_of_sixteen_values_times_its_block_s_largest(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = FourBit(3, shape, dtype)
    for index, row in enumerate(rows):
        packed.put(index, row)
    for index, row in enumerate(rows):
        back = packed.row(index)
        assert (back.shape, back.dtype) == (row.shape, dtype)
        for start in range(0, row.numel(), 64):
            block, found = (x.reshape(-1)[start : start + 64].float() for x in (row, back))
            largest = block.abs().max()
            nearest = NF4[(block[:, None] / largest - NF4).abs().argmin(dim=1)] * largest
            # Scales are in eight bits themselves, as distances from the mean scale of the row.
            torch.testing.assert_close(found, nearest, rtol=0, atol=0.03 * float(row.abs().max()))
    blocks = -(-rows[0].numel() // 64)
    assert sum(buffer.nbytes for buffer in packed.buffers()) == 3 * (32 * blocks + blocks + 4 * -(-blocks // 256) + 4)


@pytest.mark.parametrize("routing", ["natural", "masked", "restricted"])
def test_the_model_is_the_full_one_with_unpacked_experts_to_the_bit(random_base: Path, routing: str) -> None:
    packed = compress(load_full(random_base), SELECTION, routing_mode=routing, residency=FOUR_BIT)
    reference = dequantised(load_full(random_base), packed, SELECTION)
    assert torch.equal(logits(packed), logits(reference))
    assert not torch.equal(logits(packed), logits(load_full(random_base)))


def test_gradients_reach_targets_below_through_unpacked_experts(random_base: Path) -> None:
    """Only the lower layer is adapted: all that its rows learn comes through the frozen experts above."""
    selection = {1: [0, 3, 5]}
    packed: Any = compress(load_full(random_base), selection, residency=FOUR_BIT)
    plain: Any = compress(dequantised(load_full(random_base), packed, selection), selection, residency=ALL)
    for model in (packed, plain):
        model(input_ids=ids(), labels=ids()).loss.backward()
    for name, parameter in target_parameters(packed).items():
        other = target_parameters(plain)[name].grad
        assert parameter.grad is not None
        assert other is not None
        assert parameter.grad.abs().max() > 0
        assert torch.equal(parameter.grad, other)
    assert all(p.grad is None for p in packed.parameters() if not p.requires_grad)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_and_its_gradient_are_those_of_the_unpacked_row(transposed: bool, biased: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    packed = FourBit(2, (24, 40), torch.float32)
    for index in range(2):
        packed.put(index, torch.randn(24, 40, generator=draw))
    wide, narrow = (24, 40) if transposed else (40, 24)
    bias = torch.randn(narrow, generator=draw) if biased else None
    x, y = (torch.randn(5, wide, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    weight = packed.row(1) if transposed else packed.row(1).T
    ours, plain = frozen_linear(x, packed, 1, bias, transposed), y @ weight + (0 if bias is None else bias)
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad(out.square().sum(), leaf)[0] for out, leaf in ((ours, x), (plain, y))]
    torch.testing.assert_close(*grads)


def test_no_unpacked_expert_is_kept_for_the_backward_pass(random_base: Path) -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    model: Any = compress(load_full(random_base), {1: [0]}, residency=FOUR_BIT)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shape = model.get_submodule("model.layers.2.mlp.experts").helper_down_proj.shape
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids(), labels=ids())
    assert kept
    # Activations need gradients, weights do not.
    weights = [t for t in kept if t.shape in (shape, shape[::-1]) and not t.requires_grad]
    assert not [tensor for tensor in weights if tensor.untyped_storage().data_ptr() not in own]


def test_the_first_layer_routes_every_token_as_the_full_model_does(random_base: Path) -> None:
    chosen: dict[str, torch.Tensor] = {}
    made = {
        residency: compress(load_full(random_base), SELECTION, HELP, residency=residency) for residency in RESIDENCIES
    }
    for name, model in {"full": load_full(random_base), **made}.items():
        router = model.get_submodule("model.layers.1.mlp.gate")
        router.register_forward_hook(lambda _m, _a, out, name=name: chosen.__setitem__(name, out[2]))
        logits(model)
    assert torch.equal(chosen["full"], chosen[FOUR_BIT])
    assert torch.equal(chosen["full"], chosen[ALL])
    assert not torch.equal(chosen["full"], chosen[HELPERS]), "the test needs a token whose expert is not a helper"


@pytest.mark.parametrize("layout", ["fused", "singly"])
@pytest.mark.parametrize("half", [False, True])
def test_every_way_of_loading_packs_the_same_rows_reading_them_one_at_a_time(
    random_base: Path, tmp_path: Path, layout: str, half: bool
) -> None:
    base = random_base if layout == "fused" else tmp_path / "single"
    if layout == "singly":
        load_full(random_base).save_pretrained(base)  # type: ignore[operator]
    manifest, disk, read = build_manifest(base), directory_reader(base), []

    def reader(entry: Any, start: int, length: int) -> bytes:
        read.append((entry.name, start, length))
        return disk(entry, start, length)

    reference = compress(load_full(base), SELECTION, residency=FOUR_BIT)
    for model in (
        load_resident(manifest, reader, SELECTION, residency=FOUR_BIT, half=half),
        load_resident_local(base, SELECTION, residency=FOUR_BIT, half=half),
    ):
        for (name, one), (other, two) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
            assert (name, True) == (other, torch.equal(one, two)), name
        assert half or torch.equal(logits(model), logits(reference))
    for layer, experts in manifest.experts().items():
        rows = {(r.file, r.start, r.length) for e in range(experts) for r in manifest.expert_rows(layer, e)}
        assert rows <= set(read), "experts are read row by row"


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", ["fused", "singly"])
def test_predicted_weights_are_what_is_held(
    tmp_path: Path, random_base: Path, residency: str, half: bool, layout: str
) -> None:
    base = random_base if layout == "fused" else tmp_path / "single"
    if layout == "singly":
        load_full(random_base).save_pretrained(base)  # type: ignore[operator]
    model = load_resident_local(base, SELECTION, HELP, half=half, residency=residency)
    need = rehearse(config_of(base), SELECTION, HELP, Workload(2, 16, half, residency=residency))
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert need.weights + need.buffers == sum(held.values())


def test_all_of_them_are_the_full_model_and_share_its_files(random_base: Path) -> None:
    model = load_resident_local(random_base, SELECTION, residency=ALL)
    torch.testing.assert_close(logits(model), logits(load_full(random_base)), rtol=0, atol=2e-6)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    spans = [tuple(int(end, 16) for end in entry[0].split("-")) for entry in mapped]
    for experts, _ in adapted_layers(model).values():
        bank = experts.helper_down_proj
        assert bank.shape[0] == 8
        assert any(start <= bank.data_ptr() < end for start, end in spans), "the bank lies in the file, without a copy"


def test_the_best_residency_that_fits_is_chosen(random_base: Path) -> None:
    predict, work = predictor(config_of(random_base), SELECTION, HELP), Workload(2, 16, residency=ALL)
    mine = tuple(switch for switch in SWITCHES if switch.field == "residency")
    needs = [predict(replace(work, residency=residency)).total for residency in RESIDENCIES]
    assert fit(predict, work, needs[0], "here", mine).residency == ALL
    assert fit(predict, work, needs[0] - 1, "here", mine).residency == FOUR_BIT
    assert fit(predict, work, min(needs), "here", mine).residency == RESIDENCIES[needs.index(min(needs))]
    with pytest.raises(Invalid, match=r"and here has .* free"):
        fit(predict, work, min(needs) - 1, "here", mine)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_moves_targets_alone_and_in_their_own_type(random_base: Path, bf16: bool) -> None:
    model = compress(load_full(random_base), SELECTION, residency=FOUR_BIT)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    start = {name: p.detach().clone() for name, p in target_parameters(model).items()}
    state, _ = train_local(model, torch.stack([ids(1), ids(2)]).numpy(), learning_rate=1e-2, bf16=bf16)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(state[name].dtype == start[name].dtype for name in start)
    assert all(not torch.equal(state[name], start[name]) for name in start)


def test_a_layer_whose_experts_are_all_trained_has_none_to_pack(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", num_experts=4)
    everything = {1: list(range(4)), 2: list(range(4))}
    packed = load_resident_local(base, everything, residency=FOUR_BIT)
    torch.testing.assert_close(logits(packed), logits(load_full(base)), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_packing_fetches_no_code_from_a_hub() -> None:
    """On processors with bfloat16 instructions the library loads a kernel through the package `kernels`, where that is there."""
    program = """
import sys, types
import torch
from connito.moe.four_bit import FourBit
hub = sys.modules["kernels"] = types.ModuleType("kernels")
hub.get_kernel = lambda *_, **__: print("fetched")
FourBit(1, (2, 64), torch.float32).put(0, torch.ones(2, 64))
print("bitsandbytes" in sys.modules, sys.modules["kernels"] is hub)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
