"""Units as a subnet's weights: exactly within its limits, and what Bittensor's SDK makes of the same amounts."""

from __future__ import annotations

import importlib
import random
from fractions import Fraction
from typing import Any

import pytest
from connito.errors import Invalid
from connito.views.ledger import MINER, UNALLOCATED, VALIDATOR, Entry
from connito.views.weights import U16_MAX, earned, vector
from hypothesis import given
from hypothesis import strategies as st

# Units by UID, the limit, and what bittensor 11.3.0 (`_conform` of `SetWeights`) and bittensor 10.5.0 (`process_weights`,
# `convert_weights_and_uids_for_emit`) both make of them. None: where the limit cuts, they differ from ours by their epsilon.
RECORDED: list[tuple[dict[int, int], int, dict[int, int]]] = [
    ({2: 540, 7: 270, 9: 135, 11: 55}, U16_MAX, {2: 65535, 7: 32768, 9: 16384, 11: 6675}),
    ({6328: 204, 7602: 191, 12337: 111, 28140: 3103, 56838: 105}, U16_MAX,
     {6328: 4308, 7602: 4034, 12337: 2344, 28140: 65535, 56838: 2218}),
    ({0: 10**12, 1: 1, 2: 999}, U16_MAX, {0: 65535}),
    ({8108: 6725, 16226: 109, 17455: 107, 18907: 162, 28977: 107, 31544: 216, 51993: 341, 55642: 114}, 13107,
     {8108: 65535, 16226: 26295, 17455: 25812, 18907: 39080, 28977: 25812, 31544: 52107, 51993: 65535, 55642: 27501}),
    ({8229: 194, 23688: 323, 24624: 116, 26995: 327, 31994: 957, 32561: 189, 39354: 112, 40433: 303, 45020: 289,
      56045: 266, 59399: 351, 61027: 854}, 6553,
     {8229: 43624, 23688: 65535, 24624: 26084, 26995: 65535, 31994: 65535, 32561: 42499, 39354: 25185, 40433: 65535,
      45020: 64986, 56045: 59814, 59399: 65535, 61027: 65535}),
    ({0: 10**6, 1: 1, 2: 5, 3: 3}, 20000, {0: 65535, 1: 22784, 2: 65535, 3: 65535}),
]  # fmt: skip


def allowance(units: dict[int, int], limit: int, made: dict[int, int]) -> int:
    """By how much the SDK's 1e-7 in the height of the cut, and roundings in floats, may change a weight; 0 without a cut."""
    total = sum(units.values())
    if max(units.values()) * U16_MAX <= limit * total:
        return 0
    below = sum(units[uid] for uid in units if made[uid] < U16_MAX) / total
    return 1 + int(U16_MAX * min(1.0, 1e-7 * U16_MAX / (limit * below))) if below else 1


def same(units: dict[int, int], limit: int, theirs: dict[int, int], float_32: bool = False) -> None:
    made = vector(units, limit)
    assert made.keys() == theirs.keys()
    off = allowance(units, limit, made) + float_32
    assert {uid: (made[uid], value) for uid, value in theirs.items() if abs(made[uid] - value) > off} == {}


@pytest.mark.parametrize(("units", "limit", "theirs"), RECORDED)
def test_weights_are_those_that_the_sdk_was_recorded_with(
    units: dict[int, int], limit: int, theirs: dict[int, int]
) -> None:
    same(units, limit, theirs)


def by_process_weights(units: dict[int, int], limit: int) -> dict[int, int]:
    """Of bittensor up to 10."""
    import numpy as np

    sdk: Any = importlib.import_module("bittensor.utils.weight_utils")
    amounts = np.array([*units.values()], dtype=np.float32)
    uids, kept = sdk.process_weights(np.array([*units]), amounts, len(units), 0, limit / U16_MAX)
    return dict(zip(*sdk.convert_weights_and_uids_for_emit(uids, kept), strict=True))


def by_conform(units: dict[int, int], limit: int) -> dict[int, int]:
    """Of bittensor from 11 on."""
    sdk: Any = importlib.import_module("bittensor.intents.weights")
    known = sdk._Preflight(uid=U16_MAX, commit_reveal=False, min_allowed_weights=0, max_weight_limit=limit)
    return dict(zip(*sdk._conform([*units], [float(one) for one in units.values()], known, 1), strict=True))


