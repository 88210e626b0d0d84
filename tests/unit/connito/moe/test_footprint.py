"""What does not fit is refused with settings that make it fit, and helpers by bytes follow the rule of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.base.description import build_manifest
from connito.base.loading import load_resident
from connito.errors import Invalid
from connito.moe.footprint import Footprint, Workload, fit, free_bytes, lean
from connito.moe.helper_experts import by_policy, frozen_and_trained, most_used, rule_bytes
from connito.v1.run_pb2 import RunSpec, SelectionPolicy, TrainPolicy
from connito.wire.enums import reason_name

from tests.support.files import directory_reader

SELECTION, HELPERS = {2: [1, 6], 3: [4]}, {2: [0], 3: [0, 7]}
WORK = Workload(4, 128)


def _predict(work: Workload) -> Footprint:
    """Weights halve with `half`, activations are one unit a sequence."""
    return Footprint(2000 if work.half else 4000, 1, 2, 3, 4, 100 * (work.micro_batch or work.sequences), 10)


def test_what_fits_is_left_as_it_is() -> None:
    assert lean(_predict, WORK, 4420) == (WORK, ())
    assert fit(_predict, WORK, 4420, "here") == WORK


@pytest.mark.parametrize(
    ("have", "expected", "settings"),
    [
        (4200, replace(WORK, micro_batch=1), "CONNITO_MICRO_BATCH=1"),
        (2420, replace(WORK, half=True), "CONNITO_BF16_PARAMETERS=true"),
        (2200, replace(WORK, micro_batch=1, half=True), "CONNITO_MICRO_BATCH=1 and CONNITO_BF16_PARAMETERS=true"),
    ],
)
def test_as_few_settings_as_it_takes_are_named(have: int, expected: Workload, settings: str) -> None:
    chosen, turned = lean(_predict, WORK, have)
    assert chosen == expected == fit(_predict, WORK, have, "here", turned)
    assert _predict(chosen).total <= have
    with pytest.raises(Invalid, match=f"activations 400 B.*here has .* free; set {settings}, with which it") as caught:
        fit(_predict, WORK, have, "here")
    assert reason_name(caught.value.reason) == "does-not-fit"


def test_settings_that_do_not_suffice_are_not_promised() -> None:
    with pytest.raises(Invalid, match=r"even with CONNITO_MICRO_BATCH=1 and .* it needs .*: use a larger machine"):
        fit(_predict, WORK, 1000, "here")


def test_a_setting_that_changes_nothing_is_not_named() -> None:
    fixed = _predict(WORK)
    with pytest.raises(Invalid, match="no setting of a miner lowers that: use a larger machine"):
        fit(lambda _: fixed, WORK, 1000, "here")
    assert free_bytes() > 0


def test_a_selection_of_another_base_is_named(tiny: Path) -> None:
    with pytest.raises(Invalid, match="another base"):
        frozen_and_trained(build_manifest(tiny), {9: [0]})


def test_helpers_by_bytes_are_the_most_used_over_all_layers(tiny: Path) -> None:
    usage = {2: np.array([0.5, 0.1, 0.2, 0, 0, 0, 0.2, 0.0]), 3: np.array([0.3, 0.3, 0.05, 0, 0.35, 0, 0, 0])}
    sizes = {2: 10, 3: 10}
    assert most_used(usage, SELECTION, sizes, per_layer=0, max_bytes=35) == {2: [0], 3: [0, 1]}
    assert most_used(usage, SELECTION, sizes, per_layer=1, max_bytes=100) == {2: [0], 3: [0]}
    assert most_used(usage, SELECTION, sizes, per_layer=0, max_bytes=1000) == {2: [0, 2], 3: [0, 1, 2]}
    manifest = build_manifest(tiny)
    training = TrainPolicy(batch_sequences=2, sequence_length=32)

    def chosen(**policy: Any) -> object:
        return by_policy(RunSpec(selection=SelectionPolicy(**policy), training=training), manifest, usage, SELECTION)

    one = manifest.expert_bytes()[2]
    assert chosen(helpers_per_layer=2) is None
    assert chosen(helper_max_bytes=2 * one) == {2: [0], 3: [0]}
    alone = rule_bytes(RunSpec(training=training), manifest, SELECTION)
    assert chosen(resident_max_bytes=alone + one) == {2: [0], 3: []}
    with pytest.raises(Invalid, match="without any helper"):
        chosen(resident_max_bytes=alone - 1)


def test_ranged_loading_reads_what_is_resident_and_no_more(tiny: Path) -> None:
    manifest, disk = build_manifest(tiny), directory_reader(tiny)
    read = 0

    def reader(entry: object, start: int, length: int) -> bytes:
        nonlocal read
        data = disk(entry, start, length)  # type: ignore[arg-type]
        read += length if entry.name.endswith(".safetensors") else 0  # type: ignore[attr-defined]
        return data

    load_resident(manifest, reader, SELECTION, HELPERS)
    helpers = sum(manifest.expert_bytes()[layer] * len(experts) for layer, experts in HELPERS.items())
    assert read == sum(frozen_and_trained(manifest, SELECTION)) + helpers
