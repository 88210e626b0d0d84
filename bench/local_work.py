"""A miner's work in the figures on merging: the trainer's own AdamW, and what the literature puts in its place.

fedprox: AdamW on the loss plus μ/2 ‖θ − θ_t‖² (Li et al., "Federated Optimization in Heterogeneous Networks", 2020).
scaffold: gradients corrected by control variates, the mean gradient of all minus the own one, of the cycle before
(Karimireddy et al., "SCAFFOLD", 2020, option II).
muon: momentum made orthogonal by Newton–Schulz iterations, matrix by matrix (Jordan et al., 2024), as the inner step of MuLoCo
(Thérien et al., "MuLoCo: Muon is a practical inner optimizer for DiLoCo", 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.tiny_rig import Tokens

if TYPE_CHECKING:
    from connito.moe.moments import Moments
    from torch import nn

KINDS = ("adamw", "fedprox", "scaffold", "muon")
PROXIMAL = 0.1
# Quintic coefficients of Muon's published iteration.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass
class Miner:
    """The memory of a miner from cycle to cycle. `variate` and `common` are SCAFFOLD's own and mean gradients."""

    kind: str
    moments: Moments | None
    betas: tuple[float, float]
    variate: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    velocity: dict[str, Any] = field(default_factory=dict)

    def work(self, model: nn.Module, theta: Any, batches: Tokens, rate: float) -> Any:
        """Return the state after H steps from θ_t over `batches` [H, B, L + 1]."""
        from connito.moe.resident import write_targets
        from connito.moe.training import train_local

        write_targets(model, theta)
        if self.kind == "adamw":
            return train_local(model, batches, learning_rate=rate, moments=self.moments, betas=self.betas)[0]
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
            if self.kind == "muon":
                self._muon(rows, rate)
            else:
                adamw.step()
        self.variate = seen
        return read_targets(model)

    def _muon(self, rows: Any, rate: float) -> None:
        import torch

        with torch.no_grad():
            for name, row in rows.items():
                if row.grad is None:
                    continue
                before = self.velocity.get(name)
                self.velocity[name] = row.grad.clone() if before is None else 0.9 * before + row.grad
                step = orthogonal(row.grad + 0.9 * self.velocity[name])
                row.sub_(step, alpha=rate * 0.2 * max(row.shape[-2:]) ** 0.5)


def exchange(miners: list[Miner]) -> None:
    """Give everybody SCAFFOLD's mean gradient of the cycle."""
    if miners[0].kind == "scaffold":
        mean = {name: sum(m.variate[name] for m in miners) / len(miners) for name in miners[0].variate}
        for miner in miners:
            miner.common = mean


def orthogonal(matrices: Any) -> Any:
    """Return matrices [S, a, b] with singular values near 1, by five Newton–Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if wide else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x
