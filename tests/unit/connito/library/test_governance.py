"""Licences, standings, opt-outs and credit."""

from __future__ import annotations

from typing import Any

import pytest
from connito.errors import Invalid
from connito.library.governance import Standing, Use, Viewer, attribute, check_use, governance
from connito.v1 import reasons_pb2
from hypothesis import given
from hypothesis import strategies as st


def record(
    name: str,
    licence: str = "CC-BY-4.0",
    miners: tuple[float, ...] = (),
    parents: tuple[tuple[str, float], ...] = (),
    **rules: object,
) -> dict[str, Any]:
    return {
        "expert_id": name,
        "license": licence,
        "contributors": [{"miner": f"{name}-{i}", "share": share} for i, share in enumerate(miners)],
        "derived": {"parents": [{"expert_id": parent, "weight": weight} for parent, weight in parents]},
        "governance": rules,
    }


def test_a_permitted_use_names_whom_to_credit() -> None:
    permission = check_use([record("a"), record("b", "CC0-1.0")], Use("compose", commercial=True))
    assert permission.license == "CC-BY-4.0 AND CC0-1.0"
    assert permission.attribution == ("a (CC-BY-4.0)",)
    assert permission.warnings == ()


@pytest.mark.parametrize(
    ("licences", "use", "why"),
    [
        (["CC-BY-NC-4.0"], Use("export", commercial=True), "no commercial use"),
        (["CC-BY-ND-4.0"], Use("compose"), "no derivatives"),
        (["LicenseRef-internal"], Use("export", redistribute=True), "may not be passed on"),
        (["CC-BY-SA-4.0", "GPL-3.0-only"], Use("compose"), "cannot be composed"),
        (["CC-BY-SA-4.0", "CC-BY-NC-4.0"], Use("compose"), "forbids the further limits"),
        (["Somebody's own terms"], Use("export"), "--accept-license"),
        ([""], Use("export"), "no licence"),
    ],
)
def test_terms_that_forbid_a_use_refuse_it(licences: list[str], use: Use, why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        check_use([record(f"e{i}", licence) for i, licence in enumerate(licences)], use)
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED


def test_share_alike_binds_a_composition_and_no_mere_collection() -> None:
    parts = [record("a"), record("b", "CC-BY-SA-4.0")]
    assert check_use(parts, Use("compose")).license == "CC-BY-SA-4.0"
    assert check_use(parts, Use("export")).license == "CC-BY-4.0 AND CC-BY-SA-4.0"
    assert check_use([record("a", "CC-BY-ND-4.0")], Use("export")).license == "CC-BY-ND-4.0"


def test_unknown_terms_pass_once_they_were_read() -> None:
    use = Use("compose", accepted=frozenset({"HPO licence"}))
    assert check_use([record("a", "HPO licence")], use).license == "HPO licence"


def test_standings_warn_or_refuse_with_the_reason() -> None:
    def check(status: str, **options: Any) -> tuple[str, ...]:
        return check_use([record("a")], Use(), standings={"a": Standing(status, "bad data")}, **options).warnings

    assert check("good") == ()
    assert check("deprecated") == ("a is deprecated: bad data",)
    assert check("yanked", allow_yanked=True) == ("a is yanked: bad data",)
    with pytest.raises(Invalid, match="was yanked: bad data"):
        check("yanked")
    with pytest.raises(Invalid, match="opted out"):
        check("opted-out", allow_yanked=True)


def test_an_invisible_expert_looks_like_none() -> None:
    with pytest.raises(Invalid, match="there is no expert 'a' that you may see"):
        check_use([record("a", visibility="private", owner="anna")], Use())
    assert check_use([record("a", visibility="private", owner="anna")], Use(), viewer=Viewer("anna")).license


def test_nonsense_is_refused() -> None:
    with pytest.raises(Invalid, match="unknown visibility"):
        governance(record("a", visibility="secret"))
    with pytest.raises(Invalid, match="must name it"):
        governance(record("a", visibility="organisation"))


def test_credit_goes_through_compositions_to_the_miners() -> None:
    shelf = {"a": record("a", miners=(0.75, 0.25)), "b": record("b", miners=(1.0,)), "lost": record("lost")}
    whole = record("ab", parents=(("a", 2.0), ("b", -1.0), ("gone", 1.0)))
    credit = attribute(whole, 1000, shelf.get)
    assert credit.units == {"a-0": 375, "a-1": 125, "b-0": 250}
    assert credit.uncredited == 250
    assert attribute(shelf["lost"], 10, shelf.get).uncredited == 10


@given(st.lists(st.floats(0, 1), max_size=6), st.integers(0, 10_000))
def test_units_are_conserved(shares: list[float], units: int) -> None:
    credit = attribute(record("a", miners=tuple(shares)), units, lambda _: None)
    assert sum(credit.units.values()) + credit.uncredited == units
    assert all(count > 0 for count in credit.units.values())


def test_a_composition_of_itself_ends() -> None:
    loop = record("a", parents=(("a", 1.0),))
    assert attribute(loop, 7, {"a": loop}.get).uncredited == 7
