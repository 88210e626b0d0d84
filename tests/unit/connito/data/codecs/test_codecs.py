"""Codecs: what comes back, in how many bytes, the same on every machine, and what hostile bytes cost."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from connito.data.codecs.file import CODED, Codec, codec, most_bytes, read_coded, write_coded
from connito.data.tensors import Layout
from connito.errors import Invalid
from connito.v1 import reasons_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

LAYOUT: Layout = {
    "layers.0.down_proj": ("F32", (3, 48, 96)),
    "layers.0.bias": ("F32", (3, 40)),
    "layers.1.down_proj": ("BF16", (2, 130, 70)),
    "layers.1.scalar": ("F32", ()),
    "layers.1.none": ("F32", (0, 8)),
}
CODECS = [codec("ternary"), codec("int4"), codec("int8"), codec("low-rank", rank=4), codec("top-k", share=0.05)]
Tensors = dict[str, NDArray[np.float32]]


def ids(how: Codec) -> str:
    return how.name


def moved(seed: int = 0, layout: Layout = LAYOUT) -> Tensors:
    """Pseudo-gradients as AdamW leaves them: next to Gaussian, of another size in every row."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (_, shape) in layout.items():
        rows = np.exp(rng.standard_normal((*shape[:-1], 1) if shape else ())) * 1e-3
        found[name] = np.asarray(rng.standard_normal(shape) * rows, np.float32)
    return found


def coded(how: Codec, tensors: Tensors, folder: Path, layout: Layout = LAYOUT) -> bytes:
    write_coded(how, layout, tensors.__getitem__, folder / "coded")
    return (folder / "coded").read_bytes()


def decoded(how: Codec, data: bytes, layout: Layout = LAYOUT) -> Tensors:
    return dict(read_coded(how, layout, data))


def cosine(one: Tensors, other: Tensors) -> float:
    flat = [
        np.concatenate([each[name].reshape(-1) for name in sorted(one)]).astype(np.float64) for each in (one, other)
    ]
    return float(flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])))


LEAST = {"ternary": 0.83, "int4": 0.99, "int8": 0.9995, "low-rank": 0.4, "top-k": 0.4}


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_what_comes_back_points_where_it_pointed(how: Codec, tmp_path: Path) -> None:
    tensors = moved()
    data = coded(how, tensors, tmp_path)
    back = decoded(how, data)
    assert {name: array.shape for name, array in back.items()} == {name: shape for name, (_, shape) in LAYOUT.items()}
    assert all(array.dtype == np.float32 for array in back.values())
    assert cosine(tensors, back) > LEAST[how.name]
    assert len(data) <= most_bytes(how, LAYOUT)


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_coding_what_was_decoded_changes_next_to_nothing(how: Codec, tmp_path: Path) -> None:
    once = decoded(how, coded(how, moved(), tmp_path))
    assert cosine(once, decoded(how, coded(how, once, tmp_path))) > 0.995


def test_a_ternary_number_takes_less_than_one_and_a_third_bits(tmp_path: Path) -> None:
    layout: Layout = {"layers.0.w": ("F32", (512, 1024))}
    data = coded(codec("ternary"), moved(1, layout), tmp_path, layout)
    assert len(data) * 24 < 4 * 512 * 1024


def test_steps_of_one_size_are_all_sent(tmp_path: Path) -> None:
    """As AdamW's are at first: no number is larger than the others, so none may be left out for good."""
    tensors = {name: np.asarray(1e-3 * np.sign(array), np.float32) for name, array in moved().items()}
    assert cosine(tensors, decoded(codec("ternary"), coded(codec("ternary"), tensors, tmp_path))) > 0.999


# SHA-256 of what these bytes decode to, from one machine; every other has to come to the same.
GOLDEN = {
    "ternary": "6d4aeb759ad0b01e02d8df22d569819fe63135d223d50d73764e0c6d77b6fda9",
    "int4": "41a77fdd595bb27b46bf6a6bffe118954363b5c1b0bd5f7f3b504e6508d7eb95",
    "int8": "14ba0e86e7de278bab1c0572784afa0441eaf9607efe4b94d72bb151f89a4c9f",
    "low-rank": "e205efdee970125c15c1cb4e260949ba4275ad5b9003707dd28096f1de9e8fb6",
    "top-k": "1ed225434cb0563abe63f9b98370d7600e497664abd116091663dc85abc39341",
}


