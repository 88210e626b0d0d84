"""Four ways of fitting a MoE to a domain, behind one loop: the rows of selected experts alone, everything, whole banks
with masked gradients, and LoRA on the fused experts.

All of them see the same batches through the same loss and the family's own loop over experts, so what differs is
the method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.tiny_rig import Tokens

if TYPE_CHECKING:
    import torch
    from torch import nn

Load = Callable[[], Any]
Targets = Mapping[int, Sequence[int]]


@dataclass
class Job:
    """A model ready to train. `after_backward` runs between the gradients and the optimiser's step; `full` gives the
    model that the result is judged on; `upload` is what a worker would send."""

    name: str
    model: nn.Module
    parameters: list[nn.Parameter]
    after_backward: Callable[[], None]
    full: Callable[[], nn.Module]
    upload: Callable[[], int]


def expert_only(load: Load, targets: Targets, helpers: Mapping[int, Iterable[int]], name: str = "expert-only") -> Job:
    """Train target rows with helpers frozen and the rest of each adapted bank not in memory."""
    from connito.moe.resident import compress, read_targets, target_parameters
    from connito.moe.rows import write_rows

    model = compress(load(), targets, helpers)

    def full() -> Any:
        whole = load()
        write_rows(whole, targets, read_targets(model))
        return whole

    return Job(name, model, list(target_parameters(model).values()), _nothing, full, lambda: _size(read_targets(model)))


def full_fine_tuning(load: Load, name: str = "full fine-tuning") -> Job:
    """Train every parameter."""
    model = load()
    model.requires_grad_(True)
    parameters = list(model.parameters())
    return Job(name, model, parameters, _nothing, lambda: model, lambda: _numbers(parameters))


def gradient_masking(load: Load, targets: Targets, name: str = "gradient masking") -> Job:
    """Train whole banks of the adapted layers with gradients of unselected rows set to zero.

    A worker could still upload the selected rows alone, and `upload` counts those: masking loses in memory, not there.
    """
    import torch
    from connito.moe.layout import require_moe_layers
    from connito.moe.rows import read_rows

    model = load()
    model.requires_grad_(False)
    layers = require_moe_layers(model)
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    for index, experts in targets.items():
        for parameter in layers[index].parameters:
            bank = getattr(layers[index].experts, parameter).requires_grad_(True)
            mask = torch.zeros(len(bank), *[1] * (bank.dim() - 1))
            mask[list(experts)] = 1
            kept.append((bank, mask))

    def zero_the_rest() -> None:
        for bank, mask in kept:
            if bank.grad is not None:
                bank.grad *= mask

    return Job(
        name, model, [bank for bank, _ in kept], zero_the_rest, lambda: model, lambda: _size(read_rows(model, targets))
    )


def everything_but(model: nn.Module, targets: Targets) -> dict[int, list[int]]:
    """Return the experts of the adapted layers that are no targets: with them for helpers nothing is missing."""
    from connito.moe.layout import require_moe_layers

    layers = require_moe_layers(model)
    return {i: [e for e in range(layers[i].num_experts) if e not in set(chosen)] for i, chosen in targets.items()}


def lora(
    load: Load, rank: int, name: str = "LoRA", layers: Iterable[int] | None = None, modules: Sequence[str] = ()
) -> Job:
    """Train adapters of `rank` on the fused tensors of every expert, by peft's `target_parameters`; or on `modules` alone.

    peft adapts whole fused tensors: rows cannot be chosen. Raises `RuntimeError` when peft is not installed.
    """
    from connito.moe.layout import require_moe_layers

    peft = import_peft()
    model = load()
    wanted = require_moe_layers(model)
    names = [
        f"{layer.experts_name}.{parameter}"
        for index, layer in wanted.items()
        if layers is None or index in set(layers)
        for parameter in layer.parameters
    ]
    where = {"target_modules": list(modules)} if modules else {"target_parameters": names}
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **where)
    peft.get_peft_model(model, adapters)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Job(name, model, parameters, _nothing, lambda: model, lambda: _numbers(parameters))


def import_peft() -> Any:
    """Return the peft module, or `RuntimeError` that says how to get it."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise RuntimeError(
            "LoRA is measured with peft, which is not installed; run `pip install 'peft>=0.18'` and try again"
        ) from error


class Loop:
    """AdamW steps on a job: the same moments, clipping and loss for every method."""

    def __init__(self, job: Job, learning_rate: float, weight_decay: float = 0.01) -> None:
        import torch
        from connito.moe.head import Head

        self.job = job
        self.optimiser = torch.optim.AdamW(
            job.parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95)
        )
        self._head = Head(job.model)

    def forward_backward(self, batch: Tokens) -> float:
        """Return loss of a batch [B, L + 1] in nats per token; gradients are left in the parameters."""
        import torch

        ids = torch.from_numpy(batch.astype(np.int64)).to(self.job.parameters[0].device)
        loss = self._head.nll(ids[:, :-1], ids[:, 1:]).mean()
        self.optimiser.zero_grad(set_to_none=True)
        # Where no token went to a trained expert there is nothing to learn.
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def step(self, batch: Tokens) -> float:
        """Make one whole step and return the loss before it."""
        import torch

        loss = self.forward_backward(batch)
        self.job.after_backward()
        torch.nn.utils.clip_grad_norm_(self.job.parameters, 1.0)
        self.optimiser.step()
        return loss

    def state_bytes(self) -> int:
        """Return bytes of the optimiser's tensors."""
        import torch

        return sum(
            _tensor_bytes(value)
            for state in self.optimiser.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )

    def gradient_bytes(self) -> int:
        """Return bytes of the gradients that lie in memory now."""
        return sum(_tensor_bytes(p.grad) for p in self.job.parameters if p.grad is not None)


def _nothing() -> None:
    return None


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(map(_tensor_bytes, parameters))


def _size(state: Mapping[str, Any]) -> int:
    return sum(map(_tensor_bytes, state.values()))
