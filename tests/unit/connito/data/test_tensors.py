from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data import tensors
from connito.data.tensors import (
    TensorWriter,
    from_float32,
    read_header,
    read_tensors,
    tensor_bytes,
    to_float32,
)
from connito.errors import Invalid, NotFound
from hypothesis import given
from hypothesis import strategies as st


def sample() -> dict[str, np.ndarray]:
    return {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.int64),
        "c": np.array([0x3F80, 0xC000], np.uint16),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_round_trip_from_bytes_file_and_map(tmp_path: Path) -> None:
    data = tensor_bytes(sample(), {"k": "v"}, dtypes={"c": "BF16"})
    path = tmp_path / "x.safetensors"
    layout = {name: (entry.dtype, entry.shape) for name, entry in read_header(data).entries.items()}
    with TensorWriter(path, layout, {"k": "v"}) as writer:
        for name in writer.names:
            writer.write(name, sample()[name])
    assert path.read_bytes() == data
    for arrays, metadata in (read_tensors(data), read_tensors(path), read_tensors(path, mmap=True)):
        assert metadata == {"k": "v"}
        assert arrays.keys() == sample().keys()
        for name, array in sample().items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
    assert read_header(data).entries["c"].dtype == "BF16"


def test_the_reference_library_reads_it_and_is_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    data = tensor_bytes({name: array for name, array in sample().items() if name != "c"}, {"k": "v"})
    np.testing.assert_array_equal(safetensors.load(data)["b"], sample()["b"])
    theirs, _ = read_tensors(safetensors.save({"b": sample()["b"], "a": sample()["a"]}))
    np.testing.assert_array_equal(theirs["a"], sample()["a"])


def test_bytes_do_not_depend_on_insertion_order() -> None:
    assert tensor_bytes(sample()) == tensor_bytes(dict(reversed(sample().items())))
    assert read_header(tensor_bytes(sample())).data_start % 64 == 0


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    layout = {"a": ("F32", (2,)), "b": ("F32", (2,))}

    def interrupted() -> None:
        with TensorWriter(path, layout) as writer:
            writer.write("a", np.zeros(2, np.float32))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_missing_files_and_tensors_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_header(tmp_path / "none")
    with pytest.raises(NotFound, match="no tensor is called"):
        read_tensors(tensor_bytes(sample()), ["nope"])


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
        min_size=1,
    )
)
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    torch = pytest.importorskip("torch")
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16)
    bits = from_float32(array, "BF16")
    np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(to_float32(bits, "BF16"), expected.float().numpy())


def raw(header: object | str, data: bytes = b"\0" * 8) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\0" * 7,
        (2**63).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        raw("[]"),
        raw(" " + json.dumps({"x": GOOD})),
        raw("{" * 100_000),
        raw('{"x":' + "[" * 100_000 + "]" * 100_000 + "}"),
        raw('{"x":' + json.dumps(GOOD) + ',"x":' + json.dumps(GOOD) + "}"),
        raw('{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        raw({"x": {**GOOD, "extra": 1}}),
        raw({"x": {**GOOD, "dtype": "F7"}}),
        raw({"x": {**GOOD, "dtype": ["F32"]}}),
        raw({"x": {**GOOD, "shape": [2.0]}}),
        raw({"x": {**GOOD, "shape": [True, 2]}}),
        raw({"x": {**GOOD, "shape": [-2]}}),
        raw({"x": {**GOOD, "shape": [1] * 9}}),
        raw({"x": {**GOOD, "data_offsets": [0, 8, 8]}}),
        raw({"x": {**GOOD, "data_offsets": [8, 0]}}),
        raw('{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
        raw('{"x":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}'),
        raw('{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
        raw({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),  # a gap
        raw({"x": GOOD, "y": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12),  # an overlap
        raw({"x": GOOD}, b"\0" * 9),  # trailing bytes
        raw({"x": GOOD}, b"\0" * 7),  # truncated
        raw({"x": GOOD, "__metadata__": {"k": 1}}),
        raw({"x": GOOD, "__metadata__": []}),
        raw({"": GOOD}),
        raw({"x\n": GOOD}),
        raw({"\ud800": GOOD}),
        raw('{"x":"\xff'),
    ],
)
def test_malformed_files_are_refused(file: bytes) -> None:
    with pytest.raises(Invalid, match="not a well-formed safetensors file"):
        read_header(file)


def test_a_header_that_was_read_is_not_taken_apart_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of a run have one header, and a merge reads it some hundred times."""
    parse, parsed = tensors._parse_header, list[bytes]()

    def counted(raw: bytes, *rest: Any) -> Any:
        parsed.append(raw)
        return parse(raw, *rest)

    monkeypatch.setattr(tensors, "_parse_header", counted)
    paths = [tmp_path / name for name in ("one", "two", "longer")]
    for number, path in enumerate(paths):
        path.write_bytes(tensor_bytes({"layers.0.x": np.full((2, 3 + number // 2), number, np.float32)}, {"of": "all"}))
    tensors._remembered.cache_clear()
    first = read_header(paths[0])
    first.metadata["mine"] = "alone"
    again = read_header(paths[1])
    assert (again.entries, again.metadata, len(parsed)) == (first.entries, {"of": "all"}, 1)
    assert read_header(paths[2]).entries["layers.0.x"].shape == (2, 4)
    with paths[1].open("ab") as file:
        file.write(b"more")
    with pytest.raises(Invalid, match="the file holds"):
        read_header(paths[1])


def test_a_header_beyond_the_cap_is_refused(tmp_path: Path) -> None:
    big = raw(json.dumps({"x": GOOD}) + " " * 2_000_000)
    path = tmp_path / "big"
    path.write_bytes(big)
    for source in (big, path):
        with pytest.raises(Invalid, match="limit"):
            read_header(source)
    assert read_header(path, max_header_bytes=1 << 22).entries["x"].shape == (2,)