def plain(how: Codec) -> bytes:
    """A file whose planes follow from arithmetic alone, so that no library's encoder shows in it."""
    out, state = bytearray(b"connito\x01" + bytes([how.tag]) + how.parameter.to_bytes(4, "little")), 12345
    shapes = {"a": (3, 20, 33), "b": (100,)}
    for name in sorted(shapes):
        for number, size in enumerate(how.sizes(shapes[name])):
            clear = bytearray()
            for place in range(size.least):
                state = (1103515245 * state + 12345) % (1 << 31)
                clear.append(_byte(how, number, place, state >> 16))
            deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
            stream = deflate.compress(bytes(clear)) + deflate.flush()
            out += len(stream).to_bytes(4, "little") + stream
    return bytes(out)


def _byte(how: Codec, plane: int, place: int, drawn: int) -> int:
    if how.name == "low-rank":
        return drawn % 256 if plane else drawn % 31
    if plane == 0:
        return drawn % 256 if place else 250
    limit = {"ternary": 81, "int4": 225, "int8": 255}.get(how.name, 19 if plane == 1 else 256)
    return drawn % limit


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_bytes_decode_to_the_same_bits_everywhere(how: Codec) -> None:
    layout: Layout = {"a": ("F32", (3, 20, 33)), "b": ("F32", (100,))}
    digest = hashlib.sha256()
    for _, array in read_coded(how, layout, plain(how)):
        digest.update(array.astype("<f4").tobytes())
    assert digest.hexdigest() == GOLDEN[how.name]


def test_factors_are_multiplied_exactly(tmp_path: Path) -> None:
    """Against whole numbers of any length, whatever BLAS is in use."""
    how, layout = codec("low-rank", rank=16), {"a": ("F32", (1, 20, 33))}
    rng = random.Random(3)
    powers = bytes([0xF6, *(rng.randrange(31) for _ in range(16))])
    left, right = (bytes(rng.randrange(256) for _ in range(count * 16)) for count in (20, 33))
    body = b""
    for clear in (powers, left, right):
        stream = zlib.compress(clear, wbits=-15)
        body += len(stream).to_bytes(4, "little") + stream
    ((_, found),) = read_coded(how, layout, b"connito\x01" + bytes([4]) + (16).to_bytes(4, "little") + body)

    def signed(byte: int) -> int:
        return byte - 256 if byte > 127 else byte

    for row in range(20):
        for column in range(33):
            whole = sum(
                signed(left[row * 16 + k]) * signed(right[column * 16 + k]) << (30 - powers[1 + k]) for k in range(16)
            )
            assert found[0, row, column] == np.float32(whole * 2.0 ** (-10 - 44))


@pytest.mark.parametrize("how", CODECS, ids=ids)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_refused_as_such(how: Codec, bad: float, tmp_path: Path) -> None:
    tensors = moved()
    tensors["layers.1.down_proj"][0, 3, 3] = bad
    data = coded(how, tensors, tmp_path)
    with pytest.raises(Invalid) as error:
        decoded(how, data)
    assert error.value.reason == reasons_pb2.REASON_NON_FINITE
    assert error.value.about == "layers.1.down_proj"


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_extreme_numbers_stay_finite(how: Codec, tmp_path: Path) -> None:
    for size in (0.0, 1e-42, 1e-30, 1e-8, 1e4):
        tensors = {name: np.asarray(array * np.float32(size * 1e3), np.float32) for name, array in moved().items()}
        back = decoded(how, coded(how, tensors, tmp_path))
        assert all(np.isfinite(array).all() for array in back.values()), size


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_other_codecs_parameters_and_lengths_are_refused(how: Codec, tmp_path: Path) -> None:
    data = coded(how, moved(), tmp_path)
    wrong = [b"", data[:7], data[:-1], data[:20], data + b"\0", b"X" + data[1:], data[:8] + bytes([99]) + data[9:]]
    wrong += [data[:9] + (how.parameter + 1).to_bytes(4, "little") + data[13:], data[:13] + b"\xff" * 4 + data[17:]]
    for one in wrong:
        with pytest.raises(Invalid) as error:
            decoded(how, one)
        assert error.value.reason in (reasons_pb2.REASON_BAD_HEADER, reasons_pb2.REASON_OVERSIZED)
    other = codec("int4" if how.name == "ternary" else "ternary")
    with pytest.raises(Invalid, match="another codec"):
        decoded(other, data)


