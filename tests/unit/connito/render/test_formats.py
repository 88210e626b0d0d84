from __future__ import annotations

import pytest
from connito.render import formats


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.50 kB"),
        (9_996, "10.0 kB"),
        (123_456_789, "123 MB"),
        (999_990_000, "1.00 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_a_size_has_three_digits_and_a_decimal_unit(count: float, text: str) -> None:
    assert formats.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0.00 s"),
        (0.42, "0.42 s"),
        (9.999, "10.0 s"),
        (12.3, "12.3 s"),
        (99.99, "1 min 40 s"),
        (245, "4 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_a_duration_has_the_units_of_its_length(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


def test_shares_losses_and_moments() -> None:
    assert (formats.percent(0.1234), formats.percent(0.95, 0)) == ("12.3 %", "95 %")
    assert (formats.loss(2.0), formats.loss(None)) == ("2.0000", "–")
    assert (formats.change(-0.01), formats.change(None)) == ("-0.0100", "–")
    assert (formats.moment(0), formats.day(0)) == ("1970-01-01 00:00:00 UTC", "1970-01-01")


def test_one_of_something_is_not_several() -> None:
    said = [formats.count(number, "cycle") for number in (0, 1, 2, 12_000)]
    assert said == ["0 cycles", "1 cycle", "2 cycles", "12,000 cycles"]
    for one, several in {"entry": "entries", "key": "keys", "loss": "losses", "branch": "branches"}.items():
        assert (formats.count(1, one), formats.count(2, one)) == (f"1 {one}", f"2 {several}")
