"""Caps on the cost of a selection: number of experts, bytes to upload, or training memory, per layer or over all layers.

Within a budget the experts with the best scores are taken, whatever their layer; one that does not fit is passed over
for a smaller one. That is the greedy answer to a knapsack, and exact where all experts have one size, as they do in
every published family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from connito.errors import Invalid
from connito.moe.statistics import FloatArray
from connito.protocol.policy.choices import SCOPE, SCOPES
from connito.v1 import reasons_pb2

# Two fp32 AdamW moments per trained parameter.
MOMENT_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """Bytes of one expert of a layer: its rows as stored (`upload`), and what training it takes (`training`)."""

    upload: int
    training: int


@dataclass(frozen=True)
class Budget:
    """Caps; 0 is none. `scope`: global, over all layers, or layer, each layer on its own.

    experts    how many
    size       bytes of their rows, which is what a miner uploads
    memory     bytes that a miner's training takes: `resident`, which is there whatever is selected (everything but the
               routed experts, and the helpers), plus rows, gradients and two moments of each selected expert. Activations
               are not in it. Memory has no layers, so its scope is always global.
    """

    experts: int = 0
    size: int = 0
    memory: int = 0
    scope: str = SCOPE
    costs: Mapping[int, Cost] = field(default_factory=dict)
    resident: int = 0

    def __bool__(self) -> bool:
        return bool(self.experts or self.size or self.memory)

    def check(self) -> None:
        """Raise `Invalid`, with the remedy, for a budget that no expert fits."""
        if self.scope not in SCOPES:
            raise _invalid(f"unknown scope {self.scope!r} of a budget: use {' or '.join(SCOPES)}")
        if min(self.experts, self.size, self.memory) < 0:
            raise _invalid("a budget is below zero: give a positive cap, or 0 for none")
        if not (self.size or self.memory):
            return
        smallest = min((cost.upload for cost in self.costs.values()), default=0)
        if smallest <= 0:
            raise _invalid("a cap in bytes needs the size of an expert: give --base, or cap with --max-experts")
        if self.size and self.size < smallest:
            raise _invalid(
                f"the budget of {self.size} bytes is too small for one expert, which takes {smallest}: raise --max-bytes"
            )
        least = self.resident + min(cost.training for cost in self.costs.values())
        if self.memory and self.memory < least:
            raise _invalid(
                f"the budget of {self.memory} bytes of memory is too small for one expert: {self.resident} bytes are resident "
                f"whatever is selected, and training one expert needs {least} in all: raise --max-vram, or keep fewer helpers"
            )

    def fit(self, layers: Mapping[int, list[int]], scores: Mapping[int, FloatArray]) -> dict[int, list[int]]:
        """Return the best of `layers` (expert ids, best first) by score that stay within every cap; the order is kept."""
        if self.scope == "layer":
            each = replace(self, scope="global", memory=0)
            layers = {index: each.fit({index: experts}, scores)[index] for index, experts in layers.items()}
            if not self.memory:
                return dict(layers)
            return replace(self, scope="global", experts=0, size=0).fit(layers, scores)
        ranked = sorted(
            ((float(scores[i][e]), i, rank, e) for i, experts in layers.items() for rank, e in enumerate(experts)),
            key=lambda item: (-item[0], item[1], item[2]),
        )
        kept: dict[int, list[int]] = {i: [] for i in layers}
        count, size, memory = 0, 0, self.resident
        for _, index, _, expert in ranked:
            cost = self.costs.get(index, Cost(0, 0))
            if self.experts and count >= self.experts:
                break
            if (self.size and size + cost.upload > self.size) or (self.memory and memory + cost.training > self.memory):
                continue
            kept[index].append(expert)
            count, size, memory = count + 1, size + cost.upload, memory + cost.training
        return kept


def of_base(
    expert_bytes: Mapping[int, int],
    model_bytes: int,
    experts: Mapping[int, int],
    *,
    value_bytes: int,
    helpers_per_layer: int = 0,
) -> tuple[dict[int, Cost], int]:
    """Return (costs by layer, resident bytes) of a base: sizes of one expert by layer, of the model, and numbers of
    experts.

    value_bytes: of one stored value, 2 for BF16. Gradients have the type of the rows.
    """
    costs = {index: Cost(size, 2 * size + size // value_bytes * MOMENT_BYTES) for index, size in expert_bytes.items()}
    absent = sum(size * max(0, experts[index] - helpers_per_layer) for index, size in expert_bytes.items())
    return costs, model_bytes - absent


def _invalid(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_SELECTION_FAILED)
