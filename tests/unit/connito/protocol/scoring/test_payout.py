from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from connito.errors import Invalid
from connito.protocol.scoring import payout
from connito.v1 import run_pb2
from connito.v1.run_pb2 import RewardPolicy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

utilities = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40).map(lambda values: sorted(values, reverse=True))
tables = st.lists(st.integers(1, 10**6), max_size=12).map(lambda values: sorted(values, reverse=True))
policies = st.tuples(st.sampled_from(["", "rank-table", "proportional"]), tables).map(
    lambda pair: RewardPolicy(payout=pair[0], rank_shares=pair[1])
)
# A busy machine is slow to draw; that says nothing about what is tested.
busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@busy
@given(utilities, st.integers(0, 1 << 53), st.integers(1, 50), policies)
def test_every_unit_is_given_out_and_a_better_rank_never_earns_less(
    values: list[float], units: int, paid: int, policy: run_pb2.RewardPolicy
) -> None:
    found = payout.pay(values, units, paid, policy)
    assert sum(found) == units
    assert found == sorted(found, reverse=True)
    assert all(unit >= 0 for unit in found)
    assert all(unit == 0 for unit in found[paid:])


@busy
@given(utilities, st.integers(10**6, 10**9), st.integers(0, 39), st.floats(1.0, 10.0))
def test_more_utility_never_earns_less_when_pay_is_proportional(
    values: list[float], units: int, who: int, factor: float
) -> None:
    who %= len(values)
    policy = RewardPolicy(payout="proportional")
    before = payout.pay(values, units, len(values), policy)[who]
    raised = values[who] * factor
    others = [value for place, value in enumerate(values) if place != who]
    place = sum(1 for value in others if value >= raised)
    after = payout.pay([*others[:place], raised, *others[place:]], units, len(values), policy)[place]
    # Rounding to whole units may cost one.
    assert after >= before - 1


@busy
@given(st.integers(0, 10**12), st.lists(st.fractions(0, 100), max_size=30))
def test_apportioning_is_within_a_unit_of_the_exact_share(units: int, shares: list[Fraction]) -> None:
    found = payout.apportion(units, shares)
    total = sum(shares)
    assert sum(found) == (units if total else 0)
    for unit, share in zip(found, shares, strict=True):
        exact = units * share / total if total else 0
        assert abs(float(unit - exact)) < 1


def test_the_table_pays_by_rank_and_nothing_beyond_it() -> None:
    policy = RewardPolicy(payout="rank-table", rank_shares=[5, 3, 2])
    assert payout.pay([9.0, 0.2, 0.1, 0.1], 1000, 10, policy) == [500, 300, 200, 0]
    assert payout.pay([9.0, 0.2], 800, 10, policy) == [500, 300]
    assert payout.pay([9.0, 0.2, 0.1], 700, 10, RewardPolicy()) == [400, 200, 100]


def test_proportional_pays_by_utility() -> None:
    assert payout.pay([3.0, 1.0], 100, 10, RewardPolicy(payout="proportional")) == [75, 25]


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(payout, "_POLICIES", dict(payout._POLICIES))
    return payout.register


def test_an_installation_adds_its_own(custom: Callable[..., Any]) -> None:
    custom("winner-takes-most", lambda utilities, policy: [8] + [Fraction(1, 2)] * (len(utilities) - 1))
    assert payout.pay([2.0, 1.0, 1.0], 90, 10, RewardPolicy(payout="winner-takes-most")) == [80, 5, 5]
    with pytest.raises(Invalid, match="exists already"):
        custom("proportional", payout.proportional)


@pytest.mark.parametrize("shares", [[1], [1, -1], [1, 2], [1, float("nan")], [1, float("inf")], ["all", "none"]])
def test_no_policy_can_break_the_order_or_the_sum(custom: Callable[..., Any], shares: list[float | str]) -> None:
    custom("broken", lambda utilities, policy: shares)
    with pytest.raises(Invalid, match="broken"):
        payout.pay([2.0, 1.0], 90, 10, RewardPolicy(payout="broken"))


def test_an_unknown_policy_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(Invalid, match=r"lottery.*proportional, rank-table"):
        payout.find("lottery")


def test_a_package_registers_a_policy_as_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fair_shares.py").write_text("def equal(utilities, policy):\n    return [1] * len(utilities)\n")
    info = tmp_path / "fair_shares-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fair-shares\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[connito.payouts]\nequal = fair_shares:equal\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert payout.names() == ["equal", "proportional", "rank-table"]
    assert payout.pay([9.0, 2.0, 1.0], 100, 10, RewardPolicy(payout="equal")) == [34, 33, 33]
