"""A submission's bytes as rows: the same state for everybody, and what coding left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from connito.data.pseudo_gradients import load_float32
from connito.data.tensors import from_float32, read_header, read_tensors, tensor_bytes
from connito.errors import Invalid
from connito.protocol.coding import codec_of, decoded, encode, is_coded, stated, usual_bytes
from connito.protocol.policy.choices import CODECS, ROWS
from connito.protocol.submission import validate
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import TrainPolicy
from numpy.typing import NDArray

NAMES = ("layers.0.down_proj", "layers.1.down_proj")
CODED = [name for name in CODECS if name != ROWS]


def policy(name: str) -> TrainPolicy:
    return TrainPolicy(codec=name, codec_rank=4, codec_share=0.05)


def state(path: Path, seed: int, dtype: str = "F32", size: float = 1.0) -> Path:
    rng = np.random.default_rng(seed)
    rows = {name: (rng.standard_normal((2, 24, 40)) * size).astype(np.float32) for name in NAMES}
    path.write_bytes(
        tensor_bytes(
            {name: from_float32(array, dtype) for name, array in rows.items()}, dtypes=dict.fromkeys(NAMES, dtype)
        )
    )
    return path


def trained(path: Path, base: Path, seed: int, dtype: str = "F32") -> Path:
    rng = np.random.default_rng(seed)
    rows = {
        name: load_float32(base, name) - (rng.standard_normal((2, 24, 40)) * 0.02).astype(np.float32) for name in NAMES
    }
    path.write_bytes(
        tensor_bytes(
            {name: from_float32(array, dtype) for name, array in rows.items()}, dtypes=dict.fromkeys(NAMES, dtype)
        )
    )
    return path


def moved(base: Path, rows: Path) -> NDArray[np.float64]:
    return np.concatenate(
        [(load_float32(base, name).astype(np.float64) - load_float32(rows, name)).reshape(-1) for name in NAMES]
    )


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_what_was_sent_and_what_was_left_are_the_whole(name: str, dtype: str, tmp_path: Path) -> None:
    base = state(tmp_path / "base", 1, dtype)
    rows, coded, leaves = trained(tmp_path / "rows", base, 2, dtype), tmp_path / "coded", tmp_path / "leaves"
    encode(rows, base, policy(name), None, coded, leaves)
    there = decoded(coded, base, policy(name), tmp_path)
    left = np.concatenate([load_float32(leaves, each).astype(np.float64).reshape(-1) for each in NAMES])
    assert np.allclose(moved(base, there) + left, moved(base, rows), atol=1e-6)
    assert read_header(there).entries == read_header(base).entries
    validate(there, read_header(base), base, 0.5)


@pytest.mark.parametrize("name", CODED)
def test_feedback_sends_in_the_end_what_was_wanted(name: str, tmp_path: Path) -> None:
    """The mean of what arrives comes near what was wanted each time, which a codec by itself may never."""
    base = state(tmp_path / "base", 1)
    rows, left = trained(tmp_path / "rows", base, 2), None
    wanted, arrived, alone = moved(base, rows), np.zeros(0), np.zeros(0)
    for time in range(8):
        leaves = tmp_path / f"left-{time}"
        encode(rows, base, policy(name), left, tmp_path / "coded", leaves)
        sent, left = moved(base, decoded(tmp_path / "coded", base, policy(name), tmp_path)), leaves
        alone, arrived = (sent, sent.copy()) if not time else (alone, arrived + sent)
    assert np.linalg.norm(arrived / 8 - wanted) < 0.75 * np.linalg.norm(alone - wanted)


@pytest.mark.parametrize("name", CODED)
def test_bytes_are_of_one_state_and_one_policy(name: str, tmp_path: Path) -> None:
    base = state(tmp_path / "base", 1)
    encode(trained(tmp_path / "rows", base, 2), base, policy(name), None, tmp_path / "coded", tmp_path / "leaves")
    other = policy("int4" if name != "int4" else "ternary")
    with pytest.raises(Invalid, match="another codec"):
        decoded(tmp_path / "coded", base, other, tmp_path)
    with pytest.raises(Invalid):
        decoded(tmp_path / "rows", base, policy(name), tmp_path)


def test_rows_are_themselves(tmp_path: Path) -> None:
    base = state(tmp_path / "base", 1)
    for spoken in ("", ROWS):
        assert decoded(base, base, TrainPolicy(codec=spoken), tmp_path) is base
        assert not is_coded(TrainPolicy(codec=spoken))


@pytest.mark.parametrize("name", CODED)
def test_what_is_not_finite_is_coded_as_such_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    base = state(tmp_path / "base", 1)
    broken = {each: load_float32(base, each).copy() for each in NAMES}
    broken[NAMES[1]][1, 2, 3] = np.nan
    (tmp_path / "rows").write_bytes(tensor_bytes(broken))
    encode(tmp_path / "rows", base, policy(name), None, tmp_path / "coded", tmp_path / "leaves")
    with pytest.raises(Invalid) as error:
        decoded(tmp_path / "coded", base, policy(name), tmp_path)
    assert error.value.reason == reasons_pb2.REASON_NON_FINITE
    assert not (tmp_path / "leaves").exists()


def test_rows_of_other_tensors_are_not_coded(tmp_path: Path) -> None:
    base = state(tmp_path / "base", 1)
    (tmp_path / "rows").write_bytes(tensor_bytes({NAMES[0]: np.zeros((2, 24, 40), np.float32)}))
    with pytest.raises(Invalid, match="not those of the run"):
        encode(tmp_path / "rows", base, policy("ternary"), None, tmp_path / "coded", tmp_path / "leaves")


def test_a_remainder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    base, coded = state(tmp_path / "base", 1), tmp_path / "coded"
    rows = trained(tmp_path / "rows", base, 2)
    encode(rows, base, policy("ternary"), None, coded, tmp_path / "leaves")
    before = coded.read_bytes()
    (tmp_path / "foreign").write_bytes(tensor_bytes({"layers.7.x": np.ones((3, 3), np.float32)}))
    encode(rows, base, policy("ternary"), tmp_path / "foreign", coded, tmp_path / "leaves")
    assert coded.read_bytes() == before


def test_a_move_that_overflows_the_state_is_not_finite(tmp_path: Path) -> None:
    """All move by 131,008, whose scale is 131,072: beyond what float16 holds."""
    base, rows = (
        tensor_bytes({each: np.full((2, 24, 40), sign * 65504, np.float16) for each in NAMES}) for sign in (1, -1)
    )
    (tmp_path / "base").write_bytes(base)
    (tmp_path / "rows").write_bytes(rows)
    encode(tmp_path / "rows", tmp_path / "base", policy("ternary"), None, tmp_path / "coded", tmp_path / "leaves")
    there = decoded(tmp_path / "coded", tmp_path / "base", policy("ternary"), tmp_path)
    with pytest.raises(Invalid) as error:
        validate(there, read_header(base))
    assert error.value.reason == reasons_pb2.REASON_NON_FINITE


@pytest.mark.parametrize("name", CODED)
def test_a_quote_knows_about_how_many_bytes_it_takes(name: str, tmp_path: Path) -> None:
    rng, shapes = np.random.default_rng(9), {"layers.0.a": (2, 128, 256), "layers.0.b": (2, 64, 128)}
    for part, seed in (("base", 1.0), ("rows", 0.9)):
        rows = {each: (rng.standard_normal(shape) * seed).astype(np.float32) for each, shape in shapes.items()}
        (tmp_path / part).write_bytes(tensor_bytes(rows))
    encode(tmp_path / "rows", tmp_path / "base", policy(name), None, tmp_path / "coded", tmp_path / "leaves")
    size = (tmp_path / "coded").stat().st_size
    assert 0.9 * size < usual_bytes(policy(name), list(shapes.values())) < 1.1 * size


def test_every_choice_of_the_law_has_a_codec() -> None:
    assert [codec_of(policy(name)).name for name in CODED] == CODED


@pytest.mark.parametrize("name", CODED)
def test_a_claim_goes_with_coded_rows(name: str, tmp_path: Path) -> None:
    base, rows = state(tmp_path / "base", 1), trained(tmp_path / "rows", tmp_path / "base", 2)
    claim = {"routed": '{"0":[1,2],"1":[3,4]}'}
    tensors, _ = read_tensors(rows)
    rows.write_bytes(tensor_bytes(tensors, metadata=claim))
    coded = tmp_path / "coded"
    encode(rows, base, policy(name), None, coded, tmp_path / "left")
    assert stated(coded, policy(name)) == claim == stated(rows, policy(ROWS))
    assert read_header(decoded(coded, base, policy(name), tmp_path)).metadata["routed"] == claim["routed"]


@pytest.mark.parametrize("length", [1 << 31, (1 << 19) + 1, 1 << 16, 0])
def test_a_note_that_is_too_long_or_not_there_is_refused(length: int, tmp_path: Path) -> None:
    base, rows = state(tmp_path / "base", 1), trained(tmp_path / "rows", tmp_path / "base", 2)
    coded = tmp_path / "coded"
    tensors, _ = read_tensors(rows)
    rows.write_bytes(tensor_bytes(tensors, metadata={"routed": "a claim"}))
    encode(rows, base, policy("int8"), None, coded, tmp_path / "left")
    data = coded.read_bytes()
    coded.write_bytes(data[:13] + length.to_bytes(4, "little") + data[17:600])
    for look in (lambda: stated(coded, policy("int8")), lambda: decoded(coded, base, policy("int8"), tmp_path)):
        with pytest.raises(Invalid, match="note") as refused:
            look()
        assert refused.value.reason == reasons_pb2.REASON_BAD_HEADER
