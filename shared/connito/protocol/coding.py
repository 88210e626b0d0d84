"""Meaning of a submission's bytes: the one place where a coded pseudo-gradient becomes rows.

Whoever judges, merges or audits a submission works on its decoded state, θ_t − decode(bytes), with the names, shapes and types of
the state θ_t that it began from. It is the same to the bit for everybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from connito.data.codecs.file import Codec, codec, coding, read_coded, read_note
from connito.data.codecs.planes import packed
from connito.data.codecs.scales import Floats
from connito.data.pseudo_gradients import load_float32
from connito.data.tensors import Array, Layout, TensorWriter, from_float32, read_header, to_float32
from connito.errors import Invalid
from connito.protocol.claims import ROUTED
from connito.protocol.policy.choices import ROWS, SPARSE
from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import MergePolicy, TrainPolicy

# SHA-256 in hex, and bytes.
Digested = tuple[str, int]


def is_coded(policy: TrainPolicy) -> bool:
    """Return whether submissions under a policy are coded; they are rows where it says nothing."""
    return policy.codec not in ("", ROWS)


def codec_of(policy: TrainPolicy) -> Codec:
    """Return the codec of a policy under which submissions are coded."""
    return codec(policy.codec, policy.codec_rank, policy.codec_share)


def carries(policy: TrainPolicy) -> bool:
    """Return whether a miner adds what coding left out to its next submission: directions that were not sent are missed, and the
    rounding of numbers that all were sent is noise, of more harm than use a cycle later (`bench.wire`).
    """
    return policy.codec in SPARSE


def step_codec(policy: MergePolicy) -> Codec | None:
    """Return the codec of a policy's outer steps; None where versions are published as rows alone."""
    return None if policy.step_codec in ("", ROWS) else codec(policy.step_codec)


def usual_bytes(policy: TrainPolicy, shapes: Sequence[tuple[int, ...]]) -> int:
    """Return about how many bytes a coded submission of tensors of these shapes has: noise codes as pseudo-gradients do."""
    how, sample = codec_of(policy), (256, 4096)
    if how.name == "low-rank":
        # Factors are next to incompressible, and depend on the shape.
        return sum(size.most for shape in shapes for size in how.sizes(shape))
    noise = np.random.default_rng(0).standard_normal(sample, np.float32)
    return sum(map(math.prod, shapes)) * len(packed(how.encode(noise))) // math.prod(sample)


def decoded(submission: Path, base: Path, policy: TrainPolicy, folder: Path) -> Path:
    """Return the state that a submission stands for, begun from the state in `base`: the file itself where rows are sent, else a
    new one in `folder`.

    Raises `Invalid` for bytes that no encoder writes. One tensor is in memory at a time.
    """
    if not is_coded(policy):
        return submission
    path = folder / f"{submission.name}-{base.name}.rows"
    _decode(path, codec_of(policy), submission, base, stated(submission, policy))
    return path


def decode_to(out: Path, how: Codec, coded: Path, base: Path) -> Digested:
    """Write the state that lies a coded δ from the one in `base`, with its metadata; return SHA-256 and bytes.

    Raises `Invalid` for bytes that no encoder writes. One tensor is in memory at a time.
    """
    writer = _decode(out, how, coded, base, digested=True)
    return writer.digest, writer.size


def _decode(
    out: Path,
    how: Codec,
    coded: Path,
    base: Path,
    said: Mapping[str, str] = MappingProxyType({}),
    *,
    digested: bool = False,
) -> TensorWriter:
    layout = _shapes(base)
    with TensorWriter(out, layout, {**read_header(base).metadata, **said}, digested=digested) as writer:
        assert writer.names == sorted(layout), "a state has one dtype"
        for name, delta in read_coded(how, layout, coded):
            writer.write(name, _moved(load_float32(base, name), delta, layout[name][0]))
    return writer


def code_step(how: Codec, name: str, before: Floats, stepped: Array, dtype: str) -> tuple[bytes, Array]:
    """Return the coded outer step of one tensor from `before`, and what it decodes to, which is the version's then.

    Nothing of what coding leaves out is kept: the next cycle's work starts from where this one came to. `stepped` is as a state
    of this dtype stores it.
    """
    planes = how.encode(before - to_float32(stepped, dtype))
    return packed(planes), _moved(before, how.decode(planes, before.shape, name), dtype)


def stated(submission: Path, policy: TrainPolicy) -> dict[str, str]:
    """Return what a submission states of itself: the metadata of rows, or of a coded file its note, a claim."""
    if not is_coded(policy):
        return read_header(submission).metadata
    note = read_note(codec_of(policy), submission)
    return {ROUTED: note.decode(errors="replace")} if note else {}


def encode(
    rows: Path, base: Path, policy: TrainPolicy, left: Path | None, coded: Path, leaves: Path | None = None
) -> None:
    """Write the pseudo-gradient of the state in `rows`, begun from `base`, to `coded`, and what coding leaves out to `leaves`.

    `left` is what coding left out before, float32 over the same rows: it is added. Numbers that are not finite are coded as such,
    are refused by whoever decodes them, and leave nothing. Raises `Invalid` when `rows` has other tensors than `base`.
    """
    how, layout = codec_of(policy), _same_layout(base, rows)
    before = (
        None if left is None or _shapes(left) != {name: ("F32", shape) for name, (_, shape) in layout.items()} else left
    )

    def wanted(name: str) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            delta = load_float32(base, name) - load_float32(rows, name)
            return delta if before is None else delta + load_float32(before, name)

    work = coding(how, layout, wanted, coded, read_header(rows).metadata.get(ROUTED, "").encode())
    try:
        if leaves is not None:
            with TensorWriter(leaves, {name: ("F32", shape) for name, (_, shape) in layout.items()}) as writer:
                for name, values, planes in work:
                    dtype, shape = layout[name]
                    moved = _moved(start := load_float32(base, name), how.decode(planes, shape, name), dtype)
                    writer.write(name, values - (start - to_float32(moved, dtype)))
    except Invalid as error:
        if error.reason != reasons.REASON_NON_FINITE:
            raise
    for _ in work:  # What is not finite is written all the same.
        pass


def _same_layout(base: Path, rows: Path) -> Layout:
    layout = _shapes(base)
    if _shapes(rows) != layout:
        raise Invalid("these rows are not those of the run's target experts", reason=reasons.REASON_WRONG_TENSORS)
    return layout


def _shapes(state: Path) -> Layout:
    return {name: (entry.dtype, entry.shape) for name, entry in read_header(state).entries.items()}


def _moved(start: Floats, delta: Floats, dtype: str) -> Array:
    """Return θ_t − δ of one tensor as the state stores it: one subtraction and one rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return from_float32(start - delta, dtype)
