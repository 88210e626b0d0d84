from __future__ import annotations

from typing import Any

import pytest
from connito.errors import Invalid
from connito.library.signature import decode_signature, encode_signature, joint_signature, nearest


def test_written_and_read_again() -> None:
    signature = encode_signature({3: [1.0, -2.5], 1: [0.5, 0.25]}, {3: 10, 1: 20})
    assert decode_signature(signature) == {1: [0.5, 0.25], 3: [1.0, -2.5]}
    assert signature["tokens"] == {"1": 20, "3": 10}


@pytest.mark.parametrize("nonsense", [{}, {"layers": {"1": "?"}}, {"layers": {"x": ""}}, {"layers": []}])
def test_nonsense_is_refused(nonsense: dict[str, dict[str, str] | list[Any]]) -> None:
    with pytest.raises(Invalid, match="no routing signature"):
        decode_signature(nonsense)


def test_the_nearest_points_the_same_way_about_the_common_mean() -> None:
    common = [100.0, 100.0]
    candidates = {
        "right": {1: [101.0, 100.0]},
        "up": {1: [100.0, 101.0]},
        "left": {1: [99.0, 100.0]},
        "other": {7: common},
    }
    ranked = nearest({1: [105.0, 100.5]}, candidates)
    assert [name for name, _ in ranked] == ["right", "up", "left", "other"]
    assert ranked[-1][1] == -1.0


def test_a_joint_signature_weighs_by_weight_and_tokens() -> None:
    one, other = (
        encode_signature({1: [1.0, 0.0]}, {1: 30}),
        encode_signature({1: [0.0, 1.0], 2: [4.0, 4.0]}, {1: 10, 2: 5}),
    )
    joint = joint_signature([(one, 1.0), (other, 1.0), (None, 1.0)])
    assert joint is not None
    assert decode_signature(joint) == {1: [0.75, 0.25], 2: [4.0, 4.0]}
    alone = joint_signature([(one, 2.0), (other, 0.0)])
    assert alone is not None
    assert decode_signature(alone) == {1: [1.0, 0.0]}
    assert joint_signature([(None, 1.0)]) is None
