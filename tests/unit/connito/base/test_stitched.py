"""BTS and BAM: specialists stitched beside their seed, and their attention as a soft mixture of experts."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.bam import mix_branches
from connito.base.branches import train_on
from connito.base.bts import Stitched
from connito.errors import Invalid
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = ("logs", "poems")


@pytest.fixture
def dense() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, initializer_range=0.3, bos_token_id=None, eos_token_id=39)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def branches(dense: Any) -> dict[str, Any]:
    return {name: noisy(dense, seed) for seed, name in enumerate(NAMES)}


def noisy(model: Any, seed: int) -> Any:
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in out.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return out


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 38, (2, 7), generator=torch.Generator().manual_seed(5))


def hidden(model: Any, ids: torch.Tensor) -> list[np.ndarray]:
    return [h.double().numpy() for h in model(input_ids=ids, output_hidden_states=True).hidden_states]


def test_without_specialists_it_is_the_seed(dense: Any, branches: dict[str, Any], ids: torch.Tensor) -> None:
    model = Stitched(dense, branches)
    model.closed = NAMES
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_stitch_into_the_hub_is_the_papers_mixture(dense: Any, branches: dict[str, Any], ids: torch.Tensor) -> None:
    """One stitch, after the last layer: gates and projections written out on the models' own hidden states."""
    model, rng = Stitched(dense, branches, every=3), np.random.default_rng(1)
    stitch: Any = model.stitches["2"]
    assert list(model.stitches) == ["2"]
    gate, project = rng.normal(size=(3, 16)), rng.normal(size=(2, 16, 16))
    with torch.no_grad():
        stitch.gate.copy_(torch.from_numpy(gate))
        stitch.project.copy_(torch.from_numpy(project))
    seen = []
    for each in (dense, *branches.values()):  # transformers norms the last one, so it is taken before
        handle = each.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().numpy()))
        each(input_ids=ids)
        handle.remove()
    logits = seen[0] @ gate.T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = shares[..., :1] * seen[0] + sum(shares[..., i + 1 : i + 2] * (seen[i + 1] @ project[i].T) for i in range(2))
    want = dense.lm_head(dense.model.norm(torch.from_numpy(mixed).float()))
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-3, atol=1e-3)


def test_a_stitch_into_specialists_gives_them_some_of_the_hub(dense: Any, branches: dict[str, Any]) -> None:
    model, rng = Stitched(dense, branches), np.random.default_rng(2)
    stitch: Any = model.stitches["1"]
    states, gate, project = rng.normal(size=(3, 1, 4, 16)), rng.normal(size=(2, 16)), rng.normal(size=(2, 16, 16))
    with torch.no_grad():
        stitch.gate.copy_(torch.from_numpy(gate))
        stitch.project.copy_(torch.from_numpy(project))
        found = stitch(torch.from_numpy(states).float()).numpy()
    for v in range(2):
        for t in range(4):
            s = 1 / (1 + math.exp(-float(gate[v] @ states[v + 1, 0, t])))
            want = s * states[v + 1, 0, t] + (1 - s) * (project[v] @ states[0, 0, t])
            np.testing.assert_allclose(found[v, 0, t], want, rtol=1e-3, atol=1e-4)


def test_only_stitches_learn_and_strangers_are_refused(dense: Any, branches: dict[str, Any], ids: torch.Tensor) -> None:
    model = Stitched(dense, branches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train_on(model, [*model.stitches.parameters()], {"logs": ids, "poems": ids}, 12, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("stitches.") for name in moved)
    other = LlamaForCausalLM(LlamaConfig(**dense.config.to_dict() | {"num_hidden_layers": 2}))
    with pytest.raises(Invalid, match="no branch"):
        Stitched(dense, {"other": other})


@pytest.mark.parametrize("shared", [False, True])
def test_attention_is_the_soft_mixture_of_all_branches(
    dense: Any, branches: dict[str, Any], ids: torch.Tensor, shared: bool
) -> None:
    """Softmax attention of each branch, written out without a library's attention, weighed by softmax(R·x)."""
    model: Any = mix_branches(dense, branches, dict.fromkeys(NAMES, ids), moe_layers=1, shared=shared)
    block, rng = model.model.layers[1].self_attn, np.random.default_rng(3)
    gate, x = rng.normal(size=(2, 16)), rng.normal(size=(1, 7, 16))
    with torch.no_grad():
        block.gate.copy_(torch.from_numpy(gate))
    flat = torch.zeros(1, 7, 8)
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    # Angles of zero: positions play no part.
    found, _ = block(torch.from_numpy(x).float(), position_embeddings=(flat + 1, flat), attention_mask=mask)
    attentions = [branch.model.layers[1].self_attn for branch in branches.values()]
    maps = [{n: getattr(a, n + "_proj").weight.double().numpy() for n in "qkvo"} for a in attentions]
    mean = {n: sum(m[n] for m in maps) / 2 for n in "kv"}
    logits = x[0] @ gate.T
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.zeros((7, 16))
    for number, own in enumerate(maps):
        used = own | mean if shared else own
        heads = []
        for head in range(2):
            q = x[0] @ used["q"][8 * head : 8 * head + 8].T
            scores = q @ (x[0] @ used["k"].T).T / math.sqrt(8)
            scores[np.triu_indices(7, 1)] = -np.inf
            chances = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(chances / chances.sum(1, keepdims=True) @ (x[0] @ used["v"].T))
        want += shares[:, number : number + 1] * (np.concatenate(heads, 1) @ used["o"].T)
    np.testing.assert_allclose(found.detach().numpy()[0], want, rtol=1e-3, atol=1e-3)


def test_copies_of_one_branch_are_that_branch_and_everything_learns(dense: Any, ids: torch.Tensor) -> None:
    model: Any = mix_branches(dense, dict.fromkeys(NAMES, dense), dict.fromkeys(NAMES, ids), moe_layers=1)
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    before = model.model.layers[0].self_attn.experts[1].q_proj.weight.clone()
    losses = train_on(model, [*model.parameters()], {"logs": ids}, 6, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert not torch.equal(model.model.layers[0].self_attn.experts[1].q_proj.weight, before)
