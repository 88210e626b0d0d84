"""The training model: exact parity with every helper there, only target rows trainable, and nothing else in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.description import build_manifest
from connito.base.loading import load_full, load_resident, load_resident_local
from connito.errors import Invalid, VerificationFailed
from connito.moe.resident import compress, read_targets, target_parameters, write_targets
from connito.moe.rows import read_rows

from tests.support.files import directory_reader

SELECTION = {2: [6, 1], 3: [4]}
COMPLEMENT = {layer: [e for e in range(8) if e not in experts] for layer, experts in SELECTION.items()}


def logits(model: Any, table: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.from_numpy(table).long()).logits
    return out


def test_natural_routing_with_every_other_expert_as_helper_is_the_full_model(
    tiny: Path, full: Any, sequences: Any
) -> None:
    text = sequences("logs", 4, 1)
    compressed = logits(compress(load_full(tiny), SELECTION, COMPLEMENT), text)
    # Experts are added up in another order, which some processors round otherwise.
    torch.testing.assert_close(compressed, logits(full, text), rtol=0, atol=2e-5)


def test_only_target_rows_can_be_trained_and_get_gradients(tiny: Path, sequences: Any) -> None:
    model: Any = compress(load_full(tiny), SELECTION, {2: [0], 3: [1]})
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in target_parameters(model).values()}
    text = torch.from_numpy(sequences("poems", 6, 1)).long()
    model(input_ids=text, labels=text).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_absent_banks_are_gone(tiny: Path) -> None:
    model = load_full(tiny)
    bank = model.get_submodule("model.layers.2.mlp.experts").gate_up_proj
    compress(model, SELECTION, {2: [0]})
    holders = [r for r in gc.get_referrers(bank) if isinstance(r, dict)]
    assert not holders, "the full bank is still part of some module"
    resident = model.get_submodule("model.layers.2.mlp.experts")
    assert resident.target_gate_up_proj.shape[0] == 2  # type: ignore[index]
    assert resident.helper_gate_up_proj.shape[0] == 1  # type: ignore[index]


@pytest.mark.parametrize("mode", ["natural", "masked", "restricted"])
def test_routing_modes_without_helpers_stay_finite_and_differ_as_defined(
    tiny: Path, full: Any, sequences: Any, mode: str
) -> None:
    text = sequences("recipes", 2, 1)
    model = compress(load_full(tiny), SELECTION, {}, mode)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    router = model.get_submodule("model.layers.2.mlp.gate")
    router.register_forward_hook(lambda _m, _a, out: seen.append((out[1], out[2])))
    assert torch.isfinite(logits(model, text)).all()
    weights, ids = seen[0]
    natural: list[tuple[torch.Tensor, torch.Tensor]] = []
    full.get_submodule("model.layers.2.mlp.gate").register_forward_hook(
        lambda _m, _a, out: natural.append((out[1], out[2]))
    )
    logits(full, text)
    resident = torch.isin(natural[0][1], torch.tensor(SELECTION[2]))
    if mode == "natural":
        assert torch.equal(ids, torch.where(resident, natural[0][1], 8))
        assert torch.equal(weights, torch.where(resident, natural[0][0], 0))
    else:
        assert torch.isin(ids, torch.tensor(SELECTION[2])).all()
        total = weights.sum(dim=-1)
        assert torch.allclose(total, torch.ones_like(total)), "this family normalises its gates, whatever may be chosen"


def test_an_absent_expert_s_weight_goes_to_the_best_scoring_helper(tiny: Path, full: Any, sequences: Any) -> None:
    text = sequences("ledgers", 2, 1)
    seen: list[Any] = []
    natural: list[Any] = []
    model = compress(load_full(tiny), SELECTION, {2: [3, 5]})
    model.get_submodule("model.layers.2.mlp.gate").register_forward_hook(lambda _m, _a, out: seen.append(out))
    full.get_submodule("model.layers.2.mlp.gate").register_forward_hook(lambda _m, _a, out: natural.append(out))
    logits(model, text), logits(full, text)
    scores, weights, ids = natural[0]
    here = torch.isin(ids, torch.tensor([1, 6, 3, 5]))
    best = torch.where(scores[:, 3] >= scores[:, 5], 3, 5)[:, None]
    assert torch.equal(seen[0][2], torch.where(here, ids, best))
    assert torch.equal(seen[0][1], weights)
    assert not here.all(), "the test needs a token whose expert is absent"


def test_ranged_and_local_loading_give_the_compressed_full_model(tiny: Path, sequences: Any) -> None:
    text = sequences("logs", 2, 1)
    helpers = {2: [0, 7], 3: []}
    reference = compress(load_full(tiny), SELECTION, helpers)
    manifest = build_manifest(tiny)
    read: list[tuple[str, int, int]] = []
    disk = directory_reader(tiny)

    def reader(entry: Any, start: int, length: int) -> bytes:
        read.append((entry.name, start, length))
        return disk(entry, start, length)

    ranged = load_resident(manifest, reader, SELECTION, helpers)
    for model in (ranged, load_resident_local(tiny, SELECTION, helpers)):
        assert torch.equal(logits(model, text), logits(reference, text))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            n for n, p in reference.named_parameters() if p.requires_grad
        ]
    absent = {r.start for e in range(8) if e not in (1, 6, 0, 7) for r in manifest.expert_rows(2, e)}
    assert not absent & {start for _, start, _ in read}, "an absent expert's bytes were fetched"
    fetched = sum(length for name, _, length in read if name.endswith(".safetensors"))
    assert fetched == manifest.size - (4 + 7) * manifest.expert_bytes()[2]


def test_damaged_ranges_are_noticed(tiny: Path) -> None:
    disk = directory_reader(tiny)

    def damaged(entry: Any, start: int, length: int) -> bytes:
        data = bytearray(disk(entry, start, length))
        if entry.name.endswith(".safetensors"):
            data[0] ^= 1
        return bytes(data)

    with pytest.raises(VerificationFailed, match="other bytes"):
        load_resident(build_manifest(tiny), damaged, SELECTION)


def test_states_go_in_and_come_out(tiny: Path, full: Any) -> None:
    model = compress(load_full(tiny), SELECTION)
    rows = read_rows(full, SELECTION)
    assert list(rows) == sorted(rows)
    assert all(torch.equal(read_targets(model)[name], rows[name]) for name in rows)
    changed = {name: value + 1 for name, value in rows.items()}
    write_targets(model, changed)
    assert all(torch.equal(read_targets(model)[name], changed[name]) for name in rows)
    with pytest.raises(Invalid, match="not in both"):
        write_targets(model, {})
    with pytest.raises(Invalid, match="shape"):
        write_targets(model, {name: value[:1] for name, value in rows.items()})


@pytest.mark.parametrize(
    ("selection", "helpers", "mode", "says"),
    [
        (SELECTION, {}, "best", "unknown routing mode"),
        ({}, {}, "natural", "empty"),
        ({0: [1]}, {}, "natural", "another base"),
        ({2: [8]}, {}, "natural", "another base"),
        (SELECTION, {2: [1]}, "natural", "not targets"),
        (SELECTION, {2: [9]}, "natural", "not targets"),
    ],
)
def test_what_does_not_fit_is_refused(full: Any, selection: Any, helpers: Any, mode: str, says: str) -> None:
    with pytest.raises(Invalid, match=says):
        compress(full, selection, helpers, mode)


def test_compressing_twice_is_refused(tiny: Path) -> None:
    model = compress(load_full(tiny), SELECTION)
    with pytest.raises(Invalid):
        compress(model, SELECTION)
