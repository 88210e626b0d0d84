"""A million hostile submissions through the decoder: what comes of each, and the most memory that one took.

Inputs are files of every codec with bytes changed, cut, doubled, put in or taken out, and planes of any bytes behind a right
entropy coder, so that what lies behind it is reached too. Each is either refused with `Invalid` or decodes to finite numbers.
Every sixteenth runs under a tracer of allocations; the bound is what the planes in clear and one tensor may take beside the file.
"""

from __future__ import annotations

import tempfile
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from connito.data.codecs.file import Codec, codec, read_coded, write_coded
from connito.data.tensors import Layout
from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.wire.enums import reason_name

from bench.harness import Options, Result, main, note

LAYOUT: Layout = {"a": ("F32", (2, 16, 24)), "b": ("F32", (70,))}
NUMBERS = 2 * 16 * 24 + 70
INPUTS, QUICK_INPUTS, TRACED = 250_000, 5_000, 16
# Bytes that a decoder may hold for each number: digits, places in 64 bits, floats and their products; and a fixed part.
PER_NUMBER, FIXED = 64, 60_000
CODECS = (codec("ternary"), codec("int4"), codec("int8"), codec("low-rank", rank=3), codec("top-k", share=0.05))


def run(options: Options) -> Result:
    """Decode the inputs of every seed."""
    outcomes: Counter[str] = Counter()
    most, bound = 0, PER_NUMBER * NUMBERS + FIXED
    count = QUICK_INPUTS if options.quick else INPUTS
    for seed in range(options.seeds):
        rng, seeds = Random(seed), _files()
        for number in range(count):
            how, data = _hostile(rng, seeds)
            traced = number % TRACED == 0
            if traced:
                tracemalloc.start()
            outcomes[_outcome(how, data)] += 1
            if traced:
                most = max(most, tracemalloc.get_traced_memory()[1] - len(data))
                tracemalloc.stop()
            if number % 50_000 == 0:
                note(f"seed {seed}: {number} inputs, {dict(outcomes)}, at most {most} bytes")
    figures = {"inputs": outcomes.total(), "most_bytes": most, "bound": bound, "within": most <= bound, **outcomes}
    return Result({"numbers": NUMBERS, "codecs": [how.name for how in CODECS]}, [], figures)


def _outcome(how: Codec, data: bytes) -> str:
    """Return what became of an input. Whatever else is raised ends the bench."""
    try:
        finite = all(np.isfinite(array).all() for _, array in read_coded(how, LAYOUT, data))
    except Invalid as error:
        return reason_name(error.reason) or reasons_pb2.Reason.Name(error.reason)
    assert finite, f"{how.name} decoded to what is not finite: {data.hex()}"
    return "decoded"


def _files() -> dict[Codec, bytes]:
    rng, found = np.random.default_rng(0), {}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape) in LAYOUT.items()}
    with tempfile.TemporaryDirectory() as folder:
        for how in CODECS:
            write_coded(how, LAYOUT, values.__getitem__, Path(folder) / "coded", b"{}" * (how.tag % 2))
            found[how] = (Path(folder) / "coded").read_bytes()
    return found


def _hostile(rng: Random, files: dict[Codec, bytes]) -> tuple[Codec, bytes]:
    how = rng.choice(CODECS)
    return how, _planes(rng, how) if rng.random() < 0.4 else _damaged(
        rng, files[rng.choice((how, how, rng.choice(CODECS)))]
    )


def _damaged(rng: Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.randint(1, 6)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 40))
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        else:
            data[at : at + 4] = rng.choice((0, 1, 1 << 16, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)).to_bytes(4, "little")
    return bytes(data)


def _planes(rng: Random, how: Codec) -> bytes:
    """Return planes of any bytes, or of a repeated one a thousand times too many, each behind a right deflate stream."""
    out = bytearray(b"connito\x01" + bytes([how.tag]) + how.parameter.to_bytes(4, "little"))
    for name in sorted(LAYOUT):
        for size in how.sizes(LAYOUT[name][1]):
            length = max(0, rng.randint(size.least, size.most) + rng.choice((0, 0, 0, 0, 0, -1, 1)))
            clear = bytearray(bytes(rng.randrange(rng.choice((2, 31, 81, 256))) for _ in range(length)))
            if rng.random() < 0.02:
                clear = bytearray(length * 1000 + 1)
            stream = zlib.compress(clear, 1, wbits=-15)
            out += len(stream).to_bytes(4, "little") + stream
    return bytes(out)


if __name__ == "__main__":
    main("hostile_codes", run, doc=__doc__, seeds=4)
