"""Specialists joined: their identities, routers trained over them, and the ensemble and mean of Branch-Train-Merge."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base import btm
from connito.base.branches import import_branches, train_routers
from connito.base.checkpoint import save_checkpoint
from connito.base.tiny import tokenizer
from connito.curation import growing
from connito.errors import Invalid
from connito.moe.layout import find_moe_layers
from connito.moe.statistics import collect
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.models import Sequences


@pytest.fixture
def dense() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=256)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def texts(sequences: Sequences) -> dict[str, torch.Tensor]:
    return {
        domain: torch.from_numpy(sequences(domain, 6, 60)[:, :-1].astype("int64"))
        for domain in ("recipes", "logs", "poems")
    }


def noisy(model: Any, seed: int) -> Any:
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in out.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return out


def test_copies_of_one_branch_are_that_branch(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    moe = import_branches(dense, dict.fromkeys(texts, dense), texts, moe_layers=2)
    ids = texts["logs"][:2]
    difference = (moe(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max()
    assert float(difference) < 1e-4


def test_experts_are_the_branches_mlps_and_the_rest_their_mean(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    branches = {domain: noisy(dense, seed) for seed, domain in enumerate(texts)}
    moe: Any = import_branches(dense, branches, texts, moe_layers=2)
    layers: Any = find_moe_layers(moe)
    assert sorted(layers) == [1, 2]
    for number, branch in enumerate(branches.values()):
        mlp = branch.model.layers[2].mlp
        assert torch.equal(layers[2].experts.down_proj[number], mlp.down_proj.weight)
        assert torch.equal(
            layers[2].experts.gate_up_proj[number], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        )
    mean = torch.stack([b.model.layers[0].self_attn.q_proj.weight for b in branches.values()]).mean(dim=0)
    torch.testing.assert_close(moe.model.layers[0].self_attn.q_proj.weight, mean)


def test_tokens_of_a_domain_go_to_its_own_branch_first(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    moe = import_branches(dense, dict.fromkeys(texts, dense), texts, moe_layers=1)
    for number, domain in enumerate(texts):
        first = collect(moe, texts[domain].numpy()).layers[2].first
        assert int(first.argmax()) == number


def test_strangers_are_refused(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Invalid, match="text of its own"):
        import_branches(dense, {"recipes": dense, "maths": dense}, texts, moe_layers=1)
    config = copy.deepcopy(dense.config)
    config.intermediate_size = 64
    other = LlamaForCausalLM(config)
    with pytest.raises(Invalid, match="not branches of it"):
        import_branches(dense, {**dict.fromkeys(texts, dense), "logs": other}, texts, moe_layers=1)


def specialist(dense: Any, table: torch.Tensor, steps: int = 12) -> Any:
    """A branch: every parameter trained on one domain."""
    model = copy.deepcopy(dense).requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        loss = model(input_ids=table[[step % len(table)]], labels=table[[step % len(table)]], use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


@pytest.mark.slow
def test_routers_learn_over_frozen_experts_and_everything_where_asked(
    dense: Any, texts: dict[str, torch.Tensor]
) -> None:
    branches = {domain: specialist(dense, table) for domain, table in texts.items()}
    moe: Any = import_branches(dense, branches, texts, moe_layers=2)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}

    def loss() -> float:
        with torch.no_grad():
            return sum(float(moe(input_ids=t, labels=t, use_cache=False).loss) for t in texts.values())

    plain = loss()
    train_routers(moe, texts, 40, learning_rate=1e-2)
    moved = {name for name, tensor in moe.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)}
    routed = loss()
    assert routed < plain
    train_routers(moe, texts, 40, everything=True)
    assert loss() < routed
    moved = {name for name, tensor in moe.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(moved) > 20
    assert not any(parameter.requires_grad for parameter in moe.parameters())


def test_the_ensemble_is_bayes_rule_token_by_token(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    """p(token) = Σ_v p(v | tokens before) p_v(token), products of probabilities and their sums written out."""
    models = [noisy(dense, seed) for seed in range(3)]
    ids, prior = texts["logs"][:2, :9], torch.tensor([0.5, 0.3, 0.2])
    log_p = btm.log_likelihoods(models, ids)
    found, ends = btm.ensemble_nll(log_p, prior), btm.posteriors(log_p, prior)[..., -1]
    expected = torch.full((3,), 1 / 3, dtype=torch.float64)
    for row in range(2):
        belief = [float(p) for p in prior]
        evenly = [float(p) for p in expected]
        for place in range(8):
            chances = []
            for model in models:
                with torch.no_grad():
                    table = model(input_ids=ids[row : row + 1, : place + 1]).logits[0, -1].softmax(-1)
                chances.append(float(table[ids[row, place + 1]]))
            mixed = sum(b * c for b, c in zip(belief, chances, strict=True))
            assert float(found[row, place]) == pytest.approx(-math.log(mixed), rel=1e-4)
            belief = [b * c / mixed for b, c in zip(belief, chances, strict=True)]
            whole = sum(b * c for b, c in zip(evenly, chances, strict=True))
            evenly = [b * c / whole for b, c in zip(evenly, chances, strict=True)]
        assert ends[:, row].tolist() == pytest.approx(belief, rel=1e-4)
        expected = 0.7 * expected + 0.3 * torch.tensor(evenly, dtype=torch.float64)
    assert btm.estimate_prior(log_p).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_mean_is_the_weighted_mean_and_strangers_have_none(dense: Any) -> None:
    one, other = noisy(dense, 1), noisy(dense, 2)
    merged = btm.average({"one": one, "other": other}, [0.25, 0.75])
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * one.state_dict()[name] + 0.75 * other.state_dict()[name])
    with pytest.raises(Invalid, match="branches of one seed"):
        btm.average({"one": one}, [1.0])


@pytest.mark.slow
def test_branches_are_made_into_either_from_folders(dense: Any, texts: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from connito.base.tiny import tiny_texts

    files = {}
    for domain, table in texts.items():
        save_checkpoint(specialist(dense, table), tmp_path / domain, tokenizer())
        files[domain] = tmp_path / f"{domain}.txt"
        files[domain].write_text("\n".join(tiny_texts(domain, 3, 30)))
    save_checkpoint(dense, tmp_path / "seed", tokenizer())
    folders = {domain: tmp_path / domain for domain in texts}
    merged = growing.branches(
        tmp_path / "seed", tmp_path / "merged", growing.BranchOptions(folders, files, 0, measure=files)
    )
    settings = merged["settings"]
    assert sum(settings["weights"]) == pytest.approx(1.0)
    assert sorted(settings["ensemble"]) == sorted(files)
    after, before = ({row["domain"]: float(row[when] or 0) for row in merged["losses"]} for when in ("after", "before"))
    assert all(settings["ensemble"][domain] < before[domain] for domain in files)
    assert sum(after.values()) < sum(before.values())
    plain, routed = (
        growing.branches(
            tmp_path / "seed", tmp_path / f"moe-{steps}",
            growing.BranchOptions(folders, files, 2, router_steps=steps, measure=files),
        )
        for steps in (0, 10)
    )  # fmt: skip
    assert [row["after"] for row in plain["losses"]] != [row["after"] for row in routed["losses"]]
