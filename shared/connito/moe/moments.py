"""AdamW's memory between cycles: what a miner keeps to itself so that a new cycle does not begin with empty moments.

With H local steps a cycle and moments that start at zero, most of a cycle passes before the second moment means anything:
its first steps have the size of the learning rate whatever the gradient. DiLoCo (Douillard et al., 2023, section 2) lets
every worker keep its inner optimiser's state. Here a miner keeps all of it or, by default, the second moment alone: the
first one points where that miner was going before the merge, which outer momentum already says better. It never leaves the
miner: nobody needs it to check a submission, and losing it costs a few steps, not a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.moe.state import TargetState, write_safetensors
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch

FIRST, SECOND = "first.", "second."


@dataclass
class Moments:
    """Steps made, and AdamW's first and second moment of every target tensor, float32. Empty: nothing yet."""

    steps: int = 0
    first: TargetState = field(default_factory=dict)
    second: TargetState = field(default_factory=dict)
    # Whether the first moment starts at zero whatever was kept.
    second_only: bool = False

    def fit(self, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the moments belong to these tensors, by name and shape."""
        return bool(self.steps) and all(
            {name: value.shape for name, value in moment.items()} == {name: p.shape for name, p in parameters.items()}
            for moment in (self.first, self.second)
        )

    def install(self, optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Load these moments into `optimiser` and return whether they fit; moments of other tensors are left out."""
        import torch

        if not self.fit(parameters):
            return False
        for name, parameter in parameters.items():
            optimiser.state[parameter] = {
                "step": torch.tensor(float(self.steps)),
                "exp_avg": torch.zeros_like(parameter, dtype=torch.float32)
                if self.second_only
                else self.first[name].to(parameter.device, torch.float32, copy=True),
                "exp_avg_sq": self.second[name].to(parameter.device, torch.float32, copy=True),
            }
        return True

    def correction(self, step: int, beta: float) -> float:
        """Return the factor on the rate of local step `step` (from 0) when only the second moment was kept.

        AdamW counts one number of steps t for both moments and divides the first one by 1 − β₁^t, as if it were that old;
        (1 − β₁^t) / (1 − β₁^{step + 1}) makes that right.
        """
        if not (self.second_only and self.steps):
            return 1.0
        return float((1.0 - beta ** (self.steps + step + 1)) / (1.0 - beta ** (step + 1)))

    def take(self, optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> None:
        """Become what `optimiser` has now, on the CPU. A tensor without a gradient so far has zeros."""
        import torch

        states = {name: optimiser.state.get(parameter, {}) for name, parameter in parameters.items()}
        self.steps = max((int(state["step"]) for state in states.values() if state), default=0)

        def moment(key: str) -> TargetState:
            return {
                name: state[key].detach().to("cpu", torch.float32, copy=True)
                if state
                else torch.zeros(parameters[name].shape)
                for name, state in states.items()
            }

        self.first, self.second = moment("exp_avg"), moment("exp_avg_sq")

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write them to `path`, the same bytes for the same moments."""
        tensors = {FIRST + name: value for name, value in self.first.items()}
        tensors |= {SECOND + name: value for name, value in self.second.items()}
        write_safetensors(path, tensors, {**(metadata or {}), "steps": str(self.steps)})

    @classmethod
    def load(cls, path: Path, *, second_only: bool = False) -> Moments:
        """Read them. Raises `Invalid` (BAD_HEADER) for a file that holds something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                steps = int((file.metadata() or {})["steps"])
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise Invalid(
                f"{path} does not hold an optimiser's moments: {error!r}", reason=reasons_pb2.REASON_BAD_HEADER
            ) from error
        first, second = (
            {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
            for kind in (FIRST, SECOND)
        )
        return cls(steps, first, second, second_only)
