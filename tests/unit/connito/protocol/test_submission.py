from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.tensors import read_tensors, tensor_bytes
from connito.errors import Invalid
from connito.protocol.submission import expected_layout, max_submission_bytes, read_header, validate
from connito.v1 import reasons_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = {
    "layers.1.down_proj": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "layers.1.gate_up_proj": np.linspace(-2, 2, 48, dtype=np.float32).reshape(2, 6, 4),
}
FILE = tensor_bytes(BASE, {"connito": "state"})
LAYOUT = expected_layout(FILE)


def reason_of(file: bytes, **options: Any) -> int:
    with pytest.raises(Invalid) as raised:
        validate(file, LAYOUT, **options)
    assert str(raised.value)
    return raised.value.reason


def changed(name: str = "layers.1.down_proj", value: float = 0.5, **tensors: np.ndarray) -> bytes:
    made = {key: array.copy() for key, array in BASE.items()}
    made[name].reshape(-1)[0] += value
    return tensor_bytes({**made, **tensors})


def test_a_well_formed_submission_passes(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(changed())
    assert set(validate(path, LAYOUT, FILE, 0.5).entries) == set(BASE)
    assert set(validate(str(path), read_header(FILE)).entries) == set(BASE)


def test_each_violation_has_its_own_reason() -> None:
    first = dict(list(BASE.items())[:1])
    assert reason_of(tensor_bytes(first)) == reasons_pb2.REASON_WRONG_TENSORS
    assert reason_of(changed(extra=np.zeros(1, np.float32))) == reasons_pb2.REASON_WRONG_TENSORS
    flat = {name: array.reshape(-1) for name, array in BASE.items()}
    assert reason_of(tensor_bytes(flat)) == reasons_pb2.REASON_WRONG_SHAPE
    half = {name: array.astype(np.float16) for name, array in BASE.items()}
    assert reason_of(tensor_bytes(half)) == reasons_pb2.REASON_WRONG_DTYPE
    assert reason_of(FILE + b"\0") == reasons_pb2.REASON_BAD_HEADER
    assert reason_of(FILE, max_bytes=len(FILE) - 1) == reasons_pb2.REASON_OVERSIZED
    assert reason_of(b"\0" * (max_submission_bytes(LAYOUT) + 1)) == reasons_pb2.REASON_OVERSIZED
    assert reason_of(changed(value=100.0), base=FILE, max_relative_norm=0.5) == reasons_pb2.REASON_NORM_EXCEEDED


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_numbers_must_be_finite(value: float, dtype: str) -> None:
    good = {"w": np.array([1.0, 65504.0, -0.0, 6e-8], np.float32)}
    stored = {"F32": np.float32, "F16": np.float16}.get(dtype)

    def file(array: np.ndarray) -> bytes:
        bits = array.astype(stored) if stored else (array.view(np.uint32) >> 16).astype(np.uint16)
        return tensor_bytes({"w": bits}, dtypes={"w": dtype})

    layout = expected_layout(file(good["w"]))
    validate(file(good["w"]), layout)
    with pytest.raises(Invalid, match="w holds infinities or NaNs") as raised:
        validate(file(np.array([1.0, value, 0.0, 0.0], np.float32)), layout)
    assert raised.value.reason == reasons_pb2.REASON_NON_FINITE


def test_the_norm_is_measured_per_tensor_and_names_it() -> None:
    small = changed(value=0.01)
    validate(small, LAYOUT, FILE, 0.01)
    with pytest.raises(Invalid, match=r"layers\.1\.down_proj moved"):
        validate(changed(value=1.0), LAYOUT, FILE, 0.01)


def test_huge_finite_numbers_do_not_overflow_the_check() -> None:
    assert reason_of(changed(value=3e38), base=FILE, max_relative_norm=10.0) == reasons_pb2.REASON_NORM_EXCEEDED


def test_memory_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(tensor_bytes({"w": np.ones(16 << 20, np.float32)}))
    layout = expected_layout(path)
    tracemalloc.start()
    validate(path, layout, path, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20  # the file has 64 MiB, and it is looked at twice


@settings(max_examples=400)
@given(st.data())
def test_a_mutated_file_is_refused_or_still_means_the_same(data: Any) -> None:
    """Whatever is done to the bytes: `Invalid`, or a file whose tensors have the layout and finite values."""
    file = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "splice"]))
        if kind == "set":
            file[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del file[place : place + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            file[place:place] = data.draw(st.binary(max_size=12))
        else:
            file[place:place] = file[: data.draw(st.integers(0, 60))]
        if not file:
            break
    try:
        validate(bytes(file), LAYOUT)
    except Invalid:
        return
    arrays, _ = read_tensors(bytes(file))
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        name: (array.dtype, array.shape) for name, array in BASE.items()
    }
    assert all(np.isfinite(array).all() for array in arrays.values())


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(Invalid):
        validate(noise, LAYOUT)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "layers.1.down_proj", "__metadata__", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(json_like, st.binary(max_size=64))
def test_arbitrary_headers_raise_nothing_but_invalid(header: Any, tail: bytes) -> None:
    import json

    text = json.dumps(header).encode()
    with pytest.raises(Invalid):
        validate(len(text).to_bytes(8, "little") + text + tail, LAYOUT)
