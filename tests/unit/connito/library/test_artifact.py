from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from connito.errors import Invalid
from connito.library.artifact import ExpertHeader, read_header, tensor_sizes, write_expert
from safetensors.numpy import load_file, save_file


def header(version: int = 3) -> ExpertHeader:
    return ExpertHeader("medical", "smol", "b" * 64, {2: [1, 5], 3: [0]}, "run-1", version, "f" * 64, "a" * 64)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {
        "layers.2.down_proj": rng.normal(size=(2, 4, 3)).astype("f4"),
        "layers.3.down_proj": np.ones((1, 4, 3), "f4"),
    }
    save_file(tensors, tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


def test_the_expert_file_holds_the_states_tensors_and_says_what_they_are(state: Path, tmp_path: Path) -> None:
    digest = write_expert(state, tmp_path / "expert.safetensors", header())

    assert read_header(tmp_path / "expert.safetensors") == header()
    assert hashlib.sha256((tmp_path / "expert.safetensors").read_bytes()).hexdigest() == digest
    before, after = load_file(state), load_file(tmp_path / "expert.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert tensor_sizes(state) == (36, 144)


def test_its_bytes_depend_on_the_content_alone(state: Path, tmp_path: Path) -> None:
    digests = [write_expert(state, tmp_path / f"{n}.safetensors", header()) for n in range(2)]

    assert digests[0] == digests[1]
    assert write_expert(state, tmp_path / "other.safetensors", header(4)) != digests[0]


def test_a_state_is_not_an_expert(state: Path) -> None:
    with pytest.raises(Invalid, match="not a library expert"):
        read_header(state)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 64, b"\x04\0\0\0\0\0\0\0[{]}", b"\x02\0\0\0\0\0\0\0[]"])
def test_other_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)

    with pytest.raises(Invalid, match="safetensors"):
        read_header(tmp_path / "x")
