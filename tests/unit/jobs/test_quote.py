from __future__ import annotations

import pytest
from connito.base.manifest import FileEntry, Manifest, TensorEntry
from connito.jobs.memory import least, needs
from connito.jobs.pages import markdown, verdict
from connito.jobs.quote import cycles_until


def manifest() -> Manifest:
    """Two layers of four experts of 100 bytes each, and 1000 bytes of everything else, float32."""
    tensors = {"embed": TensorEntry("embed", "f", "F32", (250,), 0, 1000, "")}
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        tensors[name] = TensorEntry(name, "f", "F32", (4, 25), 1000 + 400 * layer, 400, "", ("",) * 4)
    return Manifest({"f": FileEntry("f.safetensors", "", 1800, "")}, tensors)


def test_what_a_miner_keeps_and_sends():
    found = needs(manifest(), {1: 2}, helpers=1, activations=7)

    assert found.upload == 200
    assert found.shared_weights == 1000
    # The layer that is not adapted stays whole; of the other, two targets and a helper.
    assert found.resident_experts == 400 + 300
    # Gradient and two moments of the targets, and the state that δ is computed from.
    assert found.training_state == 3 * 200 + 200
    assert found.memory == 1000 + 700 + 800 + 7


def test_no_job_takes_less_than_one_expert():
    floor = least(manifest(), helpers=0)

    assert floor.upload == 100
    assert all(floor.memory <= needs(manifest(), targets, 0).memory for targets in ({0: 1}, {1: 1}, {0: 1, 1: 1}))


@pytest.mark.parametrize(
    ("wanted", "first", "ratio", "cycles"),
    [(0.5, 0.1, 1.0, 5), (0.5, 0.5, 0.5, 1), (0.7, 0.4, 0.5, 3), (0.8, 0.4, 0.5, None), (0.01, 0.4, 0.5, 1)],
)
def test_cycles_until_the_objective(wanted, first, ratio, cycles):
    found = cycles_until(wanted, first, ratio)

    assert found == cycles
    if found is not None and ratio < 1:
        assert sum(first * ratio**n for n in range(found)) >= wanted
        assert sum(first * ratio**n for n in range(found - 1)) < wanted


def test_a_change_is_told_from_chance_or_not():
    assert verdict({"low": -0.2, "high": -0.1}) == "better"
    assert verdict({"low": 0.1, "high": 0.2}) == "worse"
    assert "no difference" in verdict({"low": -0.1, "high": 0.1})


def test_a_run_without_an_expert_says_so():
    page = markdown(
        {
            "run": "r",
            "domain": "law",
            "base": {"name": "tiny", "manifest": "m"},
            "expert": None,
            "measured": None,
            "outcome": {"status": "completed", "reason": "", "detail": "all 2 cycles done"},
            "cycles": [],
            "selection": None,
            "contributors": [],
            "commands": {"audit": "connito audit r"},
            "start": None,
            "totals": {"upload_bytes_per_miner_and_cycle": 0},
        }
    )

    assert "No expert came out of it" in page
    assert "load_expert" not in page
    assert "connito audit r" in page
