"""What a policy or a miner may choose in training: each does what it says and leaves the rest as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full, load_resident_local
from connito.errors import Invalid
from connito.moe.background import background, weights_of
from connito.moe.moments import Moments
from connito.moe.resident import adapted_layers, add_background, compress, read_targets
from connito.moe.rows import fingerprint
from connito.moe.schedule import Schedule
from connito.moe.statistics import collect
from connito.moe.training import betas_of, train_local
from connito.v1.run_pb2 import TrainPolicy

SELECTION, HELPERS = {2: [1, 6], 3: [4]}, {2: [0], 3: [0]}


def batches(table: Any, steps: int, size: int, seed: int = 0) -> Any:
    return table[np.random.default_rng(seed).integers(len(table), size=(steps, size))]


def train(tiny: Path, table: Any, steps: int = 4, **options: Any) -> Any:
    model = compress(load_full(tiny), SELECTION, HELPERS)
    return train_local(model, batches(table, steps, 4), learning_rate=1e-3, **options)[0]


def distance(one: Any, other: Any) -> float:
    return float(torch.sqrt(sum((one[name].float() - other[name].float()).square().sum() for name in one)))


def test_gradient_accumulation_is_the_same_step(tiny: Path, sequences: Any) -> None:
    table = sequences("logs", 20, 1)
    whole = train(tiny, table, micro_batch=0)
    for size in (1, 3):
        parts = train(tiny, table, micro_batch=size)
        moved = distance(whole, read_targets(compress(load_full(tiny), SELECTION, HELPERS)))
        assert distance(whole, parts) < 1e-3 * moved


def test_two_cycles_with_kept_moments_are_one_run_of_adamw(tiny: Path, sequences: Any, tmp_path: Path) -> None:
    text = batches(sequences("logs", 20, 1), 6, 2)
    model = compress(load_full(tiny), SELECTION, HELPERS)
    at_once, _ = train_local(compress(load_full(tiny), SELECTION, HELPERS), text, learning_rate=1e-3)
    moments = Moments()
    train_local(model, text[:3], learning_rate=1e-3, moments=moments)
    moments.save(tmp_path / "moments.safetensors", {"cycle": "1"})
    again = Moments.load(tmp_path / "moments.safetensors")
    assert again.steps == 3
    in_two, _ = train_local(model, text[3:], learning_rate=1e-3, moments=again)
    assert all(torch.equal(at_once[name], in_two[name]) for name in at_once)
    fresh = compress(load_full(tiny), SELECTION, HELPERS)
    train_local(fresh, text[:3], learning_rate=1e-3)
    assert distance(train_local(fresh, text[3:], learning_rate=1e-3)[0], at_once) > 0


def test_a_kept_second_moment_has_a_first_one_of_its_own_age(tiny: Path, sequences: Any) -> None:
    """The step after the restart is g / sqrt(v): not the tenth of it that AdamW's own count would make of an empty first
    moment, and not the sign of g that an empty second one gives."""
    text = batches(sequences("logs", 20, 1), 6, 2)
    model, moments = compress(load_full(tiny), SELECTION, HELPERS), Moments(second_only=True)
    train_local(model, text[:5], learning_rate=1e-3, moments=moments)
    name = "layers.2.down_proj"
    before = read_targets(model)

    def second() -> Any:
        return moments.second[name].read(0, before[name].numel()).view_as(before[name])

    kept = second()
    after, _ = train_local(model, text[5:], learning_rate=1e-3, gradient_clip=0.0, moments=moments)
    assert moments.steps == 6
    gradient = ((second() - 0.95 * kept) / 0.05).clamp_min(0).sqrt()
    expected = 1e-3 * gradient / ((second() / (1 - 0.95**6)).sqrt() + 1e-8)
    moved, seen = (before[name] - after[name]).abs(), gradient > 1e-6
    torch.testing.assert_close(moved[seen], expected[seen], rtol=2e-2, atol=2e-6)


def test_moments_of_another_selection_are_left_out(tiny: Path, sequences: Any, tmp_path: Path) -> None:
    text, moments = batches(sequences("logs", 20, 1), 2, 2), Moments()
    train_local(compress(load_full(tiny), {2: [1]}), text, learning_rate=1e-3, moments=moments)
    other = train_local(compress(load_full(tiny), {3: [1]}), text, learning_rate=1e-3, moments=moments)[0]
    plain = train_local(compress(load_full(tiny), {3: [1]}), text, learning_rate=1e-3)[0]
    assert all(torch.equal(other[name], plain[name]) for name in plain)
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(Invalid, match="moments"):
        Moments.load(tmp_path / "broken")


def test_the_rate_warms_up_every_cycle_and_falls_over_the_run(tiny: Path, sequences: Any) -> None:
    assert Schedule(3, 4).factor(2, 1) == 1.0
    falling = Schedule(2, 10, final=0.1)
    rates = [falling.factor(cycle, step) for cycle in (1, 2) for step in range(10)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert 0.1 < rates[-1] < 0.12
    warm = Schedule(2, 10, warmup=3)
    assert [warm.factor(2, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    table = sequences("logs", 20, 1)
    stood = train(tiny, table, factor=lambda _: 0.0)
    assert distance(stood, read_targets(compress(load_full(tiny), SELECTION, HELPERS))) == 0


def test_rows_stored_in_bfloat16_are_trained_in_float32(tiny: Path, sequences: Any) -> None:
    """A rate of 1e-5 is far below what a bfloat16 weight resolves: without a float32 copy nothing would move."""
    text = batches(sequences("logs", 20, 1), 40, 2)
    model = compress(load_full(tiny).to(torch.bfloat16), SELECTION, HELPERS)
    before = read_targets(model)
    after, _ = train_local(model, text, learning_rate=2e-5, bf16=True)
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    moved = sum(int((after[name] != before[name]).sum()) for name in after)
    in_place = compress(load_full(tiny).to(torch.bfloat16), SELECTION, HELPERS)
    optimiser = torch.optim.AdamW([p for p in in_place.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    for batch in text:
        ids = torch.from_numpy(batch.astype("int64"))
        in_place(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    lost = sum(int((read_targets(in_place)[name] != before[name]).sum()) for name in after)
    assert moved > 3 * lost


def test_frozen_weights_in_bfloat16_train_float32_rows(tiny: Path, sequences: Any) -> None:
    model = load_resident_local(tiny, SELECTION, HELPERS, half=True)
    matrices = {name: p.dtype for name, p in model.named_parameters() if p.dim() > 1 and not p.requires_grad}
    routers = {name for name in matrices if ".gate." in name}
    assert {matrices[name] for name in routers} == {torch.float32}
    assert {dtype for name, dtype in matrices.items() if name not in routers} == {torch.bfloat16}
    batch = batches(sequences("logs", 4, 1), 1, 4).repeat(12, axis=0)
    state, stats = train_local(model, batch, learning_rate=1e-3, bf16=True)
    assert stats.last_loss < stats.first_loss
    assert all(value.dtype == torch.float32 for value in state.values())


def test_a_miner_may_use_fewer_experts_per_token(tiny: Path, sequences: Any) -> None:
    """FFT-MoE: the heaviest slot stays, and takes the weight of the one left out (this family normalises its gates)."""
    text = torch.from_numpy(sequences("logs", 2, 1)).long()
    seen: dict[int, list[Any]] = {1: [], 2: []}
    complement = {layer: [e for e in range(8) if e not in experts] for layer, experts in SELECTION.items()}
    for k in (1, 2):
        model = compress(load_full(tiny), SELECTION, complement, top_k=k)
        adapted_layers(model)[2][1].register_forward_hook(lambda _m, _a, out, k=k: seen[k].append(out))
        with torch.no_grad():
            model(input_ids=text)
    (_, one, ids), (_, both, all_ids) = seen[1][0][:3], seen[2][0][:3]
    assert ((ids < 8).sum(dim=-1) == 1).all()
    assert torch.allclose(one.sum(-1), both.sum(-1))
    assert torch.equal(ids[one > 0], all_ids.gather(-1, both.argmax(-1, keepdim=True)).squeeze(-1))
    thin, table = compress(load_full(tiny), SELECTION, HELPERS, top_k=1), sequences("logs", 9, 1)
    rows = train_local(thin, batches(table, 2, 2), learning_rate=1e-3)[0]
    assert {name: value.shape for name, value in rows.items()} == {
        name: value.shape for name, value in read_targets(compress(load_full(tiny), SELECTION)).items()
    }


def test_the_background_expert_is_the_mean_of_what_is_absent(tiny: Path, full: Any, sequences: Any) -> None:
    usage = {2: np.array([9, 9, 3, 0, 1, 0, 9, 0.0]), 3: np.zeros(8)}
    made = background(full, SELECTION, HELPERS, usage)
    bank = full.get_submodule("model.layers.2.mlp.experts").down_proj
    torch.testing.assert_close(made["layers.2.down_proj"][0], 0.75 * bank[2] + 0.25 * bank[4])
    assert weights_of(usage[3], [1, 2]) == {1: 0.5, 2: 0.5}
    seen: list[Any] = []
    model = compress(load_full(tiny), SELECTION, HELPERS, background=made)
    adapted_layers(model)[2][1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    natural: list[Any] = []
    full.get_submodule("model.layers.2.mlp.gate").register_forward_hook(lambda _m, _a, out: natural.append(out))
    ids = torch.from_numpy(sequences("poems", 3, 1)).long()
    with torch.no_grad():
        model(input_ids=ids)
        full(input_ids=ids)
    here = torch.isin(natural[0][2], torch.tensor([0, 1, 6]))
    assert torch.equal(seen[0][2], torch.where(here, natural[0][2], 8))
    assert torch.equal(seen[0][1], natural[0][1]), "the weight of an absent expert goes to the background"
    assert not here.all()
    trained, _ = train_local(model, batches(ids.numpy(), 2, 2), learning_rate=1e-3)
    assert set(trained) == set(read_targets(compress(load_full(tiny), SELECTION)))
    with pytest.raises(Invalid, match="background expert"):
        add_background(compress(load_full(tiny), {2: [0], 3: [1]}), {})


def test_one_absent_expert_is_its_own_background(tiny: Path, full: Any, sequences: Any) -> None:
    """With all but one expert there, the background is that expert: the full model again."""
    helpers = {2: [0, 2, 3, 4, 5], 3: [0, 1, 2, 3, 5, 6]}
    made = background(full, SELECTION, helpers, {2: np.ones(8), 3: np.ones(8)})
    model = compress(load_full(tiny), SELECTION, helpers, background=made)
    ids = torch.from_numpy(sequences("logs", 3, 1)).long()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, full(input_ids=ids).logits, rtol=0, atol=2e-5)


def test_nothing_below_the_first_adapted_layer_is_differentiated(tiny: Path, sequences: Any) -> None:
    model: Any = compress(load_full(tiny), {3: [4]}, {3: [0]})
    tracked = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _m, _a, out, index=index: tracked.update({index: _tensor(out).requires_grad})
        )
    ids = torch.from_numpy(sequences("logs", 2, 1)).long()
    model(input_ids=ids, labels=ids).loss.backward()
    assert tracked == {0: False, 1: False, 2: False, 3: True}
    attention = model.model.layers[3].self_attn
    entered: list[bool] = []
    attention.register_forward_hook(lambda _m, _a, out: entered.append(_tensor(out).requires_grad))
    model(input_ids=ids, labels=ids)
    assert entered == [False], "attention of the first adapted layer lies below its experts"


def test_training_leaves_every_other_tensor_of_the_model_as_it_was(tiny: Path, sequences: Any) -> None:
    model = compress(load_full(tiny), SELECTION, HELPERS)
    before = {name: value.clone() for name, value in (*model.named_buffers(), *model.named_parameters())}
    on_disk = fingerprint(load_full(tiny))
    train_local(model, batches(sequences("logs", 20, 1), 4, 4), learning_rate=1e-2, weight_decay=0.5)
    changed = {n for n, v in (*model.named_buffers(), *model.named_parameters()) if not torch.equal(v, before[n])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert fingerprint(load_full(tiny)) == on_disk


def _tensor(out: Any) -> torch.Tensor:
    value: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return value


def test_a_batch_that_no_target_sees_teaches_nothing(tiny: Path, sequences: Any) -> None:
    short = sequences("logs", 1, 1)[:, :5]
    usage = collect(load_full(tiny), short[:, :-1]).layers
    unused = {index: [int(np.argmin(layer.token_score))] for index, layer in usage.items()}
    assert all(usage[index].token_score[experts].sum() == 0 for index, experts in unused.items()), "4 tokens, 8 experts"
    model, moments = compress(load_full(tiny), unused), Moments()
    before = read_targets(model)
    after, stats = train_local(model, short[None], learning_rate=1e-3, moments=moments)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert stats.steps == 1
    assert moments.steps == 0


def test_beta1_is_the_policys_and_older_runs_keep_theirs(tiny: Path, sequences: Any) -> None:
    assert betas_of(TrainPolicy()) == (0.9, 0.95)
    assert betas_of(TrainPolicy(beta1=0)) == (0.0, 0.95)
    table = sequences("logs", 20, 1)
    first = batches(table, 1, 4)
    one, other = (
        train_local(
            compress(load_full(tiny), SELECTION, HELPERS),
            first,
            learning_rate=1e-3,
            betas=betas_of(TrainPolicy(beta1=b)),
        )[0]
        for b in (0.0, 0.9)
    )
    assert distance(one, other) < 1e-6, "the first step knows no earlier one"
    assert distance(train(tiny, table, betas=(0.0, 0.95)), train(tiny, table)) > 1e-4
