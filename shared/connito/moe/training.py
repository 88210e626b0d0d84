"""A miner's local work: H steps on the target rows of a compressed model, nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from connito.data.packing import Rows, counted
from connito.errors import Invalid
from connito.moe.adamw import AdamW
from connito.moe.batches import batch_of, get_ready, mixed
from connito.moe.engine import EXACT, is_compact
from connito.moe.head import Head
from connito.moe.moments import Moments
from connito.moe.muon import Muon
from connito.moe.resident import read_targets, target_parameters
from connito.moe.state import TargetState
from connito.protocol.policy.choices import ADAMW, MUON
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from connito.moe.prefix import Beginnings
    from connito.v1.run_pb2 import TrainPolicy

# AdamW's usual (β₁, β₂) for language models.
BETAS = (0.9, 0.95)


class Beside(Protocol):
    """Parameters that learn beside the target rows, such as routers (`connito.moe.personal`, `connito.experts.flex`)."""

    def begin(self, step: int, steps: int) -> None:
        """Get ready for local step `step` of `steps`."""

    def loss(self) -> torch.Tensor:
        """Return what the forward pass before adds to the loss."""

    def step(self, rate: float) -> None:
        """Apply one step at a learning rate."""


@dataclass(frozen=True)
class TrainStats:
    """Measurements of local steps. Losses are of the training batches, in nats per token."""

    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Step:
    """One finished step, for whoever watches."""

    index: int
    loss: float
    tokens: int
    seconds: float


def betas_of(policy: TrainPolicy) -> tuple[float, float]:
    """Return AdamW's (β₁, β₂) under a policy; a run from before `beta1` existed keeps its old values."""
    return (policy.beta1 if policy.HasField("beta1") else BETAS[0]), BETAS[1]


def train_local(
    model: nn.Module,
    batches: npt.NDArray[Any],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = BETAS,
    inner: str = ADAMW,
    gradient_clip: float = 1.0,
    bf16: bool = False,
    micro_batch: int = 0,
    factor: Callable[[int], float] | None = None,
    optimizer: str = EXACT,
    moments: Moments | None = None,
    beside: Beside | None = None,
    beginnings: Beginnings | None = None,
    on_step: Callable[[Step], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[TargetState, TrainStats]:
    """Train H steps over `batches` [H, B, L + 1], ids or records: step h predicts what counts of [:, 1:] from [:, :-1].

    `model` comes from `compress` and is trained in place, on the device where its parameters are; bf16 runs the
    forward pass under autocast. Rows that are stored in a shorter type than float32 are updated as float32 numbers.

    micro_batch: sequences per forward and backward pass, gradients add up over the batch; 0 is the whole batch.
    factor: what the rate is multiplied by at step h. inner: `adamw` or `muon` (`connito.moe.muon`).
    optimizer: see `connito.moe.engine`. moments: where AdamW starts; left as it ends. beside: routers that learn beside the
    shipped ones (`connito.moe.personal`). beginnings: where the first pass over rows may begin.

    Deterministic for a thread count. Stops before the next step when `should_stop()`; at least one step is made.
    Raises `Invalid` for an uncompressed model or empty batches, and `NON_FINITE` when the loss leaves the numbers.
    """
    parameters = target_parameters(model)
    if not parameters or batches.ndim != 3 or batches.size == 0:
        raise Invalid(
            "training needs a compressed model and batches [steps, sequences, length + 1]",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    kind, moments = (Muon, None) if inner == MUON else (AdamW, moments)
    optimiser = kind(parameters, betas, weight_decay, compact=is_compact(optimizer), start=moments)
    device = next(iter(parameters.values())).device
    with mixed(device, bf16=bf16):
        head = Head(model)
        get_ready(model, batches)
    work = _Work(head, optimiser, device, beside, beginnings, gradient_clip, bf16)
    losses, tokens, started = [], 0, time.perf_counter()
    with _deterministic():
        for index, batch in enumerate(batches):
            if index and should_stop is not None and should_stop():
                break
            begun = time.perf_counter()
            rate = learning_rate * (1.0 if factor is None else factor(index))
            losses.append(work.step(batch, micro_batch or len(batch), rate, index, len(batches)))
            tokens += batch.shape[0] * (batch.shape[1] - 1)
            if on_step is not None:
                on_step(Step(index, losses[-1], batch.shape[0] * (batch.shape[1] - 1), time.perf_counter() - begun))
    if moments is not None:
        moments.become(optimiser.moments(second_only=moments.second_only))
    stats = TrainStats(len(losses), tokens, time.perf_counter() - started, losses[0], losses[-1])
    return read_targets(model), stats


@dataclass
class _Work:
    """The objects that a training step uses."""

    head: Head
    optimiser: AdamW
    device: torch.device
    beside: Beside | None
    beginnings: Beginnings | None
    clip: float
    bf16: bool

    def step(self, batch: npt.NDArray[Any], size: int, rate: float, index: int, steps: int) -> float:
        """Apply one step on a batch [B, L + 1], `size` sequences at a time, and return the loss before it."""
        if self.beside is not None:
            self.beside.begin(index, steps)
        tokens = int(counted(batch).sum())
        parts = [self._accumulate(batch[start : start + size], tokens) for start in range(0, len(batch), size)]
        norm = self.optimiser.norm()
        # The one place where a step waits for the device.
        loss, length = torch.stack([torch.stack(parts).sum(), norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(length)):
            raise Invalid(
                f"the training loss became {loss} and its gradient {length}: the learning rate is too high for this model "
                "or its weights are damaged; lower learning_rate",
                reason=reasons_pb2.REASON_NON_FINITE,
            )
        self.optimiser.step(rate, (self.clip / (norm + 1e-6)).clamp_(max=1.0) if self.clip > 0 else None)
        if self.beside is not None:
            self.beside.step(rate)
        return float(loss)

    def _accumulate(self, rows: Rows, tokens: int) -> torch.Tensor:
        """Add the gradients of a part of a batch in which `tokens` predictions count; return its part of the mean loss, []."""
        part = batch_of(rows, self.head.model)
        begun = nullcontext() if self.beginnings is None else self.beginnings.enter(rows)
        with mixed(self.device, bf16=self.bf16), begun:
            loss = self.head.nll(*part).sum() / tokens
            value = loss.detach().to(self.device)
            if self.beside is not None:
                loss = loss + self.beside.loss() * (part.tokens / tokens)
        # Where no token of a small batch went to a target there is nothing to learn.
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return value


class _deterministic:  # noqa: N801 - reads as the statement it is
    """Deterministic kernels where torch has them, inside the block only."""

    def __enter__(self) -> None:
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self._before[0], warn_only=self._before[1])
