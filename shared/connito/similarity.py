"""Finding copies: two pseudo-gradients that point the same way, and the later commitment is the copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connito.pseudo_gradients import Deltas, gram_matrix
from connito.v1 import cycle_pb2


def cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine similarities [n, n] from inner products. A zero pseudo-gradient is similar to nothing."""
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return np.asarray(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0))


def pairwise_cosines(deltas: Deltas) -> NDArray[np.float64]:
    """Cosine similarities [n, n] of pseudo-gradients, streaming over tensors. Scaling a copy does not hide it."""
    return cosines(gram_matrix(deltas))


def copies(
    submissions: Sequence[cycle_pb2.Submission], similarity: NDArray[np.float64], threshold: float
) -> dict[str, str]:
    """Copy -> original, both miner keys; `similarity` [n, n] is in the order of `submissions`.

    Of two submissions whose similarity reaches the threshold, or whose artifacts are the same, the one committed later
    is the copy, never both. A copy of a copy is traced to the first. A threshold of 0 means exact copies only.
    """
    order = sorted(range(len(submissions)), key=lambda i: (submissions[i].commit_sequence, submissions[i].miner))
    original: dict[str, str] = {}
    for place, later in enumerate(order):
        for earlier in order[:place]:
            if _alike(submissions[earlier], submissions[later], float(similarity[earlier, later]), threshold):
                first = submissions[earlier].miner
                original[submissions[later].miner] = original.get(first, first)
                break
    return original


def _alike(one: cycle_pb2.Submission, other: cycle_pb2.Submission, similarity: float, threshold: float) -> bool:
    same_file = one.artifact.digest == other.artifact.digest and one.artifact.digest != ""
    return same_file or (threshold > 0.0 and similarity >= threshold)
