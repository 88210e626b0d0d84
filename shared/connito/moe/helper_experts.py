"""Choice of the frozen experts that stay beside the targets: the most used ones, by number, by bytes, or by a miner's
whole memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.moe.footprint import Workload, predict
from connito.v1 import reasons_pb2, run_pb2

if TYPE_CHECKING:
    import numpy.typing as npt

    from connito.data.manifest import Manifest

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
        training = spec.training
        work = Workload(training.batch_sequences, training.sequence_length, background=policy.background)
        alone = predict(manifest, targets, {}, work).total
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
