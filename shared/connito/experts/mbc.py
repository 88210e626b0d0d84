"""Many experts grouped into few by what they changed, and one expert trained for each group.

MBC (model-based clustering, Ostapenko et al. 2024): of each expert's change the smaller half of the numbers is left out;
experts are then points whose coordinates are their cosines to all experts, which k-means puts into groups; for each
group an expert is trained on the texts of all its members.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.errors import Invalid
from connito.experts.compose import Part, RowKey, Rows, layers_of, rows_of
from connito.experts.tuning import LEARNING_RATE, batches_of
from connito.moe.layout import require_moe_layers
from connito.moe.resident import compress
from connito.moe.training import train_local
from connito.runtime.progress import tell

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

# The share of each expert's numbers that is left out, the smallest first; and how often k-means starts anew.
SPARSITY, STARTS = 0.5, 10


def similarity(parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor]) -> npt.NDArray[np.float64]:
    """Return cosines of the experts' changes [n, n], each without its smaller half; rows that one does not have are zeros."""
    limits = [_limit(part, base) for part in parts]
    count = len(parts)
    gram = np.zeros((count, count))
    for key in sorted({key for part in parts for key in part.rows}):
        having = [i for i, part in enumerate(parts) if key in part.rows]
        deltas = [(parts[i].rows[key].double() - base[key].double()).flatten() for i in having]
        stack = torch.stack(
            [d.where(d.abs() > limits[i], d.new_zeros(())) for i, d in zip(having, deltas, strict=True)]
        )
        gram[np.ix_(having, having)] += (stack @ stack.T).numpy()
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return np.asarray(np.divide(gram, scale, out=np.eye(count), where=scale > 0))


def _limit(part: Part, base: Mapping[RowKey, torch.Tensor]) -> float:
    sizes = torch.cat([(row.double() - base[key].double()).abs().flatten() for key, row in sorted(part.rows.items())])
    return float(np.quantile(sizes.numpy(), SPARSITY))


def cluster(parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor], count: int) -> list[list[int]]:
    """Return `count` groups of experts, each ascending, ordered by their first member. Deterministic."""
    from scipy.cluster.vq import ClusterError, kmeans2

    if not 1 <= count <= len(parts):
        raise Invalid(f"{len(parts)} experts cannot form {count} clusters")
    points, found = similarity(parts, base), []
    for start in range(STARTS):
        try:
            centres, labels = kmeans2(points, count, minit="++", missing="raise", rng=start)
        except ClusterError:  # a group was left without a member
            continue
        spread = float(((points - centres[labels]) ** 2).sum())
        found.append((round(spread, 12), [[int(i) for i in np.flatnonzero(labels == n)] for n in range(count)]))
    if not found:
        raise Invalid(f"{len(parts)} experts do not form {count} clusters: some are the same; ask for fewer")
    return sorted(min(found)[1])


def train_cluster(
    model: nn.Module,
    members: Sequence[Part],
    sequences: Sequence[npt.NDArray[Any]],
    steps: int,
    rate: float = LEARNING_RATE,
) -> Rows:
    """Return the rows that any of `members` has, trained from the bare base `model` on their texts int32 [n, L + 1] in turn."""
    tell(f"training one expert for {len(members)}")
    layers = layers_of({key: None for part in members for key in part.rows})
    found = require_moe_layers(model)
    others = {i: [e for e in range(found[i].num_experts) if e not in experts] for i, experts in layers.items()}
    size = min(map(len, sequences))
    turns = np.stack([table[:size] for table in sequences], axis=1).reshape(-1, sequences[0].shape[1])
    worker = compress(copy.deepcopy(model), layers, others)
    state, _ = train_local(worker, batches_of(turns, steps), learning_rate=rate)
    return rows_of(layers, state)
