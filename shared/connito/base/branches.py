"""Join whole specialists: dense branches become the experts of one MoE (BTX).

BTX (Sukhbaatar et al. 2024): branches of one dense seed, trained apart, become the experts of an MoE; what is not an MLP
is averaged; then the routers are trained on all domains, or everything is.

Shapes: B batch, L length, H hidden size, V branches, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from connito.base.clustering import ROUTER_SCALE
from connito.base.upcycle import check_source, moe_config
from connito.errors import Invalid
from connito.runtime.progress import tell

if TYPE_CHECKING:
    import numpy.typing as npt

# Sequences of a step of training.
BATCH = 4


def import_branches(
    seed: Any, branches: Mapping[str, Any], texts: Mapping[str, torch.Tensor], *, moe_layers: int, top_k: int = 2
) -> nn.Module:
    """Return a Qwen2-MoE whose experts are the MLPs of `branches` (Llama-like models of one shape), in their order.

    seed: the model they were branched from, which gives the hidden states that routers are made from; texts: token ids
    [n, L] by branch name. In the last `moe_layers` layers expert e is branch e's MLP bit for bit; every other tensor is
    the branches' mean. Copies of one branch give that branch's function. Raises `Invalid` for models that do not fit.
    """
    from connito.base.loading import build_empty

    names = list(branches)
    if len(names) < 2 or set(texts) != set(names):
        raise Invalid(f"every branch needs text of its own domain: branches {names}, texts {sorted(texts)}")
    top_k = min(top_k, len(names))
    for model in (seed, *branches.values()):
        check_source(model, moe_layers, len(names), top_k)
    first = len(seed.model.layers) - moe_layers
    states = [branches[name].state_dict() for name in names]
    if any(
        {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in seed.state_dict().items()} for state in states
    ):
        raise Invalid("these branches do not have the seed's tensors: they are not branches of it")
    config = moe_config(seed, first, len(names), top_k)
    tensors = {name: _mean([state[name] for state in states]) for name in states[0]}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    with torch.no_grad():
        for index in range(first, len(seed.model.layers)):
            mlp = f"model.layers.{index}.mlp"
            for part in ("gate", "up", "down"):
                del tensors[f"{mlp}.{part}_proj.weight"]
            router = domain_router([_mlp_inputs(seed, index, texts[name]) for name in names])
            tensors |= _sparse(mlp, states, torch.from_numpy(router), config.hidden_size)
    return build_empty(config, tensors)


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors; where all are equal it is that tensor, bit for bit."""
    first = tensors[0].detach()
    if all(torch.equal(first, other) for other in tensors[1:]):
        return first.float()
    return torch.stack([tensor.detach().double() for tensor in tensors]).mean(dim=0).float()


def _sparse(
    mlp: str, states: Sequence[Mapping[str, torch.Tensor]], router: torch.Tensor, hidden: int
) -> dict[str, torch.Tensor]:
    def part(name: str) -> torch.Tensor:
        return torch.stack([state[f"{mlp}.{name}_proj.weight"].detach().float() for state in states])

    return {
        f"{mlp}.gate.weight": router.float(),
        f"{mlp}.experts.gate_up_proj": torch.cat([part("gate"), part("up")], dim=1),
        f"{mlp}.experts.down_proj": part("down"),
        f"{mlp}.shared_expert.gate_proj.weight": torch.zeros(1, hidden),
        f"{mlp}.shared_expert.up_proj.weight": torch.zeros(1, hidden),
        f"{mlp}.shared_expert.down_proj.weight": torch.zeros(hidden, 1),
        f"{mlp}.shared_expert_gate.weight": torch.zeros(1, hidden),
    }


def domain_router(hidden: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
    """Return router weight [E, H] from the MLP inputs [T_e, H] of each expert's own text.

    As in clustered upcycling, with the domain for the cluster: s·(C − (C·μ)/(μ·μ)·μᵀ), C the unit means of (h − μ)/‖h − μ‖.
    """
    mean = np.mean([table.mean(axis=0, dtype=np.float64) for table in hidden], axis=0)
    norms = [np.linalg.norm(table - mean, axis=1) for table in hidden]
    centroids = np.stack(
        [((table - mean) / np.maximum(n, 1e-12)[:, None]).mean(axis=0) for table, n in zip(hidden, norms, strict=True)]
    )
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    folded = np.outer(centroids @ mean / (mean @ mean), mean)
    return np.asarray(ROUTER_SCALE / float(np.concatenate(norms).mean()) * (centroids - folded))


def _mlp_inputs(model: Any, index: int, ids: torch.Tensor) -> npt.NDArray[np.float32]:
    seen: list[torch.Tensor] = []
    handle = model.model.layers[index].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for row in ids:
            model(input_ids=row[None].long(), use_cache=False)
    finally:
        handle.remove()
    return np.asarray(torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).float().numpy())


def train_routers(
    model: Any,
    texts: Mapping[str, torch.Tensor],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    seed: int = 0,
    everything: bool = False,
) -> list[float]:
    """Train the routers on all domains' texts (ids [n, L] by name), drawn alike; returns the losses.

    Experts and shared parameters are frozen, as where BAR routes after its experts were trained apart; with `everything`
    all parameters learn, as in BTX's last stage. Where the family has a load-balancing loss, it counts.
    """
    tell(f"training {'everything' if everything else 'the routers'} for {steps} steps")
    from connito.moe.layout import require_moe_layers

    routers = [p for layer in require_moe_layers(model).values() for p in layer.router.parameters()]
    wanted = [p for p in model.parameters() if p.is_floating_point()] if everything else routers
    return train_on(model, wanted, texts, steps, learning_rate=learning_rate, seed=seed)


def train_on(
    model: Any,
    wanted: Sequence[nn.Parameter],
    texts: Mapping[str, torch.Tensor],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train the parameters `wanted` of a model on all domains' texts (ids [n, L] by name), drawn alike; returns the losses."""
    import inspect

    from connito.moe.adamw import AdamW

    optimiser = AdamW({str(number): parameter for number, parameter in enumerate(wanted)}, betas=(0.9, 0.999))
    options = (
        {"output_router_logits": True} if "output_router_logits" in inspect.signature(model.forward).parameters else {}
    )
    generator, losses, names = torch.Generator().manual_seed(seed), [], sorted(texts)
    for parameter in wanted:
        parameter.requires_grad_(True)
    try:
        for _ in range(steps):
            drawn = [texts[names[int(torch.randint(len(names), (), generator=generator))]] for _ in range(BATCH)]
            rows = [table[int(torch.randint(len(table), (), generator=generator))] for table in drawn]
            length = min(map(len, rows))
            ids = torch.stack([row[:length] for row in rows]).long().to(wanted[0].device)
            loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
            loss.backward()
            optimiser.step(learning_rate)
            losses.append(float(loss.detach()))
    finally:
        model.requires_grad_(False)
    return losses
