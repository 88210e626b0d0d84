"""One pass over a cycle's files says what checking each of them and then measuring all of them says, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.data.tensors import from_float32
from connito.errors import Invalid
from connito.protocol.merging import reading
from connito.protocol.merging.reading import inspect
from connito.protocol.submission import expected_layout, validate
from connito.v1 import reasons_pb2 as reasons

from tests.support.files import write_tensors

SHAPES = {"layers.0.up_proj": (3, 7, 5), "layers.0.down_proj": (3, 5, 7), "layers.1.up_proj": (2, 1)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("connito.protocol.merging.reading", "connito.protocol.submission"):
        monkeypatch.setattr(f"{module}.BLOCK", 16)
    monkeypatch.setattr("connito.data.pseudo_gradients.CHUNK", 4)


def state(path: Path, seed: int, dtype: str = "F32", scale: float = 1.0, **values: float) -> Path:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {
        name: scale * rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()
    }
    for name, value in values.items():
        tensors[name.replace("__", ".")].reshape(-1)[-1] = value
    stored = {name: from_float32(array, dtype) for name, array in tensors.items()}
    write_tensors(path, stored, dtypes=dict.fromkeys(stored, dtype))
    return path


def apart(states: list[Path], bases: list[Path], base: Path, limit: float) -> tuple[dict[int, Any], Any]:
    """Do the same one file after the other."""
    refused, sound = {}, []
    for place, (path, origin) in enumerate(zip(states, bases, strict=True)):
        try:
            validate(path, expected_layout(base), origin, limit)
            sound.append(place)
        except Invalid as error:
            refused[place] = (error.reason, str(error))
    return refused, gram_matrix(DeltaFiles([states[place] for place in sound], [bases[place] for place in sound]))


def both(states: list[Path], bases: list[Path], limit: float = math.inf) -> dict[int, int]:
    found = inspect(states, bases, expected_layout(bases[0]), limit)
    refused, gram = apart(states, bases, bases[0], limit)
    assert {place: refusal.reason for place, refusal in found.refused.items()} == {
        place: reason for place, (reason, _) in refused.items()
    }
    assert found.gram.tobytes() == gram.tobytes()
    return {place: refusal.reason for place, refusal in found.refused.items()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_sound_files(tmp_path: Path, dtype: str, count: int) -> None:
    base, older = state(tmp_path / "base", 0, dtype), state(tmp_path / "older", 1, dtype)
    states = [state(tmp_path / f"s{seed}", seed + 2, dtype) for seed in range(count)]
    assert both(states, [base if place % 3 else older for place in range(count)]) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["layers__0__up_proj", "layers__1__up_proj"])
def test_one_that_is_not_finite_leaves_the_others_as_they_are(tmp_path: Path, value: float, where: str) -> None:
    base = state(tmp_path / "base", 0)
    states = [
        state(tmp_path / "a", 1),
        state(tmp_path / "b", 2, "F32", 1.0, **{where: value}),
        state(tmp_path / "c", 3),
    ]
    assert both(states, [base] * 3) == {1: reasons.REASON_NON_FINITE}


def test_numbers_near_the_end_of_the_range_are_finite(tmp_path: Path) -> None:
    base = state(tmp_path / "base", 0, scale=0.0)
    states = [state(tmp_path / "a", 1, layers__0__up_proj=3.4e38), state(tmp_path / "b", 2)]
    assert both(states, [base] * 2) == {}


def test_who_moved_too_far_is_told_of_the_first_tensor(tmp_path: Path) -> None:
    base = state(tmp_path / "base", 0)
    states = [state(tmp_path / "near", 0), state(tmp_path / "far", 3, scale=9.0)]
    found = inspect(states, [base] * 2, expected_layout(base), 0.5)
    assert found.refused[1].finding.name == "layers.0.down_proj"
    assert both(states, [base] * 2, 0.5) == {1: reasons.REASON_NORM_EXCEEDED}


def test_a_file_of_another_form_is_refused_before_its_numbers_are_read(tmp_path: Path) -> None:
    base, odd = state(tmp_path / "base", 0), tmp_path / "odd"
    write_tensors(odd, {"layers.0.up_proj": np.zeros(1, np.float32)})
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\xff" * 64)
    found = both([odd, state(tmp_path / "a", 1), garbage], [base] * 3)
    assert found == {0: reasons.REASON_WRONG_TENSORS, 2: reasons.REASON_BAD_HEADER}


@pytest.mark.parametrize("broken", [False, True])
def test_what_was_judged_before_is_measured_beside_and_not_judged_again(tmp_path: Path, broken: bool) -> None:
    """A run's limit is for works of this cycle; one of them that is refused has no row."""
    base, older = state(tmp_path / "base", 0), state(tmp_path / "older", 1)
    before = [state(tmp_path / f"e{seed}", seed + 20, scale=9.0) for seed in range(2)]
    now = [state(tmp_path / f"s{seed}", 0, layers__0__up_proj=float(seed)) for seed in range(3)]
    if broken:
        now[1] = state(tmp_path / "broken", 0, layers__1__up_proj=math.nan)
    found = inspect(now, [base] * 3, expected_layout(base), 2.0, (before, [older] * 2))
    assert list(found.refused) == ([1] if broken else [])
    left = [path for path in now if not broken or path != now[1]]
    expected = gram_matrix(DeltaFiles([*before, *left], [older, older, *[base] * len(left)]))
    assert found.gram.tobytes() == expected.tobytes()


def test_what_was_judged_before_and_has_another_form_is_nobodys_fault_of_now(tmp_path: Path) -> None:
    base, odd = state(tmp_path / "base", 0), tmp_path / "odd"
    write_tensors(odd, {"layers.0.up_proj": np.zeros(1, np.float32)})
    with pytest.raises(Invalid):
        inspect([state(tmp_path / "a", 1)], [base], expected_layout(base), 9.0, ([odd], [base]))


def test_nothing_to_read(tmp_path: Path) -> None:
    found = inspect([], [], expected_layout(state(tmp_path / "base", 0)), 1.0)
    assert (found.refused, found.gram.shape) == ({}, (0, 0))


def test_each_block_of_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = state(tmp_path / "base", 0)
    states = [state(tmp_path / f"s{seed}", seed + 1) for seed in range(3)]
    read: list[tuple[int, str, int]] = []
    block = reading._File.block

    def counted(self: Any, name: str, part: slice) -> Any:
        read.append((id(self), name, part.start))
        return block(self, name, part)

    monkeypatch.setattr(reading._File, "block", counted)
    inspect(states, [base] * 3, expected_layout(base), 1e9, ([state(tmp_path / "before", 9)], [base]))
    assert len(read) == len(set(read)) == 5 * sum(-(-math.prod(shape) // 16) for shape in SHAPES.values())
