from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from connito.errors import Invalid
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef

from services.console import charts
from services.console.figures import NO_STORE, ExpertFigures, change
from services.console.heatmap import figure_map
from tests.support.files import write_tensors


def state(path: Path, scale: float, *, experts: int = 2) -> Path:
    """Two layers of two experts; the second expert of layer 1 is scaled, everything else stays."""
    rows = np.arange(1, experts * 4 + 1, dtype=np.float32).reshape(experts, 4)
    moved = rows.copy()
    moved[1] *= scale
    write_tensors(path, {"layers.0.down_proj": rows, "layers.1.down_proj": moved, "layers.1.up_proj": rows})
    return path


def test_the_change_of_an_expert_is_relative_to_its_own_size(tmp_path: Path) -> None:
    first, last = state(tmp_path / "0", 1.0), state(tmp_path / "1", 1.5)
    found = change(first, last, {0: [3, 9], 1: [7, 2]})
    assert found[0] == {3: 0.0, 9: 0.0}
    assert found[1][2] == 0.0
    # Row by row in ascending id: half of one of two equally large tensors moved.
    assert found[1][7] == pytest.approx(0.5 * (174 / 348) ** 0.5)


def test_states_of_other_experts_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="other rows"):
        change(state(tmp_path / "0", 1.0), state(tmp_path / "1", 1.0, experts=3), {0: [1, 2], 1: [1, 2]})
    with pytest.raises(Invalid, match="other rows"):
        change(state(tmp_path / "2", 1.0), state(tmp_path / "3", 1.0), {0: [1], 1: [1, 2]})


async def test_without_a_store_a_sentence_says_so_and_the_base_has_not_changed() -> None:
    figures = ExpertFigures(None, lambda: None)
    base = ArtifactRef(digest="aa", size=1, realm=REALM_PUBLIC)
    assert figures.use(base) == NO_STORE
    assert figures.change({4: [1]}, base, base) == {4: {1: 0.0}}
    await figures.close()


def test_the_largest_figure_has_the_strongest_colour() -> None:
    drawn = figure_map("use", {0: {0: 0.0, 1: 0.5}, 3: {0: 0.1, 1: 0.26}})
    assert drawn.leaders[0] == (0, 1, 0.5)
    cells = ElementTree.fromstring(charts.figure_map(drawn)).findall("rect")
    assert [cell.get("class") for cell in cells] == ["cell none", "cell s1", "cell s4", "cell s2"]
    assert cells[1].findtext("title") == "layer 0, expert 1: 0.5000"
    ElementTree.fromstring(charts.figure_map(figure_map("nothing", {})))
