"""An expert's routing signature: by layer, the mean hidden state of the tokens that the router sends to its experts.

Experts of one base whose signatures point the same way serve the same kind of text, so a shelf can be searched by it
without touching a model. Vectors are kept as base64 of little-endian float32, and compared after taking off what all
candidates share: hidden states of any text have a large common part. Free of numeric packages, as the library is.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from connito.errors import Invalid
from connito.library.schema import Signature

Vectors = dict[int, list[float]]


def encode_signature(vectors: Mapping[int, Sequence[float]], tokens: Mapping[int, int]) -> Signature:
    """Return the `signature` of a record. `tokens`: the number of tokens behind each layer's mean."""
    return {
        "layers": {
            str(layer): base64.b64encode(struct.pack(f"<{len(vectors[layer])}f", *vectors[layer])).decode()
            for layer in sorted(vectors)
        },
        "tokens": {str(layer): int(tokens[layer]) for layer in sorted(tokens)},
    }


def decode_signature(signature: Mapping[str, Any]) -> Vectors:
    """Return the vectors by layer. Raises `Invalid` for what is no signature."""
    try:
        found = {}
        for layer, text in signature["layers"].items():
            data = base64.b64decode(text, validate=True)
            found[int(layer)] = list(struct.unpack(f"<{len(data) // 4}f", data))
        return found
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise Invalid(f"this is no routing signature: {error!r}; export the expert again") from error


def joint_signature(parts: Sequence[tuple[Signature | None, float]]) -> Signature | None:
    """Return the signature of experts that went into one with these weights: means by |weight| and tokens; None
    without any.
    """
    sums: dict[int, list[float]] = {}
    mass: dict[int, float] = {}
    tokens: dict[int, int] = {}
    for signature, weight in parts:
        if signature is None:
            continue
        counts = signature.get("tokens", {})
        for layer, vector in decode_signature(signature).items():
            count = int(counts.get(str(layer), 1))
            share = abs(weight) * count
            known = sums.setdefault(layer, [0.0] * len(vector))
            sums[layer] = [a + share * b for a, b in zip(known, vector, strict=True)]
            mass[layer], tokens[layer] = mass.get(layer, 0.0) + share, tokens.get(layer, 0) + count
    means = {layer: [x / mass[layer] for x in vector] for layer, vector in sums.items() if mass[layer] > 0}
    return encode_signature(means, {layer: tokens[layer] for layer in means}) if means else None


def nearest(query: Vectors, candidates: Mapping[str, Vectors]) -> list[tuple[str, float]]:
    """Return candidates by similarity to `query`, best first: mean cosine over the layers that both have, about the
    candidates' own mean. Those that share no layer with the query come last, with -1."""
    centres = _centres(candidates)
    scored = {name: _similarity(query, vectors, centres) for name, vectors in candidates.items()}
    return sorted(scored.items(), key=lambda item: (-item[1], item[0]))


def _centres(candidates: Mapping[str, Vectors]) -> Vectors:
    found: dict[int, list[list[float]]] = {}
    for vectors in candidates.values():
        for layer, vector in vectors.items():
            found.setdefault(layer, []).append(vector)
    return {
        layer: [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for layer, rows in found.items()
    }


def _similarity(query: Vectors, vectors: Vectors, centres: Vectors) -> float:
    cosines = []
    for layer in sorted(query.keys() & vectors.keys()):
        one = [a - c for a, c in zip(query[layer], centres[layer], strict=True)]
        other = [b - c for b, c in zip(vectors[layer], centres[layer], strict=True)]
        norms = math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))
        cosines.append(math.fsum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0)
    return math.fsum(cosines) / len(cosines) if cosines else -1.0
