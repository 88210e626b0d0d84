"""Functions of experts as vectors that can be compared: their outputs on drawn activations, before and after training.

A permutation of hidden neurons, or a factor or sign moved from one projection to another, leaves an expert's function
as it is and its weights unrecognisable. So what is compared is f_i(x) − f_base(x) on activations x that nobody knew
before commitments were closed. Activations are drawn as signs from raw Philox words, whose stream numpy keeps stable.

A vector has about `NUMBERS` entries whatever the model's size, by fewer activations and outputs per expert where there
are more experts: for n miners the cost is n times a reading of their files, and n² products of such vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connito.data.pseudo_gradients import load_float32
from connito.data.tensors import read_header
from connito.runtime.compute import usable_cores
from connito.wire.hashing import hash_fields

NUMBERS = 1 << 15
MOST, FEWEST = 64, 4
_TAG = b"connito.v1.activations"
_DOWN = "down_proj"
_FIRST = ("gate_up_proj", "up_proj")

Matrix = NDArray[np.float64]


def function_gram(states: Sequence[Path], bases: Sequence[Path], seed: bytes) -> Matrix:
    """Return inner products [n, n] of the changes of function. Zeros where no expert's layout is understood."""
    files = list(dict.fromkeys([*bases, *states]))
    with ThreadPoolExecutor(usable_cores()) as pool:
        of = dict(zip(files, pool.map(lambda file: outputs(file, seed), files), strict=True))
    rows = [of[state] - of[base] for state, base in zip(states, bases, strict=True)]
    if not rows:
        return np.zeros((0, 0))
    # Products of overflowing numbers are no likeness.
    changes = np.nan_to_num(np.stack(rows), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(changes @ changes.T)


def outputs(state: Path, seed: bytes) -> Matrix:
    """Return the outputs of all experts in a state file, one after the other: float64 [about NUMBERS]."""
    layers = list(_layers(state))
    experts = sum(count for _, _, count in layers)
    each = max(FEWEST, NUMBERS // max(1, experts))
    draws = min(MOST, max(FEWEST, each // FEWEST))
    with np.errstate(all="ignore"):
        found = [_layer(state, first, down, seed, draws, max(1, each // draws)) for first, down, _ in layers]
    return np.concatenate([part for part in found if part is not None] or [np.zeros(1)])


def _layers(state: Path) -> Iterator[tuple[str, str, int]]:
    entries = read_header(state).entries
    for down in sorted(name for name in entries if name.endswith(_DOWN)):
        stem = down.removesuffix(_DOWN)
        first = next((stem + name for name in _FIRST if stem + name in entries), None)
        if first is not None and len(entries[first].shape) == len(entries[down].shape) == 3:
            yield first, down, entries[down].shape[0]


def _layer(state: Path, first: str, down: str, seed: bytes, draws: int, kept: int) -> Matrix | None:
    """Return one layer's outputs [experts · draws · kept]; None for a layout that is not known."""
    into, out = load_float32(state, first), load_float32(state, down)
    gated = first.endswith("gate_up_proj")
    width = 2 if gated else 1
    if into.shape[1] == width * out.shape[2] and into.shape[2] == out.shape[1]:
        interleaved = False
    elif into.shape[2] == width * out.shape[1] and into.shape[1] == out.shape[2]:
        into, out = into.swapaxes(1, 2), out.swapaxes(1, 2)
        # Fused with biases, gate and up alternate (the layout of gpt-oss).
        interleaved = gated and f"{first}_bias" in read_header(state).entries
    else:
        return None
    signs = _signs(seed, down, (draws + kept) * into.shape[2]).reshape(draws + kept, -1)
    inputs, projection = signs[:draws], signs[draws:] / np.sqrt(into.shape[2])
    found = []
    for rows, back in zip(into, out, strict=True):
        hidden = inputs @ rows.T.astype(np.float64)
        found.append((_activated(hidden, gated, interleaved) @ back.T.astype(np.float64)) @ projection.T)
    return np.concatenate([part.reshape(-1) for part in found])


def _activated(hidden: Matrix, gated: bool, interleaved: bool) -> Matrix:
    """Apply SiLU gating, or a squared ReLU without a gate: any law that a family has keeps the symmetries of these."""
    if not gated:
        return np.asarray(np.square(np.maximum(hidden, 0.0)))
    half = hidden.shape[1] // 2
    gate, up = (hidden[:, ::2], hidden[:, 1::2]) if interleaved else (hidden[:, :half], hidden[:, half:])
    return np.asarray(gate / (1.0 + np.exp(-gate)) * up)


def _signs(seed: bytes, name: str, count: int) -> Matrix:
    key = int.from_bytes(hash_fields(_TAG, seed, name)[:16], "big")
    words = np.random.Philox(key=key).random_raw((count + 63) // 64)
    bits = np.unpackbits(np.asarray(words, dtype="<u8").view(np.uint8), bitorder="little")[:count]
    return bits.astype(np.float64) * 2.0 - 1.0
