"""The learning rate over a run: how each local step's rate follows from where in the run it is."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Cosine from 1 to `final` over all local steps of a run, and a linear warm-up of `warmup` steps in every cycle.

    `cycles` and `steps` are the run's cycles and the local steps of each. `final` 1 keeps the rate. The warm-up is for
    moments that begin empty: AdamW's first step has the size of the learning rate, whatever the gradient.
    """

    cycles: int
    steps: int
    final: float = 1.0
    warmup: int = 0

    def factor(self, cycle: int, step: int) -> float:
        """Return the factor on the learning rate at local step `step` (from 0) of cycle `cycle` (from 1)."""
        total = max(1, self.cycles * self.steps)
        done = min(1.0, ((cycle - 1) * self.steps + step) / total)
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        return cosine * min(1.0, (step + 1) / (self.warmup + 1))