def framed(how: Codec, streams: list[bytes]) -> bytes:
    head = b"connito\x01" + bytes([how.tag]) + how.parameter.to_bytes(4, "little")
    return head + b"".join(len(stream).to_bytes(4, "little") + stream for stream in streams)


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_a_bomb_costs_no_more_than_a_submission(how: Codec) -> None:
    layout: Layout = {"a": ("F32", (4, 64, 64))}
    clear = 1 << 26
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(clear)) + deflate.flush()
    streams = [zlib.compress(bytes(size.least), wbits=-15) for size in how.sizes((4, 64, 64))]
    for place in range(len(streams)):
        for stream in (bomb, bomb[: how.sizes((4, 64, 64))[place].coded]):
            hostile = framed(how, [*streams[:place], stream, *streams[place + 1 :]])
            tracemalloc.start()
            with pytest.raises(Invalid):
                decoded(how, hostile, layout)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 40 * 4 * 64 * 64 + 300_000, (place, peak)


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_a_stream_that_is_stuffed_is_refused(how: Codec) -> None:
    """Deflate has blocks of nothing, which any number of may stand before the data."""
    layout: Layout = {"a": ("F32", (4, 64, 64))}
    streams = [zlib.compress(bytes(size.least), wbits=-15) for size in how.sizes((4, 64, 64))]
    stuffed = b"\x00\x00\x00\xff\xff" * 30_000 + streams[0]
    with pytest.raises(Invalid, match="are possible"):
        decoded(how, framed(how, [stuffed, *streams[1:]]), layout)


def test_digits_and_powers_that_do_not_exist_are_refused() -> None:
    layout: Layout = {"a": ("F32", (2, 32))}
    for how, plane, byte in ((codec("ternary"), 1, 81), (codec("int4"), 1, 225), (codec("low-rank", rank=2), 0, 31)):
        planes = [np.zeros(size.least, np.uint8) for size in how.sizes((2, 32))]
        planes[plane][-1] = byte
        with pytest.raises(Invalid, match=r"a holds the byte|a has a column"):
            decoded(how, framed(how, [zlib.compress(each.tobytes(), wbits=-15) for each in planes]), layout)


def test_places_outside_the_tensor_are_refused() -> None:
    how, layout = codec("top-k", share=4 / 4096), {"a": ("F32", (100, 100))}
    sizes = how.sizes((100, 100))
    kept = sizes[1].least
    for gaps in (
        bytes([255] * 39 + [254] * kept),
        bytes([9] * (kept - 1)) + b"\xff",
        bytes([1] * kept) + b"\xff",
        b"\0" * (kept + 1),
    ):
        clear = [bytes(sizes[0].least), gaps, bytes(sizes[2].least)]
        with pytest.raises(Invalid):
            decoded(how, framed(how, [zlib.compress(each, wbits=-15) for each in clear]), layout)


@pytest.mark.parametrize("how", CODECS, ids=ids)
def test_any_bytes_in_clear_are_refused_or_finite(how: Codec) -> None:
    """What survives the entropy coder, which hides most of a file from a fuzzer of whole files."""
    rng, layout = np.random.default_rng(5), {"a": ("F32", (2, 24, 40))}
    sizes, read = how.sizes((2, 24, 40)), 0
    for _ in range(300):
        planes = [rng.integers(0, 256 if rng.random() < 0.5 else 26, size.least, np.uint8) for size in sizes]
        planes[0][0] = rng.integers(0, 31)
        streams = [zlib.compress(plane.tobytes(), 1, wbits=-15) for plane in planes]
        try:
            ((_, found),) = read_coded(how, layout, framed(how, streams))
        except Invalid:
            continue
        read += 1
        assert np.isfinite(found).all()
    assert read or how.name == "top-k"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_or_finite(data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(CODECS))
    base = plain(how)
    hostile = bytearray(base)
    for _ in range(data.draw(st.integers(1, 8))):
        hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(hostile)))
    for one in (bytes(hostile), bytes(hostile[:cut]), bytes(hostile) + data.draw(st.binary(max_size=20))):
        try:
            for _, array in read_coded(how, {"a": ("F32", (3, 20, 33)), "b": ("F32", (100,))}, one):
                assert np.isfinite(array).all()
        except Invalid:
            continue


def test_unknown_codecs_are_told() -> None:
    with pytest.raises(Invalid, match="no codec is called 'zip'"):
        codec("zip")
    assert CODED.startswith("application/vnd.connito.")
