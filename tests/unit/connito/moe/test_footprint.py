"""What the manifest predicts is what the model takes, and what does not fit is refused before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.base.description import build_manifest
from connito.base.loading import load_resident, load_resident_local
from connito.errors import Invalid
from connito.moe.engine import Engine
from connito.moe.footprint import Footprint, Workload, free_bytes, predict, require_fit
from connito.moe.helper_experts import by_policy, most_used
from connito.moe.resident import target_parameters
from connito.v1.run_pb2 import RunSpec, SelectionPolicy, TrainPolicy
from connito.wire.enums import reason_name

from tests.support.files import directory_reader

pytestmark = pytest.mark.slow

SELECTION, HELPERS = {2: [1, 6], 3: [4]}, {2: [0], 3: [0, 7]}


@pytest.mark.parametrize("half", [False, True])
def test_predicted_weights_gradients_and_moments_are_exact(tiny: Path, half: bool) -> None:
    model = load_resident_local(tiny, SELECTION, HELPERS, half=half)
    need = predict(build_manifest(tiny), SELECTION, HELPERS, Workload(4, 64, half, engine=Engine(optimizer="adamw")))
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    rotary = sum(t.nbytes for name, t in model.named_buffers() if "rotary" in name)
    actual = sum(t.nbytes for t in held.values()) - rotary
    # Norms and routers stay exact, where the prediction halves every frozen tensor: it may be short by those alone.
    assert 0 <= actual - need.weights <= (0 if not half else 0.02 * actual)
    targets = target_parameters(model).values()
    assert need.gradients == sum(p.nbytes for p in targets)
    assert need.moments == sum(2 * 4 * p.numel() for p in targets)
    assert need.activations > 0


def test_a_model_that_does_not_fit_is_refused_with_numbers_and_remedy() -> None:
    need = Footprint(3_000_000_000, 500_000_000, 1_000_000_000, 600_000_000)
    require_fit(need, 5_100_000_000, "here")
    with pytest.raises(Invalid, match=r"needs 5\.10 GB .*here has 4\.00 GB free; set CONNITO_MICRO_BATCH=1") as caught:
        require_fit(need, 4_000_000_000, "here")
    assert reason_name(caught.value.reason) == "does-not-fit"
    assert free_bytes() > 0


def test_a_selection_of_another_base_is_named(tiny: Path) -> None:
    with pytest.raises(Invalid, match="another base"):
        predict(build_manifest(tiny), {9: [0]}, {}, Workload(1, 8))


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
    alone = predict(manifest, SELECTION, {}, Workload(2, 32)).total
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
    assert read == predict(manifest, SELECTION, HELPERS, Workload(1, 1)).weights
