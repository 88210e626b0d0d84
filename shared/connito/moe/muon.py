"""Muon (Jordan et al., 2024) over a miner's target rows: momentum whose singular values are all made about 1, matrix by matrix.

A step moves every direction of a matrix alike, where AdamW's follows the few that gradients of one text share. Its size is that
of AdamW's at the same learning rate, RMS 0.2 (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2). As the inner
optimiser of DiLoCo it is MuLoCo (Thérien et al., 2025).

Of a bank's experts the one with the longest gradient takes that step, and the others a share of it as their gradients are
shorter; without tokens an expert stays where it is. Otherwise a step would be as long for an expert that a few tokens went to
as for one that most did, and where miners' texts differ much of a submission would be noise. An expert's matrices are
taken as its bank holds them, gate and up projection as one; vectors take AdamW's step. Every cycle begins without momentum:
what points where the miner was going before the merge is the outer step's. Beside a trained value lie one byte or four for it,
half of what AdamW keeps.
"""

from __future__ import annotations

import torch

from connito.moe.adamw import AdamW
from connito.moe.moments import BLOCK, Moment

# Of x ↦ px with p = a + bxxᵀ + c(xxᵀ)², five times: what is small grows fastest that way. All the p commute with xxᵀ, so the
# iterations are those of xxᵀ ↦ p xxᵀ p, a matrix as small as x's shorter side, and x is multiplied once, by their product.
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
RMS, MOMENTUM = 0.2, 0.9


class Muon(AdamW):
    """The optimiser of named tensors: Muon for banks of matrices [S, a, b], AdamW for everything else."""

    def _update(self, name: str, parameter: torch.Tensor, rate: float, factor: torch.Tensor | None) -> None:
        if parameter.ndim != 3:
            super()._update(name, parameter, rate, factor)
            return
        if name not in self._first:
            self._first[name] = Moment.zeros(parameter, compact=self._compact, signed=True)
        assert parameter.grad is not None
        gradient, size = parameter.grad.reshape(-1), parameter[0].numel()
        norms = torch.linalg.vector_norm(parameter.grad, dim=(1, 2), dtype=torch.float32)
        shares = norms / norms.max().clamp_min(torch.finfo(torch.float32).tiny)
        # One expert at a time, or all where their numbers would share a scale.
        size = size if size % BLOCK == 0 else parameter.numel()
        for begin in range(0, parameter.numel(), size):
            part = gradient[begin : begin + size].float()
            part = part if factor is None else part * factor
            momentum = self._first[name].read(begin, begin + size).lerp_(part, 1 - MOMENTUM)
            step = orthogonal(part.lerp(momentum, MOMENTUM).view(-1, *parameter.shape[1:]))
            expert = begin // parameter[0].numel()
            step *= shares[expert : expert + len(step), None, None]
            if self._compact:
                self._first[name].write(begin, momentum)
            values = self._value(name, begin, begin + size).mul_(1 - rate * self._decay)
            values.add_(step.view(-1), alpha=-rate * RMS * max(parameter.shape[1:]) ** 0.5)
            self._put(name, begin, begin + size, values)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices [n, a, b] with the singular vectors of the given ones and singular values of about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    x: torch.Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    tall = x.shape[-2] > x.shape[-1]
    gram = x.mT @ x if tall else x @ x.mT
    taken = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        taken = factor @ taken
        gram = factor @ (gram @ factor)
    return x @ taken if tall else taken @ x
