"""A miner's work in the figures on merging: the trainer's own AdamW, and what the literature puts in its place.

fedprox: AdamW on the loss plus μ/2 ‖θ − θ_t‖² (Li et al., "Federated Optimization in Heterogeneous Networks", 2020).
scaffold: gradients corrected by control variates, the mean gradient of all minus the own one, of the cycle before
(Karimireddy et al., "SCAFFOLD", 2020, option II).
muon: the trainer's own Muon, as in MuLoCo (Thérien et al., "MuLoCo: Muon is a practical inner optimizer for DiLoCo", 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from connito.protocol.policy.choices import INNER_OPTIMIZERS

from bench.tiny_rig import Tokens

if TYPE_CHECKING:
    from connito.moe.moments import Moments
    from torch import nn

KINDS = (*INNER_OPTIMIZERS, "fedprox", "scaffold")
PROXIMAL = 1e-3


@dataclass
class Miner:
    """The memory of a miner from cycle to cycle. `variate` and `common` are SCAFFOLD's own and mean gradients."""

    kind: str
    moments: Moments | None
    betas: tuple[float, float]
    variate: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)

    def work(self, model: nn.Module, theta: Any, batches: Tokens, rate: float) -> Any:
        """Return the state after H steps from θ_t over `batches` [H, B, L + 1]."""
        from connito.moe.resident import write_targets
        from connito.moe.training import train_local

        write_targets(model, theta)
        if self.kind in INNER_OPTIMIZERS:
            return train_local(
                model, batches, learning_rate=rate, moments=self.moments, betas=self.betas, inner=self.kind
            )[0]
        return self._other(model, theta, batches, rate)

    def _other(self, model: nn.Module, theta: Any, batches: Tokens, rate: float) -> Any:
        import torch
        from connito.moe.head import Head
        from connito.moe.resident import read_targets, target_parameters

        rows, head = target_parameters(model), Head(model)
        adamw = torch.optim.AdamW(rows.values(), lr=rate, betas=self.betas, weight_decay=0.0)
        seen = {name: torch.zeros_like(row) for name, row in rows.items()}
        for batch in batches:
            ids = torch.from_numpy(batch.astype(np.int64))
            adamw.zero_grad()
            head.nll(ids[:, :-1], ids[:, 1:]).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(rows.values(), 1.0)
            for name, row in rows.items():
                if row.grad is None:
                    continue
                seen[name] += row.grad / len(batches)
                if self.kind == "fedprox":
                    row.grad += PROXIMAL * (row.detach() - theta[name])
                elif self.kind == "scaffold" and self.common:
                    row.grad += self.common[name] - self.variate[name]
            adamw.step()
        self.variate = seen
        return read_targets(model)


def exchange(miners: list[Miner]) -> None:
    """Give everybody SCAFFOLD's mean gradient of the cycle."""
    if miners[0].kind == "scaffold":
        mean = {name: sum(m.variate[name] for m in miners) / len(miners) for name in miners[0].variate}
        for miner in miners:
            miner.common = mean
