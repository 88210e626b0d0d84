from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.moe.rows import assert_only_changed, fingerprint, read_rows, write_rows
from connito.moe.state import load_state, save_state
from safetensors import safe_open

STATE = {
    "layers.3.gate_up_proj": torch.arange(12.0).view(2, 2, 3),
    "layers.3.down_proj": torch.ones(2, 3, 2, dtype=torch.bfloat16),
    "layers.11.down_proj": torch.zeros(1, 3, 2),
}


def test_states_are_ordinary_safetensors_with_reproducible_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    save_state(STATE, one, {"run": "r", "base": "b", "cycle": "1"})
    save_state(dict(reversed(STATE.items())), two, {"cycle": "1", "base": "b", "run": "r"})
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, framework="pt") as file:
        assert file.metadata() == {"run": "r", "base": "b", "cycle": "1"}
    loaded = load_state(one)
    assert list(loaded) == sorted(STATE)
    assert all(torch.equal(loaded[name], STATE[name]) and loaded[name].dtype == STATE[name].dtype for name in STATE)
    assert not list(tmp_path.glob("*.partial"))


def test_files_that_are_not_states_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_state(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"\xff" * 64)
    with pytest.raises(Invalid, match="not a safetensors file"):
        load_state(tmp_path / "junk")
    save_state({"model.norm.weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(Invalid, match="not a target tensor"):
        load_state(tmp_path / "other")


def test_rows_come_out_ascending_and_a_stray_change_is_noticed(full: Any) -> None:
    bank = full.get_submodule("model.layers.2.mlp.experts").down_proj
    rows = read_rows(full, {2: [5, 0]})
    assert torch.equal(rows["layers.2.down_proj"], bank[[0, 5]])
    before = fingerprint(full)
    write_rows(full, {2: [5, 0]}, {name: value + 1 for name, value in rows.items()})
    assert len(assert_only_changed(before, full, {2: [0, 5]})) == 4
    with pytest.raises(VerificationFailed, match="outside the selection"):
        assert_only_changed(before, full, {2: [0]})
    with torch.no_grad():
        full.model.norm.weight[0] += 1
    with pytest.raises(VerificationFailed, match="norm"):
        assert_only_changed(before, full, {2: [0, 5]})
