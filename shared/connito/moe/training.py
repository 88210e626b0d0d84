"""A miner's local work: H AdamW steps on the target rows of a compressed model, nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid
from connito.moe.head import Head
from connito.moe.resident import extract, target_parameters
from connito.moe.state import TargetState
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


@dataclass(frozen=True)
class TrainStats:
    """What the steps did. Losses are of the training batches, in nats per token."""

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


def pick_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_local(
    model: nn.Module,
    batches: npt.NDArray[Any],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    gradient_clip: float = 1.0,
    bf16: bool = False,
    on_step: Callable[[Step], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[TargetState, TrainStats]:
    """H steps over `batches`, int32 [H, B, L + 1]: step h predicts [:, 1:] from [:, :-1] of batch h.

    `model` comes from `compress` and is trained in place, on the device where its parameters are; bf16 runs the
    forward pass under autocast, parameters and moments stay as they are. Deterministic for a thread count. Stops before
    the next step when `should_stop()`; at least one step is made.

    Raises `Invalid` for an uncompressed model or empty batches, and `NON_FINITE` when the loss leaves the numbers.
    """
    parameters = target_parameters(model)
    if not parameters or batches.ndim != 3 or batches.size == 0:
        raise Invalid(
            "training needs a compressed model and batches [steps, sequences, length + 1]",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    device = next(iter(parameters.values())).device
    optimiser = torch.optim.AdamW(list(parameters.values()), lr=learning_rate, weight_decay=weight_decay, betas=betas)
    head, losses, tokens, started = Head(model), [], 0, time.perf_counter()
    with _deterministic():
        for index, batch in enumerate(batches):
            if index and should_stop is not None and should_stop():
                break
            begun = time.perf_counter()
            ids = torch.from_numpy(batch.astype("int64")).to(device)
            losses.append(_step(head, optimiser, list(parameters.values()), ids, gradient_clip, bf16))
            tokens += batch.shape[0] * (batch.shape[1] - 1)
            if on_step is not None:
                on_step(Step(index, losses[-1], batch.shape[0] * (batch.shape[1] - 1), time.perf_counter() - begun))
    stats = TrainStats(len(losses), tokens, time.perf_counter() - started, losses[0], losses[-1])
    return extract(model), stats


def _step(
    head: Head,
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    ids: torch.Tensor,
    clip: float,
    bf16: bool,
) -> float:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = head.nll(ids[:, :-1], ids[:, 1:]).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Invalid(
            f"the training loss became {value}: the learning rate is too high for this model or its weights are damaged; "
            "lower learning_rate",
            reason=reasons_pb2.REASON_NON_FINITE,
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if clip > 0:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
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
