"""A miner's own look at its training: the loss of a part of its share that it does not train on, and when to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from connito.data.packing import Rows, counted
from connito.runtime import logs, metrics

from .settings import TrainerSettings

if TYPE_CHECKING:
    from connito.moe.head import Head
    from connito.moe.state import TargetState
    from connito.moe.training import Step
    from torch import nn

# Evaluations in a cycle, and sequences below which a loss says little.
TIMES, FEWEST = 5, 4

log = logs.get_logger("training")


def hold_back(batches: Rows, share: float) -> tuple[Rows, Rows]:
    """Return batches [H, B, L + 1] without a share of their sequences, and those, [n, L + 1]; none where that is too few.

    The last ones are held back, and the first ones are trained on again in their place.
    """
    rows = batches.reshape(-1, batches.shape[-1])
    apart = int(len(rows) * share)
    if apart < FEWEST:
        return batches, rows[:0]
    kept = np.arange(len(rows)) % (len(rows) - apart)
    return rows[kept].reshape(batches.shape), rows[len(rows) - apart :]


class Evaluation:
    """Losses of the training model on sequences that it does not train on, in nats per token, and its best state so far.

    It follows from the miner's share and the training alone, so that training again ends in the same result.
    """

    def __init__(self, model: nn.Module, rows: Rows, steps: int, settings: TrainerSettings) -> None:
        """Measure now, and `TIMES` in the `steps` to come; never without rows."""
        from connito.moe.batches import home_of, mixed
        from connito.moe.head import Head

        self._model, self._rows, self._patience = model, rows, settings.patience
        self._bf16, self._at_once = settings.computes_in_bf16, settings.micro_batch
        self._every = max(1, -(-steps // TIMES))
        with mixed(home_of(model), bf16=self._bf16):
            self._head: Head = Head(model)
        self._since_best = 0
        self.best: TargetState | None = None
        self.losses: list[float] = []
        if len(rows):
            self._look()

    @property
    def stopped(self) -> bool:
        """Return whether the last `patience` evaluations were no better than the best before them."""
        return 0 < self._patience <= self._since_best

    def __call__(self, step: Step) -> None:
        """Measure, after every so many steps."""
        if len(self._rows) and (step.index + 1) % self._every == 0:
            self._look()

    def _look(self) -> None:
        loss = self._measure()
        better = not self.losses or loss < min(self.losses)
        self._since_best = 0 if better else self._since_best + 1
        self.losses.append(loss)
        metrics.TRAIN_EVALUATION_LOSS.set(loss)
        log.info("evaluated", sequences=len(self._rows), loss=round(loss, 4), best=round(min(self.losses), 4))
        if better and self._patience:
            from connito.moe.resident import read_targets

            self.best = read_targets(self._model)

    def _measure(self) -> float:
        import torch
        from connito.moe.batches import batch_of, mixed

        total = 0.0
        size = self._at_once or len(self._rows)
        for start in range(0, len(self._rows), size):
            part = batch_of(self._rows[start : start + size], self._model)
            with torch.no_grad(), mixed(part.ids.device, bf16=self._bf16):
                total += float(self._head.nll(*part).double().sum())
        return total / max(1, int(counted(self._rows).sum()))
