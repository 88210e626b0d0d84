"""Prediction of a training model's memory from the base's manifest alone, before a byte of it is loaded.

Weights, gradients and moments are exact, since every tensor's size is in the manifest. Activations are an estimate; the
number says so. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from connito.data.manifest import Manifest
from connito.errors import Invalid
from connito.moe.engine import HEAD_VALUES, Engine, state_bytes
from connito.moe.residency import ALL, AUTO, FOUR_BIT, HELPERS, RESIDENCIES, four_bit_bytes
from connito.render.formats import size
from connito.v1 import reasons_pb2

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Values that a decoder layer keeps per token for its backward pass, in multiples of the hidden size: the inputs of two
# norms, of attention's four projections, of the router and the experts, and what the experts keep inside.
KEPT_PER_LAYER = 18
# The output layer works on this many logits at a time, in float32 and in the weights' type.
HEAD_BYTES = 8 * HEAD_VALUES
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Workload:
    """A miner's training settings. `sequences` go through the model at once; `half` holds what is frozen in bfloat16;
    `residency`: see `connito.moe.residency`.
    """

    sequences: int
    length: int
    half: bool = False
    background: bool = False
    residency: str = HELPERS
    engine: Engine = field(default_factory=Engine)

    def choices(self, residency: str, checkpointing: str) -> list[Workload]:
        """Return what a machine may choose from, best first: what costs time comes before what costs precision.

        residency: one of `connito.moe.residency`, or auto; checkpointing: on, off, or auto.
        """
        return [
            replace(self, residency=held, engine=replace(self.engine, checkpointing=again))
            for held in (RESIDENCIES if residency == AUTO else (residency,))
            for again in ((False, True) if checkpointing == AUTO else (checkpointing == "on",))
        ]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training model at work."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum of all parts, in bytes."""
        return self.weights + self.gradients + self.moments + self.activations

    def to_json(self) -> dict[str, int]:
        """Return the parts and their sum, in bytes."""
        return {**asdict(self), "total": self.total}


def predict(
    manifest: Manifest, targets: Mapping[int, Sequence[int]], helpers: Mapping[int, Sequence[int]], work: Workload
) -> Footprint:
    """Return the footprint of the training model M(Φ, R, θ ∪ H). Raises `Invalid` for a selection of another base."""
    sizes, counts = manifest.expert_bytes(), manifest.experts()
    odd = [layer for layer in targets if layer not in counts]
    if odd:
        raise Invalid(
            f"the selection names layer {odd[0]}, and the base's MoE layers are {sorted(counts)}: it was made for another "
            "base model",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    frozen, item, stored = 0, 4, "F32"
    for name in manifest.tensors:
        layer, dtype = manifest.is_expert(name), manifest.dtype(name)
        if layer is None or (layer not in targets and work.residency != FOUR_BIT):
            frozen += _halved(manifest.loaded_bytes(name), dtype, work.half)
        elif work.residency == FOUR_BIT:
            frozen += _packed(manifest, name, counts[layer], len(set(targets.get(layer, ()))))
        if layer in targets:
            item, stored = ITEM_BYTES.get(dtype, 4), dtype
    trained = sum(sizes[layer] * len(set(experts)) for layer, experts in targets.items())
    beside = sum(sizes[layer] * _beside(counts[layer], set(helpers.get(layer, ())), work) for layer in targets)
    frozen += beside * 2 // item if work.half and item > 2 else beside
    numbers = trained // item
    return Footprint(
        weights=frozen + trained,
        gradients=trained,
        # What completes shorter rows to float32 is counted here too.
        moments=round(numbers * state_bytes(stored, work.engine.optimizer)) - trained,
        activations=_activations(manifest, min(targets, default=0), work),
    )


def best_fit(
    manifest: Manifest,
    targets: Mapping[int, Sequence[int]],
    helpers: Mapping[int, Sequence[int]],
    choices: Sequence[Workload],
    have: int,
) -> tuple[Workload, Footprint]:
    """Return the first of `choices` whose training model fits into `have` bytes, with its footprint; the last if none does."""
    for chosen in choices:
        need = predict(manifest, targets, helpers, chosen)
        if need.total <= have:
            break
    return chosen, need


def _beside(experts: int, helpers: Set[int], work: Workload) -> int:
    """Return how many experts of an adapted layer are held as they are stored, beside the targets' own copies."""
    if work.residency == ALL:
        return experts
    return 0 if work.residency == FOUR_BIT else len(helpers) + int(work.background)


def _packed(manifest: Manifest, name: str, experts: int, trained: int) -> int:
    """Return bytes in four bits of what a tensor holds of the frozen experts: a row of each, or one expert's matrix."""
    values, frozen = manifest.values(name), experts - trained
    if manifest.banks[name].expert is not None:
        return four_bit_bytes(values) * frozen // experts
    matrix = len(manifest.tensors[name].shape) > 2
    return frozen * (four_bit_bytes(values // experts) if matrix else manifest.loaded_bytes(name) // experts)


def _halved(length: int, dtype: str, half: bool) -> int:
    return length * 2 // ITEM_BYTES[dtype] if half and ITEM_BYTES.get(dtype, 0) > 2 else length


def _activations(manifest: Manifest, first: int, work: Workload) -> int:
    """Estimate: what the layers from the first adapted one upward keep, and the output layer's chunk."""
    layers = 1 + max((int(m[1]) for name in manifest.tensors if (m := _LAYER.search(name))), default=0)
    hidden = min(
        (tensor.shape[-1] for name, tensor in manifest.tensors.items() if "embed" in name and len(tensor.shape) == 2),
        default=0,
    )
    per_layer = work.sequences * work.length * hidden * KEPT_PER_LAYER * (2 if work.half else 4)
    backward = max(1, layers - first)
    if work.engine.checkpointing:
        # The input of every layer, and one layer at a time from there.
        return per_layer + per_layer // KEPT_PER_LAYER * backward + HEAD_BYTES
    return per_layer * backward + HEAD_BYTES


def require_fit(need: Footprint, have: int, where: str) -> None:
    """Raise `Invalid` (DOES_NOT_FIT) with the numbers and what would make it fit, unless `have` bytes are enough."""
    if need.total <= have:
        return
    raise Invalid(
        f"the training model needs {size(need.total)} (weights {size(need.weights)}, gradients {size(need.gradients)}, moments "
        f"{size(need.moments)}, activations about {size(need.activations)}) and {where} has {size(have)} free; set "
        "CONNITO_MICRO_BATCH=1 and CONNITO_BF16_PARAMETERS=true, use a larger machine, or ask for fewer helpers "
        "(selection.helpers_per_layer, selection.resident_max_bytes)",
        reason=reasons_pb2.REASON_DOES_NOT_FIT,
    )


def free_bytes() -> int:
    """Return memory that this process may still take: what the system has available, or less where a control group
    says so.
    """
    available: float = math.inf
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # The group's use counts what it read from disk, which the kernel gives back when memory is asked for.
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(counts["active_file"]) + int(counts["inactive_file"])
        available = min(available, limit - max(0, used - cached))
    return 1 << 62 if available == math.inf else int(available)
