"""One step of AdamW over bfloat16 rows, by this project and by libraries: how long it takes, and what it loses.

*lost* is the distance from float32 AdamW after some steps, over the distance that it went: small steps that a bfloat16 number
does not resolve are lost where nothing keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SHAPE, STEPS, RATE, BETAS = (8, 1 << 19), 12, 1e-5, (0.9, 0.95)


def compare() -> list[dict[str, Any]]:
    """Return seconds of the first step and of a later one, and what is lost, by implementation."""
    import torch

    draw = torch.Generator().manual_seed(0)
    start = (torch.randn(SHAPE, generator=draw) * 0.02).bfloat16()
    # Gradients of several sizes that agree over time, as those of a model do.
    mean = torch.randn(SHAPE, generator=draw) * torch.randn(SHAPE, generator=draw).exp() * 1e-3
    gradients = [(mean + 1e-3 * torch.randn(SHAPE, generator=draw)).bfloat16() for _ in range(4)]
    exact = torch.nn.Parameter(start.float())
    _steps(exact, torch.optim.AdamW([exact], lr=RATE, betas=BETAS, weight_decay=0.0).step, gradients)
    rows = []
    for name, make in _MAKERS.items():
        row = torch.nn.Parameter(start.clone())
        step = make(row)
        seconds = _steps(row, step, gradients)
        found = row.detach().float()
        moved = exact.detach() - start.float()
        rows.append(
            {
                "implementation": name,
                "first": round(seconds[0], 2),
                "later": round(sorted(seconds[1:])[len(seconds) // 2], 3),
                "lost": round(float((found - exact.detach()).norm() / moved.norm()), 3),
            }
        )
    return rows


def _steps(row: Any, step: Callable[[], object], gradients: list[Any]) -> list[float]:
    seconds = []
    for number in range(STEPS):
        row.grad = gradients[number % len(gradients)].to(row.dtype)
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return seconds


def _own(compact: bool) -> Callable[[Any], Callable[[], object]]:
    def make(row: Any) -> Callable[[], object]:
        from connito.moe.adamw import AdamW

        optimiser = AdamW({"row": row}, betas=BETAS, compact=compact)
        return lambda: optimiser.step(RATE)

    return make


def _torch(row: Any) -> Callable[[], object]:
    import torch

    return torch.optim.AdamW([row], lr=RATE, betas=BETAS, weight_decay=0.0).step


def _torchao(row: Any) -> Callable[[], object]:
    from torchao.optim import AdamW8bit

    made: Any = AdamW8bit([row], lr=RATE, betas=BETAS, weight_decay=0.0, bf16_stochastic_round=True)
    step: Callable[[], object] = made.step
    return step


def _bitsandbytes(row: Any) -> Callable[[], object]:
    from bitsandbytes.optim import AdamW8bit

    made: Any = AdamW8bit([row], lr=RATE, betas=BETAS, weight_decay=0.0)
    step: Callable[[], object] = made.step
    return step


_MAKERS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "torch AdamW, moments in bfloat16": _torch,
    "torchao AdamW8bit, stochastic rounding": _torchao,
    "bitsandbytes AdamW8bit": _bitsandbytes,
    "connito, moments of four bytes": _own(False),
    "connito, moments of one byte": _own(True),
}
