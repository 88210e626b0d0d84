"""How much memory a miner needs and what it uploads, from the base's manifest and a selection: no model is loaded.

Weights of everything but the experts, of the targets and of their helpers; gradients and both moments of AdamW of the
targets in float32; the state that δ is computed from. What autograd keeps between forward and backward pass depends on
the family and is passed in where it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from connito.base.manifest import Manifest

# Gradient, first and second moment of every trained parameter.
_TRAINED_COPIES = 3
_FLOAT = 4
_ELEMENT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Needs:
    """Bytes. `upload` is one miner's submission of one cycle; `memory` is the sum of weights, training state and
    activations. A process with torch in it needs some hundreds of megabytes beside."""

    upload: int
    shared_weights: int
    resident_experts: int
    training_state: int
    activations: int
    memory: int
    model: int

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def needs(manifest: Manifest, targets: Mapping[int, int], helpers: int, activations: int = 0) -> Needs:
    """What training `targets` (number of experts by layer) with `helpers` a layer takes.

    Layers without a target keep their whole bank. Expert bytes are those of the checkpoint; training state is float32.
    """
    expert, total = manifest.expert_bytes(), manifest.experts()
    shared = manifest.size - sum(expert[layer] * count for layer, count in total.items())
    whole = sum(expert[layer] * count for layer, count in total.items() if layer not in targets)
    resident = whole + sum(expert[layer] * min(total[layer], count + helpers) for layer, count in targets.items())
    upload = sum(expert[layer] * count for layer, count in targets.items())
    state = _TRAINED_COPIES * upload * _FLOAT // _element(manifest) + upload
    return Needs(upload, shared, resident, state, activations, shared + resident + state + activations, manifest.size)


def least(manifest: Manifest, helpers: int) -> Needs:
    """The least upload and memory that any job on this base takes: its smallest expert, in one layer."""
    sizes = manifest.expert_bytes()
    layer = min(sizes, key=lambda index: (sizes[index], index))
    small = needs(manifest, {layer: 1}, helpers)
    # Every layer may be adapted, which keeps fewer experts than leaving it whole; one trained expert is the least state.
    everywhere = needs(manifest, dict.fromkeys(sizes, 1), helpers)
    memory = small.shared_weights + everywhere.resident_experts + small.training_state
    return Needs(
        small.upload, small.shared_weights, everywhere.resident_experts, small.training_state, 0, memory, small.model
    )


def _element(manifest: Manifest) -> int:
    """Bytes of a parameter of the experts, as the checkpoint stores them."""
    for name, entry in manifest.tensors.items():
        if manifest.is_expert(name) is not None:
            return _ELEMENT.get(entry.dtype, 1)
    return _FLOAT
