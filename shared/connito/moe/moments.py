"""AdamW's memory: what a miner keeps to itself, within a cycle and between cycles.

With H local steps a cycle and moments that start at zero, most of a cycle passes before the second moment means anything:
its first steps have the size of the learning rate whatever the gradient. DiLoCo (Douillard et al., 2023, section 2) lets
every worker keep its inner optimiser's state. Here a miner keeps all of it or, by default, the second moment alone: the
first one points where that miner was going before the merge, which outer momentum already says better. It never leaves the
miner: nobody needs it to check a submission, and losing it costs a few steps, not a result.

A moment takes four bytes a value, or one byte and a scale for each block of 256 (Dettmers et al., 2022). A byte counts even
steps of a root of the value: the square root of a first moment, the fourth root of a second one. Small values next to a
large one so keep their first digits, with plain arithmetic where a table of 256 numbers would have to be searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from connito.errors import Invalid
from connito.moe.state import write_safetensors
from connito.v1 import reasons_pb2

FIRST, SECOND, SCALES = "first.", "second.", "scales."
# Values that share a scale. Parts of a moment are read and written from a multiple of it.
BLOCK = 256


@dataclass
class Moment:
    """One moment of one tensor, flat: float32, or int8 (first) and uint8 (second) with float32 `scales`, one a block."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def zeros(cls, like: torch.Tensor, *, compact: bool, signed: bool) -> Moment:
        """Return a moment of zeros for a tensor, on its device."""
        count, device = like.numel(), like.device
        if not compact:
            return cls(torch.zeros(count, dtype=torch.float32, device=device))
        kind = torch.int8 if signed else torch.uint8
        scales = torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device)
        return cls(torch.zeros(count, dtype=kind, device=device), scales)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return values [start, stop), float32. Those of a float32 moment are its own memory."""
        values = self.values[start:stop]
        if self.scales is None:
            return values
        roots = torch.mul(_blocks(values), self._scales(start, stop)).view(-1)[: stop - start]
        return roots.mul_(roots.abs()) if self.signed else roots.square_().square_()

    def write(self, start: int, values: torch.Tensor) -> None:
        """Set the values from `start`, a multiple of BLOCK, to `values`, float32 [n]."""
        stop = start + len(values)
        if self.scales is None:
            self.values[start:stop] = values
            return
        blocks = _blocks(values)
        roots = blocks.abs().sqrt_() if self.signed else blocks.sqrt().sqrt_()
        scales = self._scales(start, stop)
        levels = 127 if self.signed else 255
        torch.div(roots.amax(dim=1, keepdim=True), levels, out=scales)
        roots.div_(scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
        # A second moment of nothing beside a first one of something would make a step without bounds.
        roots = roots.copysign_(blocks) if self.signed else roots.clamp_(1, levels)
        self.values[start:stop] = roots.view(-1)[: stop - start]

    @property
    def signed(self) -> bool:
        """Return whether one byte holds a sign."""
        return self.values.dtype == torch.int8

    def tensors(self, name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
        """Return what a file holds of it, under `name`."""
        held = {name: self.values.view(shape)}
        return held if self.scales is None else {**held, SCALES + name: self.scales}

    def bytes(self) -> int:
        """Return the bytes that it takes."""
        parts = [self.values] if self.scales is None else [self.values, self.scales]
        return sum(part.numel() * part.element_size() for part in parts)

    def _scales(self, start: int, stop: int) -> torch.Tensor:
        assert self.scales is not None
        return self.scales[start // BLOCK : -(-stop // BLOCK), None]


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """Return values [n] as blocks [⌈n / BLOCK⌉, BLOCK], the last one filled up with zeros."""
    missing = -len(values) % BLOCK
    return (F.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


@dataclass
class Moments:
    """Steps made, and AdamW's first and second moment of every target tensor that has had a gradient. Empty: nothing yet."""

    steps: int = 0
    first: dict[str, Moment] = field(default_factory=dict)
    second: dict[str, Moment] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    # Whether the first moment starts at zero whatever was kept, and need not be kept.
    second_only: bool = False

    def fit(self, parameters: Mapping[str, torch.Tensor]) -> bool:
        """Return whether there are any and they belong to these tensors, by name and shape."""
        return bool(self.steps) and all(
            name in parameters and parameters[name].shape == shape for name, shape in self.shapes.items()
        )

    def become(self, other: Moments) -> None:
        """Take over what another one holds."""
        self.steps, self.first, self.second, self.shapes = other.steps, other.first, other.second, other.shapes

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write what the next cycle starts from to `path`, the same bytes for the same moments."""
        kinds = {SECOND: self.second} if self.second_only else {FIRST: self.first, SECOND: self.second}
        tensors: dict[str, torch.Tensor] = {}
        for kind, moments in kinds.items():
            for name, moment in moments.items():
                tensors |= moment.tensors(kind + name, self.shapes[name])
        write_safetensors(path, tensors, {**(metadata or {}), "steps": str(self.steps)})

    @classmethod
    def load(cls, path: Path, *, second_only: bool = False) -> Moments:
        """Read them. Raises `Invalid` (BAD_HEADER) for a file that holds something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                steps = int((file.metadata() or {})["steps"])
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            first, second = (
                {
                    name.removeprefix(kind): Moment(value.view(-1), tensors.get(SCALES + name))
                    for name, value in tensors.items()
                    if name.startswith(kind)
                }
                for kind in (FIRST, SECOND)
            )
            shapes = {name: tensors[SECOND + name].shape for name in second}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise Invalid(
                f"{path} does not hold an optimiser's moments: {error!r}", reason=reasons_pb2.REASON_BAD_HEADER
            ) from error
        return cls(steps, first, second, shapes, second_only)
