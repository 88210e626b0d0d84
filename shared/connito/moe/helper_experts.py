"""Choice of the frozen experts that stay beside the targets: the most used ones, by number, by bytes, or by a miner's
whole memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2, run_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

    from connito.data.manifest import Manifest

# Of the rule: values that a decoder layer keeps per token, in multiples of the hidden size, and bytes of the output layer's
# chunk. The rule is older than the measured prediction, and auditors compute again what it chose.
_KEPT_PER_LAYER, _HEAD_BYTES = 18, 8 << 22
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LAYER = re.compile(r"\blayers\.(\d+)\.")

Usage = Mapping[int, "npt.NDArray[Any]"]


def most_used(
    usage: Usage, targets: Mapping[int, Sequence[int]], sizes: Mapping[int, int], *, per_layer: int, max_bytes: int
) -> dict[int, list[int]]:
    """Return helpers by layer, most used first: over all layers the most used ones that fit into `max_bytes` together.

    usage: [N] by layer, the share of routing decisions. sizes: bytes of one expert by layer. per_layer caps each layer,
    0 does not. An expert that the domain never uses is no help and is left out.
    """
    ranked = sorted(
        (-float(usage[layer][expert]), layer, expert)
        for layer, chosen in targets.items()
        for expert in range(len(usage[layer]))
        if expert not in set(chosen) and usage[layer][expert] > 0
    )
    helpers: dict[int, list[int]] = {layer: [] for layer in targets}
    left = max_bytes
    for _, layer, expert in ranked:
        if sizes[layer] <= left and (not per_layer or len(helpers[layer]) < per_layer):
            helpers[layer].append(expert)
            left -= sizes[layer]
    return helpers


def by_policy(
    spec: run_pb2.RunSpec, manifest: Manifest, usage: Usage, targets: Mapping[int, Sequence[int]]
) -> dict[int, list[int]] | None:
    """Return helpers as the policy's caps in bytes want them; None when it has none and counts per layer instead.

    Raises `Invalid` (SELECTION_FAILED) when the training model is too large for the memory asked for without any helper.
    """
    policy, caps = spec.selection, []
    if policy.helper_max_bytes:
        caps.append(policy.helper_max_bytes)
    if policy.resident_max_bytes:
        alone = rule_bytes(spec, manifest, targets)
        if alone > policy.resident_max_bytes:
            raise Invalid(
                f"selection.resident_max_bytes is {policy.resident_max_bytes}, and without any helper the training model "
                f"is predicted to take {alone} bytes: raise it, or select fewer experts (selection.max_experts)",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        caps.append(policy.resident_max_bytes - alone)
    if not caps:
        return None
    return most_used(usage, targets, manifest.expert_bytes(), per_layer=policy.helpers_per_layer, max_bytes=min(caps))


def frozen_and_trained(manifest: Manifest, targets: Mapping[int, Sequence[int]]) -> tuple[int, int]:
    """Return bytes as loaded of what stays in memory without any helper, and of the target rows. Raises `Invalid` for a
    selection of another base.
    """
    sizes = manifest.expert_bytes()
    odd = [layer for layer in targets if layer not in sizes]
    if odd:
        raise Invalid(
            f"the selection names layer {odd[0]}, and the base's MoE layers are {sorted(sizes)}: it was made for another "
            "base model",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    frozen = sum(manifest.loaded_bytes(name) for name in manifest.tensors if manifest.is_expert(name) not in targets)
    return frozen, sum(sizes[layer] * len(set(experts)) for layer, experts in targets.items())


def rule_bytes(spec: run_pb2.RunSpec, manifest: Manifest, targets: Mapping[int, Sequence[int]]) -> int:
    """Return the memory that `selection.resident_max_bytes` counts: weights, gradients and moments exactly, float32 copies of
    shorter rows, and an estimate of activations.
    """
    frozen, trained = frozen_and_trained(manifest, targets)
    if spec.selection.background:
        frozen += sum(manifest.expert_bytes()[layer] for layer in targets)
    item = [
        4,
        *(_ITEM_BYTES.get(manifest.dtype(name), 4) for name in manifest.tensors if manifest.is_expert(name) in targets),
    ][-1]
    masters = 4 * (trained // item) if item < 4 else 0
    layers = 1 + max((int(m[1]) for name in manifest.tensors if (m := _LAYER.search(name))), default=0)
    hidden = min(
        (t.shape[-1] for name, t in manifest.tensors.items() if "embed" in name and len(t.shape) == 2), default=0
    )
    tokens = spec.training.batch_sequences * spec.training.sequence_length
    kept = tokens * hidden * _KEPT_PER_LAYER * 4 * max(1, layers - min(targets, default=0))
    return frozen + 2 * (trained + masters) + 8 * (trained // item) + kept + _HEAD_BYTES
