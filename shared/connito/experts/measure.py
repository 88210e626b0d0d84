"""Change of a model's losses by domain, with paired intervals, as library records hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.library.interval import change_interval
from connito.library.schema import Loss
from connito.moe.head import Head
from connito.runtime.progress import tell

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

Texts = Mapping[str, "npt.NDArray[Any]"]


def sequence_losses(model: nn.Module, sequences: npt.NDArray[Any]) -> list[float]:
    """Return Σ nats of each of `sequences` int32 [n, L + 1]."""
    head, sums = Head(model), []
    with torch.inference_mode():
        for row in sequences:
            ids = torch.from_numpy(row[None].astype(np.int64)).to(next(model.parameters()).device)
            sums.append(float(head.nll(ids[:, :-1], ids[:, 1:]).double().sum()))
    return sums


def loss(model: nn.Module, sequences: npt.NDArray[Any]) -> float:
    """Return the nats per token of `sequences` int32 [n, L + 1]."""
    return sum(sequence_losses(model, sequences)) / max(1, len(sequences) * (int(sequences.shape[1]) - 1))


@dataclass(frozen=True)
class BaselineLosses:
    """The losses of a model as it was, for comparing later."""

    texts: Texts
    sums: dict[str, list[float]]

    @classmethod
    def of(cls, model: nn.Module, texts: Texts) -> BaselineLosses:
        """Measure `texts`, int32 [n, L + 1] by domain."""
        sums = {}
        for domain, table in texts.items():
            tell(f"measuring {domain}")
            sums[domain] = sequence_losses(model, table)
        return cls(dict(texts), sums)

    def compare(self, model: nn.Module) -> list[Loss]:
        """Return rows of a record: by domain the loss before and after, in nats per token, and the change's 95 %
        interval.
        """
        rows: list[Loss] = []
        for domain, table in self.texts.items():
            tell(f"measuring what {domain} loses")
            before, after = self.sums[domain], sequence_losses(model, table)
            counts = [int(table.shape[1]) - 1] * len(table)
            total = max(1, sum(counts))
            interval = change_interval(before, after, counts)
            row: Loss = {
                "domain": domain, "before": math.fsum(before) / total, "after": math.fsum(after) / total, "tokens": total,
            }  # fmt: skip
            if interval:
                row["change_low"], row["change_high"] = interval
            rows.append(row)
        return rows