def test_weights_are_those_of_the_sdk_and_it_leaves_ours_as_they_are() -> None:
    sdk = pytest.importorskip(
        "bittensor", reason="bittensor is not installed: NOTHING compares our weights with its SDK"
    )
    old = int(sdk.__version__.partition(".")[0]) < 11
    theirs = by_process_weights if old else by_conform
    draw = random.Random(3)
    for _ in range(200):
        count, limit = draw.choice([(5, U16_MAX), (9, 13107), (40, 3000), (256, 655)])
        units = {uid: int(100 * draw.paretovariate(0.9)) for uid in sorted(draw.sample(range(1000), count))}
        same(units, limit, theirs(units, limit), float_32=old)
        made = vector(units, limit)
        again = theirs(made, limit)
        assert max(abs(again[uid] - made[uid]) for uid in made) <= allowance(made, limit, made) + 1
        if limit == U16_MAX:
            assert again == made


@given(
    st.dictionaries(st.integers(0, U16_MAX), st.integers(1, 1 << 60), min_size=1, max_size=60), st.integers(1, U16_MAX)
)
def test_no_weight_exceeds_the_limit_after_rounding(units: dict[int, int], limit: int) -> None:
    if len(units) * limit < U16_MAX:
        with pytest.raises(Invalid, match=f"needs {-(-U16_MAX // limit)}"):
            vector(units, limit)
        return
    made = vector(units, limit)
    assert max(made.values()) == U16_MAX
    assert min(made.values()) > 0
    assert Fraction(U16_MAX, sum(made.values())) <= Fraction(limit, U16_MAX)
    ordered = sorted(made, key=lambda uid: units[uid])
    assert [made[uid] for uid in ordered] == sorted(made.values())


def test_what_the_limit_takes_goes_to_the_others_in_proportion() -> None:
    made = vector({1: 800, 2: 60, 3: 60, 4: 80}, 26214)  # 0.4
    assert made == {1: 65535, 2: 29491, 3: 29491, 4: 39321}
    assert vector({1: 5, 2: 1}, U16_MAX // 2 + 1)[2] > 65000
    assert vector({uid: uid * 100 for uid in range(1, 6)}, U16_MAX // 5) == dict.fromkeys(range(1, 6), U16_MAX)


@pytest.mark.parametrize(
    ("units", "limit", "least", "said"),
    [
        ({}, U16_MAX, 0, "earned anything"),
        ({3: 0}, U16_MAX, 0, "earned anything"),
        ({3: 1}, 0, 0, "MaxWeightsLimit"),
        ({3: 1, 4: 1}, 20000, 0, "2 UIDs earned, and a maximum of 20000 of 65535 each needs 4"),
        ({3: 1, 4: 1}, U16_MAX, 3, "2 UIDs have weight, and the subnet wants 3"),
        ({3: 10**9, 4: 1, 5: 1}, U16_MAX, 2, "1 UIDs have weight, and the subnet wants 2"),
        ({U16_MAX + 1: 1}, U16_MAX, 0, "UIDs are 0 to 65535"),
    ],
)
def test_what_no_vector_can_be_is_refused(units: dict[int, int], limit: int, least: int, said: str) -> None:
    with pytest.raises(Invalid, match=said):
        vector(units, limit, least)


def entry(cycle: int, account: str, role: str, units: int) -> Entry:
    return Entry(cycle, account, account, role, units, 0, "", 0)


BOOK = [
    entry(1, "a", MINER, 5), entry(1, "v", VALIDATOR, 2), entry(2, "a", MINER, 1), entry(2, "b", MINER, 4),
    entry(2, "c", MINER, 0), entry(3, "b", MINER, 7), entry(3, "", UNALLOCATED, 9),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last", "units"), [(1, 3, {"a": 6, "b": 11}), (2, 2, {"a": 1, "b": 4}), (3, 3, {"b": 7})]
)
def test_miners_earn_in_the_cycles_that_count(first: int, last: int, units: dict[str, int]) -> None:
    assert earned(BOOK, first, last) == units


@pytest.mark.parametrize(("first", "last"), [(1, 4), (3, 2), (4, 4), (2, 1)])
def test_cycles_that_were_not_paid_are_no_zeros(first: int, last: int) -> None:
    with pytest.raises(Invalid, match="not every cycle"):
        earned(BOOK, first, last)
