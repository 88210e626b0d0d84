from __future__ import annotations

import pytest
from connito.library.interval import change_interval, t_quantile
from connito.protocol.scoring.proof_of_loss import paired
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 23, 64, 101])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.9995])
def test_the_quantile_is_students(freedom: int, probability: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(t.ppf(probability, freedom), rel=1e-9)


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500), st.integers(1, 128)), min_size=2, max_size=40))
def test_the_interval_is_the_one_that_scores_have(rows: list[tuple[float, float, int]]) -> None:
    before, after, tokens = zip(*rows, strict=True)
    found = change_interval(before, after, tokens)
    assert found is not None
    low, high = found
    expected = paired(before, after, tokens, 0.95)
    assert (-high, -low) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


def test_what_cannot_have_an_interval_has_none() -> None:
    assert change_interval([1.0], [2.0], [3]) is None
    assert change_interval([1.0, 2.0], [2.0], [3, 3]) is None
    assert change_interval([1.0, float("nan")], [2.0, 1.0], [3, 3]) is None
