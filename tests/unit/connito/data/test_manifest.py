from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.checkpoint_files import find_checkpoint, read_headers
from connito.data.hashing import hash_checkpoint
from connito.data.manifest import Manifest, Taken, usual_bank
from connito.errors import Invalid, NotFound, VerificationFailed
from safetensors.numpy import save_file

from tests.support.files import directory_reader

RNG = np.random.default_rng(0)


def build_manifest(folder: Path, name: str = "") -> Manifest:
    """The manifest of tensors that are all taken as they are."""
    (folder / "config.json").write_text("{}")
    files = find_checkpoint(folder)
    headers = read_headers(files)
    banks = {tensor: bank for tensor in headers if (bank := usual_bank(tensor)) is not None}
    return hash_checkpoint(files, Taken({n: h.dtype for n, h in headers.items()}, banks), name or folder.name)


@pytest.fixture
def fused(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Two shards, one fused MoE layer of three experts."""
    tensors = {
        "model.embed_tokens.weight": RNG.normal(size=(5, 4)).astype(np.float32),
        "model.layers.1.mlp.gate.weight": RNG.normal(size=(3, 4)).astype(np.float32),
        "model.layers.1.mlp.experts.gate_up_proj": RNG.normal(size=(3, 6, 4)).astype(np.float32),
        "model.layers.1.mlp.experts.down_proj": RNG.normal(size=(3, 4, 3)).astype(np.float32),
    }
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path, tensors


def test_every_tensor_and_every_expert_is_where_the_manifest_says(fused: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = fused
    manifest, read = build_manifest(folder), directory_reader(folder)
    assert manifest.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert manifest.read(read, name) == value.tobytes()
    assert manifest.experts() == {1: 3}
    assert manifest.expert_bytes() == {1: (24 + 12) * 4}
    for expert in range(3):
        for part in manifest.expert_rows(1, expert):
            row = tensors[f"model.layers.1.mlp.experts.{part.parameter}"][expert]
            assert manifest.read_range(read, part) == row.tobytes()
            assert part.shape == row.shape
    for name, entry in manifest.files.items():
        data = (folder / name).read_bytes()
        assert (entry.digest, entry.size) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_manifest_survives_storage_and_has_an_identity(fused: tuple[Path, dict[str, Any]]) -> None:
    manifest = build_manifest(fused[0], name="base")
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == replace(manifest, name="")
    assert again.digest == manifest.digest == hashlib.sha256(manifest.to_bytes()).hexdigest()
    for junk in (b"", b"[]", b'{"version": 2}', b'{"version": 1}'):
        with pytest.raises(Invalid):
            Manifest.from_bytes(junk)


def test_a_base_is_its_content_whatever_it_is_called(fused: tuple[Path, dict[str, Any]]) -> None:
    here, there = build_manifest(fused[0], name="base"), build_manifest(fused[0], name="other")
    assert here.digest == there.digest
    assert here.is_known_as("anything", there.digest)
    # Manifests of recorded runs have the name in them, which stays in their digest.
    recorded = Manifest.from_bytes(replace(here, named=True).to_bytes())
    assert (recorded.name, recorded.named) == ("base", True)
    assert recorded.digest != here.digest
    assert there.is_known_as("base", recorded.digest)
    assert recorded.is_known_as("whatever", here.digest)
    assert not there.is_known_as("other", recorded.digest)
    (fused[0] / "config.json").write_text('{"a": 1}')
    files = find_checkpoint(fused[0])
    taken = Taken({n: h.dtype for n, h in read_headers(files).items()}, {})
    assert hash_checkpoint(files, taken, "base").digest not in (here.digest, recorded.digest)


@pytest.mark.parametrize("parts", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_that_are_stored_singly_have_three_ranges(tmp_path: Path, parts: tuple[str, ...]) -> None:
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": RNG.normal(size=(2, 2)).astype(np.float32)
        for layer in (0, 11)
        for expert in range(12)
        for part in parts
    }
    save_file(tensors, tmp_path / "model.safetensors")
    manifest, read = build_manifest(tmp_path), directory_reader(tmp_path)
    assert manifest.experts() == {0: 12, 11: 12}
    ranges = {part.parameter: part for part in manifest.expert_rows(11, 10)}
    assert list(ranges) == ["down", "gate", "up"]
    wanted = tensors[f"model.layers.11.mlp.experts.10.{parts[1]}.weight"]
    assert manifest.read_range(read, ranges["up"]) == wanted.tobytes()


def test_damage_is_noticed(fused: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = fused
    manifest = build_manifest(folder)
    part = manifest.expert_rows(1, 2)[0]
    path = folder / part.file
    data = bytearray(path.read_bytes())
    data[part.start] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationFailed, match="other bytes"):
        manifest.read_range(directory_reader(folder), part)


def test_what_is_no_base_is_refused(tmp_path: Path, fused: tuple[Path, dict[str, Any]]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFound, match=r"holds no model\.safetensors"):
        build_manifest(empty)
    save_file({"model.norm.weight": np.ones(2, dtype=np.float32)}, empty / "model.safetensors")
    whole = (empty / "model.safetensors").read_bytes()
    for junk in (
        b"",
        b"\xff" * 20,
        (5).to_bytes(8, "little") + b"{bad}",
        (60).to_bytes(8, "little") + b"{}",
        whole[:-1],
    ):
        (empty / "model.safetensors").write_bytes(junk)
        with pytest.raises(Invalid, match=r"damaged or incomplete"):
            build_manifest(empty)
    with pytest.raises(NotFound, match="no expert 3"):
        build_manifest(fused[0]).expert_rows(1, 3)


def test_gaps_between_tensors_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x00\x01")
    with pytest.raises(Invalid, match="gap"):
        build_manifest(tmp_path)


FILE: dict[str, Any] = {"name": "model.safetensors", "digest": "0" * 64, "size": 100, "media_type": "application/json"}
TENSOR: dict[str, Any] = {
    "name": "model.layers.0.mlp.experts.down_proj",
    "file": "model.safetensors",
    "dtype": "F32",
    "shape": [2, 3],
    "start": 8,
    "length": 24,
    "sha256": "0" * 64,
    "rows": ["0" * 64, "1" * 64],
}


def written(files: Any = None, tensors: Any = None, **fields: Any) -> bytes:
    whole: dict[str, Any] = {"version": 1, "name": "n", "extra": {}, "files": [FILE] if files is None else files}
    return json.dumps({**whole, "tensors": [TENSOR] if tensors is None else tensors, **fields}).encode()


NAMES = [
    "/etc/passwd", "../x.pth", "a/b", "a\\b", "..", ".", "", ".hidden", " x", "a\0b", "a\nb", "c:x", 'a"b', "x" * 300, "\ud800",
    5, None, ["a"], {"a": 1}, True,
]  # fmt: skip
FILES: list[dict[str, Any]] = [
    *({"name": name} for name in NAMES),
    *({"size": size} for size in ("x", -1, 1.5, True, None, 1 << 60, [1])),
    *({"digest": digest} for digest in (7, "0" * 63, "G" * 64, "../../../etc/passwd", None, ["0" * 64])),
    *({"media_type": kind} for kind in (None, [1], "x" * 1000)),
    {"more": 1},
]  # fmt: skip
TENSORS: list[dict[str, Any]] = [
    *({"name": name} for name in (5, None, [1], "x" * 1000)),
    *({"file": name} for name in ("other", 5, ["model.safetensors"], {"a": 1})),
    *({"shape": shape} for shape in (None, 5, "23", [2, -3], [2, 3.0], [2, True], [1] * 20, [2, 1 << 60], [], [3, 2])),
    *({"start": start} for start in (-1, 90, "8", None, 1.5, 1 << 60)),
    *({"length": length} for length in (-24, 23, 1 << 60, "24", None)),
    *({"dtype": dtype} for dtype in ("F33", 5, None, ["F32"], "BF16")),
    *({"rows": rows} for rows in (None, 5, ["x"], ["0" * 64], ["0" * 64] * 3, [5, 5], "0" * 64)),
    {"sha256": 5},
    {"more": 1},
]  # fmt: skip
ODD_TYPES: list[Any] = [[], 5, {"": "F33"}, {"": ["F32"]}, {"nowhere": "F32"}, {"": None}]
EXTRAS: list[Any] = [
    None, [], 5, {"a": 1}, {str(i): "" for i in range(100)}, {"banks": "{"}, {"banks": "[]"}, {"banks": '{"x": 5}'},
    *({"banks": json.dumps({TENSOR["name"]: bank})} for bank in (["0", "p", None], [0], [0, 5, None], [-1, "p", 0], [0, "p", "1"],
                                                                  [0, "p", None, 1], {"a": 1}, [[0], "p", None], [0, "p", 1.5])),
    *({"dtypes": json.dumps(dtypes)} for dtypes in ODD_TYPES),
    {"banks": "[" * 100_000},
]  # fmt: skip
ODD: list[Any] = [{}, 5, [[1]], [5]]
WHOLE: list[bytes] = [
    *(written([{**FILE, **change}], []) for change in FILES),
    *(written(tensors=[{**TENSOR, **change}]) for change in TENSORS),
    *(written(extra=extra) for extra in EXTRAS),
    *(written(**{field: value}) for field in ("files", "tensors", "name", "version") for value in ODD),
    *(written([{k: v for k, v in FILE.items() if k != gone}], []) for gone in FILE),
    *(written(tensors=[{k: v for k, v in TENSOR.items() if k != gone}]) for gone in TENSOR),
    written([FILE, FILE]), written(tensors=[TENSOR, TENSOR]), written([]),
    b"5", b"null", b'"x"', "{}".encode("utf-16"), b"\xff\xfe", b'{"version":1,"x":' + b"[" * 100_000, b"[" * 100_000,
    b'{"version": 1, "files": [' + b"9" * 5000 + b"]}", written().replace(b"100", b"1e400"), written().replace(b"100", b"NaN"),
]  # fmt: skip


@pytest.mark.parametrize("data", WHOLE, ids=range(len(WHOLE)))
def test_a_manifest_of_a_stranger_is_sound_or_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        Manifest.from_bytes(data)


def test_a_sound_one_of_a_stranger_is_read() -> None:
    manifest = Manifest.from_bytes(written())
    assert manifest.experts() == {0: 2}
    assert manifest.expert_bytes() == {0: 12}
    banks = {"banks": json.dumps({TENSOR["name"]: [3, "down_proj", None]}), "dtypes": '{"":"BF16"}'}
    other = Manifest.from_bytes(written(extra=banks))
    assert (other.experts(), other.expert_bytes(), other.expert_value_bytes()) == ({3: 2}, {3: 6}, 2)
